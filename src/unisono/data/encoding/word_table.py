"""The tokens of ASCII texts, many texts at once: words are found, and looked up, by whole-array operations.

Owns where words begin and end in ASCII texts, and a table of words. The function `ask` gives a word's tokens, once for
each word.

Words are compared by their letters, packed into two numbers of 64 bits, never by a hash alone; the hash gives the place
in the table. The few words that are longer, or for which the table has no room, are in a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise

import numpy as np

from unisono.data.hashing import PRIME, cut_texts, mix

MOST_WORDS, LONGEST_WORD = 300_000, 48
"""How many words are remembered, some 20 MB, and how many letters a word may have. When there are too many words, all
are forgotten; the frequent ones are soon learned again."""

PACKED = 16
"""The number of letters that two numbers hold."""

CONTROL = bytes([*range(9), *range(11, 13), *range(14, 32), 127])
"""What BERT's normalizer removes from ASCII texts: control characters except tab and line ends."""

_MARKS = b"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_SPACE, _LETTER, _MARK, _END = range(4)
_END_OF_TEXT = "\xff"  # ends each text
_KINDS = bytes(
    _END if code == 255 else _MARK if code in _MARKS else _SPACE if code in b" \t\n\r" else _LETTER
    for code in range(256)
)
_MASKS = np.array([(1 << 8 * letters) - 1 for letters in range(9)], "<u8")
_LETTERS_AT_ONCE = 2**17  # a few arrays of this size stay in the cache
_BUCKET_BITS = 18


class WordTable:
    """A pure function from texts to their tokens, with a memory.

    Args:
        ask: the tokens of words, which are ASCII without spaces and control characters.
        lowercase: whether texts are made lower case first.
    """

    def __init__(self, ask: Callable[[list[str]], Iterable[Sequence[int]]], *, lowercase: bool) -> None:
        self._ask = ask
        letters = bytes(range(256))
        self._letters = letters[:128].lower() + letters[128:] if lowercase else letters
        # words by number (0 is unused): packed letters; where a word's tokens begin, and how many there are
        self._words, self._used = 1, 0
        self._keys = np.zeros((1024, 2), "<u8")
        self._spans = np.zeros((1024, 2), np.int64)
        self._ids = np.zeros(1024, np.int32)
        # two numbers for each bucket of the table, and a dictionary for words that are not in it
        self._ways = np.zeros((2, 1 << _BUCKET_BITS), np.int32)
        self._others: dict[bytes, int] = {}

    def __len__(self) -> int:
        return self._words - 1

    def encode(self, texts: Sequence[str], most: int, begin: Sequence[int], end: Sequence[int]) -> list[np.ndarray]:
        """Return int32 [tokens] for each text: `begin`, at most `most` tokens of its words, and `end`. Texts are
        ASCII."""
        reach = 8 * most + 64  # letters that are usually enough
        shorter = [text if len(text) <= reach else _shorten(text, reach) for text in texts]
        rows: list[np.ndarray] = []
        for some in cut_texts(shorter, most_letters=_LETTERS_AT_ONCE, most_texts=_LETTERS_AT_ONCE):
            rows += self._encode(shorter[some], most, begin, end)
        full = len(begin) + most + len(end)
        for number, (text, read) in enumerate(zip(texts, shorter, strict=True)):
            if len(rows[number]) < full and len(read) < len(text):
                (rows[number],) = self._encode([text], most, begin, end)
        return rows

    def add(self, words: Sequence[bytes], tokens: Iterable[Sequence[int]]) -> range:
        """Remember words that are new; return their numbers."""
        rows = list(tokens)
        numbers = range(self._words, self._words + len(words))
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        ends = self._used + np.cumsum(counts)
        self._spans = _grown(self._spans, numbers.stop)
        self._spans[numbers.start : numbers.stop] = np.stack([ends - counts, counts], axis=1)
        used = self._used + int(counts.sum())
        self._ids = _grown(self._ids, used)
        self._ids[self._used : used] = np.fromiter(chain.from_iterable(rows), np.int32, used - self._used)
        self._keys = _grown(self._keys, numbers.stop)
        packed = b"".join(word.ljust(PACKED, b"\0") if len(word) <= PACKED else bytes(PACKED) for word in words)
        self._keys[numbers.start : numbers.stop] = np.frombuffer(packed, "<u8").reshape(-1, 2)
        self._words, self._used = numbers.stop, used
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        left = self._place(numbers.start + np.flatnonzero(lengths <= PACKED))
        longer = numbers.start + np.flatnonzero((lengths > PACKED) & (lengths <= LONGEST_WORD))
        for number in [*left.tolist(), *longer.tolist()]:
            self._others[words[number - numbers.start]] = number
        return numbers

    def _place(self, numbers: np.ndarray) -> np.ndarray:
        """Enter words in the table; return those for which there is no room."""
        buckets = _buckets(self._keys[numbers, 0], self._keys[numbers, 1])
        for way in self._ways:
            free = way[buckets] == 0
            way[buckets[free]] = numbers[free]  # if several words have the same place, one of them gets it
            there = way[buckets] == numbers
            numbers, buckets = numbers[~there], buckets[~there]
        return numbers

    def _forget(self) -> None:
        self._words, self._used = 1, 0
        self._keys[:] = 0
        self._ways[:] = 0
        self._others.clear()

    def _encode(self, texts: Sequence[str], most: int, begin: Sequence[int], end: Sequence[int]) -> list[np.ndarray]:
        if len(self) > MOST_WORDS:
            self._forget()
        packed = (_END_OF_TEXT.join(texts) + _END_OF_TEXT).encode("latin-1").translate(self._letters, CONTROL)
        starts, lengths, bounds = _cut(packed)
        numbers = self._find(packed, starts, lengths)
        spans = self._spans[numbers]  # only now: the table may have grown
        ends = np.cumsum(spans[:, 1])
        total = int(ends[-1]) if len(ends) else 0
        ids = self._ids[np.arange(total) + np.repeat(spans[:, 0] + spans[:, 1] - ends, spans[:, 1])]
        of_text = np.concatenate([[0], ends])[bounds]
        counts = np.diff(of_text)
        if (counts > most).any():
            ids = ids[np.arange(total) - np.repeat(of_text[:-1], counts) < most]
            counts = np.minimum(counts, most)
        return _frame(ids, counts, begin, end)

    def _find(self, packed: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The numbers of words; those that are new are learned."""
        letters = np.ndarray((len(packed) + 1,), "<u8", packed + bytes(PACKED), strides=(1,))  # eight from each on
        low = letters[starts] & _MASKS[np.minimum(lengths, 8)]
        high = np.zeros_like(low)
        long = np.flatnonzero(lengths > 8)
        high[long] = letters[starts[long] + 8] & _MASKS[np.minimum(lengths[long] - 8, 8)]
        buckets = _buckets(low, high)
        numbers = self._ways[0][buckets]
        keys = self._keys[numbers]
        missed = np.flatnonzero((keys[:, 0] != low) | (keys[:, 1] != high))
        second = self._ways[1][buckets[missed]]
        keys = self._keys[second]
        found = (keys[:, 0] == low[missed]) & (keys[:, 1] == high[missed])
        numbers[missed[found]] = second[found]
        missed = np.union1d(missed[~found], np.flatnonzero(lengths > PACKED))
        if len(missed):
            ends = (starts[missed] + lengths[missed]).tolist()
            words = [packed[start:end] for start, end in zip(starts[missed].tolist(), ends, strict=True)]
            new = [word for word in dict.fromkeys(words) if word not in self._others]
            asked = self._ask([word.decode("ascii") for word in new]) if new else []
            learned = dict(zip(new, self.add(new, asked), strict=True))
            numbers[missed] = [learned[word] if word in learned else self._others[word] for word in words]
        return numbers


def _cut(packed: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where words begin, and their lengths; and the bounds of each text among the words, one more than there are texts.
    A word is a run of letters, or a punctuation mark."""
    kinds = np.frombuffer(packed.translate(_KINDS), np.uint8)
    starts = np.flatnonzero((kinds[1:] != kinds[:-1]) | (kinds[1:] >= _MARK)) + 1
    starts = np.concatenate([[0], starts])
    lengths = np.diff(starts, append=len(packed))
    kinds = kinds[starts]
    words = np.flatnonzero((kinds == _LETTER) | (kinds == _MARK))
    bounds = np.searchsorted(words, np.flatnonzero(kinds == _END))
    return starts[words], lengths[words], np.concatenate([[0], bounds])


def _frame(ids: np.ndarray, counts: np.ndarray, begin: Sequence[int], end: Sequence[int]) -> list[np.ndarray]:
    """Rows with the given numbers of ids, with other ids before and after each row's own."""
    more = len(begin) + len(end)
    bounds = np.concatenate([[0], np.cumsum(counts + more)])
    found = np.empty(bounds[-1], np.int32)
    found[np.arange(len(ids)) + np.repeat(more * np.arange(len(counts)) + len(begin), counts)] = ids
    for place, number in enumerate(begin):
        found[bounds[:-1] + place] = number
    for place, number in enumerate(end, -len(end)):
        found[bounds[1:] + place] = number
    return [found[start:stop] for start, stop in pairwise(bounds.tolist())]


def _buckets(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (mix(low + high * PRIME) >> np.uint64(64 - _BUCKET_BITS)).astype(np.int64)


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    """An array with room for at least this number of entries."""
    if size <= len(array):
        return array
    return np.concatenate([array, np.zeros((max(len(array), size - len(array)), *array.shape[1:]), array.dtype)])


def _shorten(text: str, reach: int) -> str:
    """The text up to a space: no token reaches across."""
    return text[: max(text.rfind(" ", 0, reach), 0)] or text
