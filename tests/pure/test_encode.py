"""Encoders are pure functions; vocabularies, and chunks by any number of workers, are the same every time."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.config.recipe import Recipe, check
from unisono.data.encoding.encode import choose_encoder, find_settings, load_encoder
from unisono.data.encoding.encoder import Encoder
from unisono.data.encoding.tokens import SubwordEncoder, train_bpe, train_wordpiece
from unisono.errors import DataError, ModelError

PLAIN = ["the", "train", "trains", "training", "bits", "same", "bit", "weights", "worker", "work"]
WORDS = [*PLAIN, "Ünïcode", "don't", "今天", "天气", "[SEP]", "\x1c", "x\u00a0y", *[""] * 9]


def corpus(count: int = 300) -> list[str]:
    choose = random.Random(0)
    return [" ".join(choose.choices(WORDS, k=choose.randint(1, 20))) for _ in range(count)]


def recipe(kind: str, model: str = "", **encode_keys: object) -> Recipe:
    model = model or ("bag" if kind == "ngrams" else "transformer")
    return check({"encode": {"kind": kind, "vocabulary_size": 400, **encode_keys}, "model": {"kind": model}})


@functools.cache
def encoder(kind: str, max_tokens: int = 12) -> Encoder:
    return choose_encoder(recipe(kind, max_tokens=max_tokens), [corpus()])


KINDS = ["wordpiece", "bpe", "ngrams"]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_valid_and_come_back_from_disk(tmp_path: Path, kind: str) -> None:
    made = encoder(kind)
    made.save(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.padding == made.padding
    assert loaded.vocabulary_size == made.vocabulary_size
    texts = [*corpus(50), "", " ", "\x00", "😀", "never seen"]
    for mine, theirs in zip(made.encode(texts), loaded.encode(texts), strict=True):
        assert mine.dtype == np.int32
        assert len(mine) and mine.min() >= 0 and mine.max() < made.vocabulary_size
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_special_tokens_and_the_limit(kind: str) -> None:
    made = encoder(kind)
    short, long, quoted = made.encode(["the", "the work " * 50, "[SEP]"])
    first, last = short[0], short[-1]
    assert len(long) == 12 and (long[0], long[-1]) == (first, last)
    assert first != last and made.padding not in (first, last)
    assert np.count_nonzero(quoted == last) == 1, "a text cannot contain special tokens"


@pytest.mark.parametrize("train", [train_wordpiece, train_bpe])
@pytest.mark.parametrize("lowercase", [True, False])
def test_a_vocabulary_depends_on_the_texts_alone(train: object, lowercase: bool) -> None:
    texts = corpus()
    made = train([texts], 400, lowercase).to_str()  # type: ignore[operator]
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        assert train([texts], 400, lowercase).to_str() == made  # type: ignore[operator]


@pytest.mark.parametrize("train", ["train_wordpiece", "train_bpe"])
def test_a_vocabulary_does_not_depend_on_the_process(train: str) -> None:
    script = (
        f"import json, sys; from unisono.data.encoding.tokens import {train} as train;"
        "sys.stdout.write(train([json.load(sys.stdin)], 400, True).to_str())"
    )
    run = [sys.executable, "-c", script]
    made = {subprocess.run(run, input=json.dumps(corpus()), capture_output=True, text=True, check=True).stdout}
    here = train_wordpiece if train == "train_wordpiece" else train_bpe
    assert made == {here([corpus()[:7], corpus()[7:]], 400, True).to_str()}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["wordpiece", "bpe"]),
    st.lists(
        st.sampled_from(["a", "b.", "", "", "\n", "\t", "\x1c", "\u00a0", "\u0301", "\u0301", "é中"]),
        max_size=16,
    ),
)
def test_shortening_first_changes_nothing(kind: str, words: list[str]) -> None:
    text = " ".join(words)
    short, whole = encoder(kind, 6), encoder(kind, 500)
    full = whole.encode([text])[0]
    expected = full if len(full) <= 6 else np.append(full[:5], full[-1])
    assert np.array_equal(short.encode([text])[0], expected)


def test_settings_of_a_given_tokenizer_are_replaced(tmp_path: Path) -> None:
    tokenizer = train_wordpiece([corpus()], 400, True)
    tokenizer.enable_padding(length=99, pad_id=tokenizer.token_to_id("[PAD]"))
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    asked = recipe("tokenizer", tokenizer=str(tmp_path / "tokenizer.json"), max_tokens=12)
    made = choose_encoder(asked, [])
    assert [len(sample) for sample in made.encode(["the", "the work " * 50])] == [3, 12]
    by_folder = check({"model": {"kind": "pretrained", "folder": str(tmp_path)}})
    assert find_settings(by_folder)["tokenizer_sha256"] == find_settings(asked)["tokenizer_sha256"]
    assert choose_encoder(by_folder, []).vocabulary_size == made.vocabulary_size


@pytest.mark.parametrize(("model", "kind"), [("bag", "ngrams"), ("transformer", "wordpiece")])
def test_auto(model: str, kind: str) -> None:
    assert find_settings(recipe("auto", model))["kind"] == kind


def test_settings_hold_only_what_matters() -> None:
    assert find_settings(recipe("ngrams", ngrams=2)) != find_settings(recipe("ngrams", ngrams=3))
    assert find_settings(recipe("wordpiece", ngrams=2)) == find_settings(recipe("wordpiece", ngrams=3))


def test_what_cannot_be_an_encoder(tmp_path: Path) -> None:
    for keys, message in [({}, "none is named"), ({"tokenizer": str(tmp_path / "no.json")}, "no such file")]:
        with pytest.raises(DataError, match=message):
            find_settings(recipe("tokenizer", **keys))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is no tokenizer.json"):
        choose_encoder(recipe("tokenizer", tokenizer=str(tmp_path / "tokenizer.json")), [])
    with pytest.raises(DataError, match="no room"):
        choose_encoder(recipe("wordpiece", max_tokens=2), [corpus()])
    for content in ["", "[]", '{"kind": "other"}', '{"kind": "bpe", "max_tokens": 9, "padding": 0}']:
        (tmp_path / "encoder.json").write_text(content)
        with pytest.raises(ModelError):
            load_encoder(tmp_path)


def test_a_tokenizer_without_special_tokens_gives_no_empty_sample() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert [len(sample) for sample in SubwordEncoder(tokenizer, kind="tokenizer", max_tokens=4).encode(["", "a"])] == [
        1,
        1,
    ]
