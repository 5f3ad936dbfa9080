"""Word n-grams: what a word is, which are known, how they are numbered, and that nothing but the texts decides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.data.encoding import ngrams as module
from unisono.data.encoding.ngrams import LEVELS, NGrams
from unisono.errors import ModelError, UserError


def learn(texts: list[str], features: int = 2**20, words: int = 100, order: int = 1, **settings: Any) -> NGrams:
    return NGrams.learn([texts], features, words=words, order=order, **{"lowercase": True, **settings})


def row(text: str, **settings: Any) -> list[int]:
    """The text's tokens, by an encoder that has learned from it alone."""
    return learn([text], **settings).encode([text])[0].tolist()


def features(text: str, **settings: Any) -> set[int]:
    """Hashes of the text's features."""
    return set(learn([text], **settings)._known.tolist())


def test_hashes_are_these_for_ever() -> None:
    # Stored datasets and trained models depend on these numbers: a change here breaks them.
    known = features("The cat, naïve", order=2, prefix=2)
    assert known == {
        213561827314827264,
        9181155383754096640,
        11521242737962385408,
        14189350377170599936,
        14562262933658730496,
        14717233706370531328,
        15475301618251530240,
        15813449701253251072,
    }


def test_numbers_follow_falling_frequency_in_texts() -> None:
    texts = ["a a a a a b", "b c", "b c d", "c b"]
    one = learn(texts)
    assert one.vocabulary_size == LEVELS * 5  # a, b, c, d, and what stands for none of them
    b, c = one.encode(["b", "c"])
    assert (b.tolist(), c.tolist()) == ([LEVELS], [2 * LEVELS])
    assert {token // LEVELS for (token,) in map(np.ndarray.tolist, one.encode(["a", "d"]))} == {3, 4}


def test_the_most_frequent_features_are_kept() -> None:
    texts = ["a b c", "a b d", "a e"]
    assert learn(texts, 2).encode(["a", "b", "c a", "z"])[2].tolist() == [LEVELS]
    assert [row.tolist() for row in learn(texts, 2).encode(["e", ""])] == [[0], [0]]


@pytest.mark.slow
@given(st.lists(st.text("ab \n", max_size=6), max_size=9), st.randoms())
def test_what_is_learned_depends_on_the_texts_alone(texts: list[str], random: Random) -> None:
    mine = learn(texts, order=2)
    random.shuffle(texts)
    theirs = learn(texts, order=2)
    assert mine._known.tolist() == theirs._known.tolist()


def test_what_is_learned_and_encoded_does_not_depend_on_how_many_texts_are_hashed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = [" ".join(f"w{n % k}" for n in range(k)) for k in range(1, 60)] + ["", "ü x w1"]
    mine = learn(texts, order=3, prefix=1)
    rows = mine.encode(texts)
    monkeypatch.setattr(module, "_LETTERS_AT_ONCE", 50)
    theirs = learn(texts, order=3, prefix=1)
    assert mine._known.tolist() == theirs._known.tolist()
    assert list(map(np.ndarray.tolist, theirs.encode(texts))) == list(map(np.ndarray.tolist, rows))


def test_the_rarest_are_forgotten_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LETTERS_AT_ONCE", 1)
    monkeypatch.setattr(module, "_MOST_COUNTED", 8)
    texts = [f"often now rare{n} once{n}" for n in range(20)]
    kept = learn(texts, 2)
    assert [row.tolist() for row in kept.encode(["often", "now", "rare0"])] in (
        [[LEVELS], [2 * LEVELS], [0]],
        [[2 * LEVELS], [LEVELS], [0]],
    )


def test_another_process_with_another_hash_seed_agrees() -> None:
    code = (
        "from unisono.data.encoding.ngrams import NGrams\n"
        "texts = ['a b c d', 'ü 中文 b']\n"
        "print(NGrams.learn([texts], 99, words=9, order=3, lowercase=True).encode(texts))"
    )
    seen = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        seen.add(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert len(seen) == 1


@given(st.lists(st.text(), max_size=5), st.lists(st.text(), max_size=5), st.integers(1, 5), st.integers(1, 9))
def test_rows_are_never_empty_and_within_bounds(known: list[str], new: list[str], order: int, words: int) -> None:
    one = learn(known, words=words, order=order)
    rows = one.encode(known + new)
    assert len(rows) == len(known + new)
    for found in rows:
        assert found.dtype == np.int32
        assert len(found) and found.min() >= 0 and found.max() < one.vocabulary_size
        assert len(found) <= words * order
        assert (np.diff(found // LEVELS) > 0).all()


@given(st.lists(st.text(), min_size=1, max_size=5), st.integers(1, 3))
def test_a_text_is_encoded_alike_in_any_company(texts: list[str], order: int) -> None:
    one = learn(texts, order=order, prefix=2)
    together = one.encode(texts)
    for text, found in zip(texts, together, strict=True):
        assert found.tolist() == one.encode([text])[0].tolist()


def test_token_0_is_for_texts_without_known_words_alone() -> None:
    assert row("") == row(" … !?") == [0]
    assert 0 not in row(" ".join(map(str, range(5000))), words=5000)


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
    assert features(text) == features(" ".join(words)) == set().union(*map(features, words))
    assert len(features(text)) == len(set(words))


def test_order_counts_and_repeats() -> None:
    assert len(row("a b c d", order=1)) == 4
    assert len(row("a b c d", order=3)) == 4 + 3 + 2
    assert len(row("a b", order=5)) == 2 + 1
    assert features("a b", order=2) != features("b a", order=2)
    assert features("one two three", words=2) == features("one two")
    assert features("one two. three four five", words=3, order=2) == features("one two three", order=2)


def test_runs_do_not_reach_into_the_next_text() -> None:
    assert set(learn(["a b", "c"], order=2)._known.tolist()) == features("a b", order=2) | features("c")


@pytest.mark.parametrize(("times", "level"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (99, 3)])
def test_levels_tell_how_often(times: int, level: int) -> None:
    assert row("a " * times) == [LEVELS + level]


def test_prefixes_join_the_forms_of_a_word() -> None:
    one, other = features("vote", prefix=4), features("voted", prefix=4)
    assert len(one) == len(other) == 2 and len(one & other) == 1
    assert not features("vote") & features("voted")
    assert features("vote", prefix=4) > features("vote")  # a word and the same letters as prefix are two features
    assert len(features("öäüxy öäüz", prefix=3)) == 3, "letters, not bytes"


def test_letters_far_into_a_word_count() -> None:
    assert features("x" * 3000 + "a") != features("x" * 3000 + "b")


def test_lowercase() -> None:
    assert features("The Ü") == features("the ü")
    assert features("The", lowercase=False) != features("the", lowercase=False)


def test_hashes_spread_evenly() -> None:
    known = learn([" ".join(f"w{n}" for n in range(20_000))], words=20_000, order=2)._known
    counts = np.bincount((known >> np.uint64(16)) % 100, minlength=100)
    expected = counts.sum() / 100
    assert len(known) == 39_999
    assert ((counts - expected) ** 2 / expected).sum() < 160  # chi-square of 99: above 148 once in a thousand


def test_saved_and_loaded(tmp_path: Path) -> None:
    text = "Some Words and some more Words and more"
    before = learn([text], words=7, order=2, lowercase=False, prefix=3)
    before.save(tmp_path)
    after = NGrams.load(tmp_path, json.loads((tmp_path / "encoder.json").read_text(encoding="utf-8")))
    assert after.encode([text])[0].tolist() == before.encode([text])[0].tolist()
    assert (after.vocabulary_size, after.padding) == (before.vocabulary_size, 0)


FIELDS = {"kind": "ngrams", "words": 7, "order": 2, "lowercase": True, "prefix": 0}


@pytest.mark.parametrize(
    "change", [{"kind": "wordpiece"}, {"words": "7"}, {"lowercase": 1}, {"order": 0}, {"prefix": -1}]
)
def test_wrong_fields_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    learn(["a"]).save(tmp_path)
    with pytest.raises(UserError, match="allowed"):
        NGrams.load(tmp_path, FIELDS | change)


@pytest.mark.parametrize("content", [None, b"", b"x" * 99, b"\x93NUMPY"])
def test_damaged_features_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "features.npy").write_bytes(content)
    with pytest.raises(ModelError, match=r"features\.npy"):
        NGrams.load(tmp_path, FIELDS)


def test_features_of_another_kind_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", np.zeros((2, 2), np.float32))
    with pytest.raises(ModelError, match="uint64"):
        NGrams.load(tmp_path, FIELDS)
