"""Tokens by remembered words are the library's own, on any text, and are used only where that is sure."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

from unisono.data.encoding import word_table as wordtable
from unisono.data.encoding.tokens import SubwordEncoder, train_bpe, train_wordpiece
from unisono.data.encoding.word_table import LONGEST_WORD, WordTable
from unisono.data.encoding.words import Words

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


def make(lowercase: bool, most: int, added: bool) -> SubwordEncoder:
    tokenizer = train_wordpiece([TEXTS], 150, lowercase)
    if added:
        tokenizer.add_tokens([AddedToken("<new>", normalized=True)])
        tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    return SubwordEncoder(tokenizer, kind="tokenizer" if added else "wordpiece", max_tokens=most)


ENCODERS = [
    make(lowercase, most, added) for lowercase in (True, False) for most in (3, 9, 99) for added in (True, False)
]
WHOLE = {encoder: Tokenizer.from_str(encoder._tokenizer.to_str()) for encoder in ENCODERS}
for unlimited in WHOLE.values():
    unlimited.no_truncation()


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(SPICE), max_size=25).map("".join)))
def test_any_text_has_the_librarys_tokens(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    for encoder in ENCODERS:
        (row,), (cut,) = encoder.encode_marked([text])
        (asked,), (cut_by_library,) = encoder._ask([text])
        np.testing.assert_array_equal(row, asked)
        assert cut == cut_by_library == (len(WHOLE[encoder].encode(text).ids) > encoder.max_tokens)


def ids_of(words: Words, text: str, most: int = 99) -> list[int]:
    (row,) = words.encode([text], most, [], [])
    assert row is not None
    return row.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(SPICE), max_size=25).map("".join), max_size=9), st.sampled_from(ENCODERS))
def test_texts_are_encoded_together_as_alone(texts: list[str], encoder: SubwordEncoder) -> None:
    together = encoder.encode(texts)
    assert [row.tolist() for row in together] == [encoder._ask([text])[0][0].tolist() for text in texts]


def test_words_are_remembered_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordtable, "MOST_WORDS", 3)
    tokenizer = train_wordpiece([TEXTS], 150, True)
    words = Words.of(tokenizer)
    assert words is not None
    for text in ["the cat", "sat on a mat", "the cat sat", "don't"] * 2:
        assert ids_of(words, text) == tokenizer.encode(text, add_special_tokens=False).ids
        assert len(words._table) <= 3 + 5


def test_a_word_is_asked_for_once() -> None:
    asked: list[str] = []

    def ask(words: list[str]) -> list[list[int]]:
        asked.extend(words)
        return [[len(word), 7] for word in words]

    table = WordTable(ask, lowercase=True)
    long, longer, longest = "y" * 17, "z" * LONGEST_WORD, "q" * (LONGEST_WORD + 1)
    text = f"one TWO one, sixteen-letters_ {'x' * 16} {'x' * 17} {long} {longer} {longest}"
    for _ in range(2):
        (row,) = table.encode([text], 99, [], [])
        words = ["one", "two", "one", ",", "sixteen", "-", "letters", "_", "x" * 16, "x" * 17, long, longer, longest]
        assert row.tolist() == [number for word in words for number in (len(word), 7)]
    assert sorted(asked) == sorted([*dict.fromkeys(words), longest])


def test_a_table_without_room_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all words fall into the same few places."""
    monkeypatch.setattr(wordtable, "_BUCKET_BITS", 2)
    words = ["".join(letters) for letters in product("abc", repeat=4)]
    numbers = {word: number for number, word in enumerate(words)}
    table = WordTable(lambda some: [[numbers[word]] for word in some], lowercase=False)
    for start in (0, 40, 20, 0):
        (row,) = table.encode([" ".join(words[start : start + 60])], 99, [], [])
        assert row.tolist() == [numbers[word] for word in words[start : start + 60]]
    assert len(table) == len(words)


def test_many_new_words_at_once() -> None:
    table = WordTable(lambda words: [[int(word)] * (int(word) % 5) for word in words], lowercase=False)
    for start in (0, 5000, 0):
        numbers = range(start, start + 10_000)
        (row,) = table.encode([" ".join(map(str, numbers))], 10**6, [], [])
        assert row.tolist() == [number for number in numbers for _ in range(number % 5)]
    assert len(table) == 15_000


@pytest.mark.parametrize("most", [1, 2, 10])
def test_texts_longer_than_mostly_needed_are_read_on(most: int) -> None:
    table = WordTable(lambda words: [[int(word)] for word in words], lowercase=False)
    numbers = [str(number) for number in range(3 * most)]
    texts = [(" " * 500).join(numbers), " ".join(numbers), "\n" * 5000 + "5", "", " " * 1000]
    expected = [list(range(3 * most))[:most]] * 2 + [[5], [], []]
    for begin, end in (([], []), ([101], [102, 103])):
        found = table.encode(texts, most, begin, end)
        assert [row.tolist() for row in found] == [[*begin, *row, *end] for row in expected]


def test_texts_without_spaces_are_not_remembered() -> None:
    tokenizer = train_wordpiece([TEXTS], 150, True)
    words = Words.of(tokenizer)
    assert words is not None
    before = len(words._table), len(words._chunks)
    text = "中文" * LONGEST_WORD
    assert ids_of(words, text) == tokenizer.encode(text, add_special_tokens=False).ids[:99]
    assert (len(words._table), len(words._chunks)) == before, "each would take as much memory as it is long"


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
    alone, other = words.encode(["the CAT sat", "the cat"], 9, [], [])
    assert alone is None and other is not None
