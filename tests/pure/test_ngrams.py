"""Hashed n-grams: what a word is, which bucket it falls into, and that nothing but the text decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.data.ngrams import NGrams
from unisono.errors import UserError


def ngrams(words: int = 100, order: int = 1, buckets: int = 2**20, lowercase: bool = True, prefix: int = 0) -> NGrams:
    return NGrams(words=words, order=order, buckets=buckets, lowercase=lowercase, prefix=prefix)


def row(text: str, **settings: int) -> list[int]:
    return ngrams(**settings).encode([text])[0].tolist()


def test_buckets_are_these_for_ever() -> None:
    # Stored datasets and trained models depend on these numbers: a change here breaks them.
    assert row("The cat sat", order=2, buckets=1_000_003) == sorted([472435, 43366, 999566, 549145, 430039])


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = (
        "from unisono.data.ngrams import NGrams\n"
        "print(NGrams(words=9, order=3, buckets=999, lowercase=True).encode(['a b c d', 'ü 中文'])[0:2])"
    )
    seen = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        seen.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert len(seen) == 1


@given(st.lists(st.text(), max_size=5), st.integers(1, 5), st.integers(2, 5000), st.integers(1, 9))
def test_rows_are_never_empty_and_within_bounds(texts: list[str], order: int, buckets: int, words: int) -> None:
    rows = ngrams(words, order, buckets).encode(texts)
    assert len(rows) == len(texts)
    for found in rows:
        assert found.dtype == np.int32
        assert len(found) and found.min() >= 0 and found.max() < buckets
        assert len(found) <= words * order


@given(st.lists(st.text(), min_size=1, max_size=5), st.integers(1, 3))
def test_a_text_is_encoded_alike_in_any_company(texts: list[str], order: int) -> None:
    together = ngrams(order=order).encode(texts)
    for text, found in zip(texts, together, strict=True):
        assert found.tolist() == row(text, order=order)


def test_bucket_0_is_for_texts_without_words_alone() -> None:
    assert row("") == row(" … !?") == [0]
    assert 0 not in row(" ".join(map(str, range(5000))), words=5000, buckets=17)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("don't stop", ["don", "t", "stop"]),
        ("GPT4中文也行", ["gpt4", "中", "文", "也", "行"]),
        ("カタカナ", ["カ", "タ", "カ", "ナ"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs do not cut a word
        ("cafe\u0301 crème", ["cafe\u0301", "crème"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert ngrams()._split(text) == words


def test_order_counts_and_repeats() -> None:
    assert len(row("a b c d", order=1)) == 4
    assert len(row("a b c d", order=3)) == 4 + 3 + 2
    assert len(row("a b", order=5)) == 2 + 1
    assert row("a a") == row("a")  # once, however often
    assert row("a b", order=2) != row("b a", order=2)
    assert row("one two three", words=2) == row("one two")


def test_prefixes_join_the_forms_of_a_word() -> None:
    one, other = row("vote", prefix=4), row("voted", prefix=4)
    assert len(one) == len(other) == 2 and len(set(one) & set(other)) == 1
    assert not set(row("vote")) & set(row("voted"))
    assert set(row("vote", prefix=4)) - set(row("vote"))  # a word and the same letters as prefix are two features


def test_lowercase() -> None:
    assert row("The") == row("the")
    assert row("The", lowercase=False) != row("the", lowercase=False)


def test_hashes_spread_evenly() -> None:
    one = ngrams(words=20_000, order=2, buckets=2**31 - 1)
    found = one.encode([" ".join(f"w{n}" for n in range(20_000))])[0]
    counts = np.bincount(found % 100, minlength=100)
    expected = counts.sum() / 100
    assert len(found) == 39_999
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-square of 99: above 148 once in a thousand


def test_saved_and_loaded(tmp_path: Path) -> None:
    before = ngrams(words=7, order=2, buckets=321, lowercase=False, prefix=3)
    before.save(tmp_path)
    after = NGrams.load(json.loads((tmp_path / "encoder.json").read_text(encoding="utf-8")))
    text = "Some Words and some more Words and more"
    assert after.encode([text])[0].tolist() == before.encode([text])[0].tolist()
    assert (after.vocabulary_size, after.padding) == (321, 0)


@pytest.mark.parametrize(
    "change",
    [{"kind": "wordpiece"}, {"words": "7"}, {"lowercase": 1}, {"order": 0}, {"buckets": 1}, {"prefix": -1}],
)
def test_wrong_fields_are_refused(change: dict[str, object]) -> None:
    fields = {
        "kind": "ngrams",
        "words": 7,
        "order": 2,
        "buckets": 321,
        "lowercase": True,
        "prefix": 0,
    } | change
    with pytest.raises(UserError, match="allowed"):
        NGrams.load(fields)
