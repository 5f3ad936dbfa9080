"""Tokens by remembered words are the library's own, on any text, and are used only where that is sure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

from unisono.data import words as module
from unisono.data.tokens import Pieces, train_bpe, train_wordpiece
from unisono.data.words import Words

TEXTS = ["the Cat sat on the mat, and Ünïcode çhars 中文 too! don't", "a b c 1 22 333 _ ` ~ Straße ΣΑΣ"] * 3
SPICE = [
    " ",
    " ",
    "\n",
    "\t",
    "a",
    "The",
    "cat",
    "don't",
    ".",
    ",",
    "-",
    "[CLS]",
    "[sep]",
    "[",
    "<new>",
    "中",
    "é",
    "É",
]
SPICE += [
    "\u0301",
    "\x00",
    "\x0b",
    "\x1c",
    "\x7f",
    "\xa0",
    "\u2028",
    "Σ",
    "ß",
    "x" * 120,
    "İ",
    "\ufffd",
    "\u200b",
    "😀",
]


def make(lowercase: bool, most: int, added: bool) -> Pieces:
    tokenizer = train_wordpiece([TEXTS], 150, lowercase)
    if added:
        tokenizer.add_tokens([AddedToken("<new>", normalized=True)])
        tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    return Pieces(tokenizer, kind="tokenizer" if added else "wordpiece", max_tokens=most)


ENCODERS = [
    make(lowercase, most, added) for lowercase in (True, False) for most in (3, 9, 99) for added in (True, False)
]


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(SPICE), max_size=25).map("".join)))
def test_any_text_has_the_librarys_tokens(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    for encoder in ENCODERS:
        np.testing.assert_array_equal(encoder.encode([text])[0], encoder._ask([text])[0])


def test_words_are_remembered_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WORDS", 3)
    tokenizer = train_wordpiece([TEXTS], 150, True)
    words = Words.of(tokenizer)
    assert words is not None
    for text in ["the cat", "sat on a mat", "the cat sat", "don't"] * 2:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert np.frombuffer(words.encode(text, 99) or b"", np.int32).tolist() == expected
        assert len(words._words) <= 3 + 5 and len(words._chunks) <= 3 + 5


def test_texts_without_spaces_are_not_remembered() -> None:
    tokenizer = train_wordpiece([TEXTS], 150, True)
    words = Words.of(tokenizer)
    assert words is not None
    before = len(words._words), len(words._chunks)
    text = "中文" * module.LONGEST_WORD
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert np.frombuffer(words.encode(text, 99) or b"", np.int32).tolist() == expected
    assert (len(words._words), len(words._chunks)) == before, "each would take as much memory as it is long"


def test_other_tokenizers_are_asked_for_whole_texts() -> None:
    bpe = train_bpe([TEXTS], 300, True)
    assert Words.of(bpe) is None
    other = Tokenizer.from_str(train_wordpiece([TEXTS], 150, True).to_str())
    other.normalizer = normalizers.BertNormalizer(clean_text=False)
    assert Words.of(other) is None
    other.normalizer = normalizers.NFKC()  # joins across what a word is cut at
    assert Words.of(other) is None


def test_an_added_token_within_a_text_is_the_librarys_matter() -> None:
    tokenizer = train_wordpiece([TEXTS], 150, True)
    tokenizer.add_tokens([AddedToken("cat sat", normalized=True)])
    words = Words.of(tokenizer)
    assert words is not None
    assert words.encode("the CAT sat", 9) is None
    assert words.encode("the cat", 9) is not None
