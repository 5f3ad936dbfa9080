"""Texts as bags of word n-grams.

Owns what a word is, which n-grams are features, how they are numbered, and how that is kept in a folder. Does not
depend on tokenizers or on models.

An n-gram is identified by 48 bits of a hash: polynomials of bytes in integer arithmetic, the same on every machine and
in every process, never Python's salted `hash`. Texts are hashed together, many at a time, by whole-array operations: a
loop over words would take most of the time from a raw file to a trained model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from unisono import parallel
from unisono.data.hashing import PRIME, cut_texts, mix
from unisono.errors import DataError, ModelError

KIND = "ngrams"
FEATURES = "features.npy"

# Scripts written without spaces: each character is a word, and n-grams then find the real words.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Han
)
# Vowel signs and accents, which `\w` leaves out, so that Hindi, Hebrew or Arabic words are not cut at them.
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(rf"[^\W{_ALONE}]+(?:[{_MARKS}]+[^\W{_ALONE}]*)*|[{_ALONE}]")

_SPACE = 0x20
_SPACED = bytes(code if chr(code).isalnum() or code == 0x5F else _SPACE for code in range(128)) + bytes(128)
"""For ASCII texts: everything except letters, digits and `_` becomes a space."""

LEVELS = 4
"""The number of levels of frequency within a text: once, two or three times, four to seven times, more often."""

_EMPTY = 0  # stands in a text without known features; no feature has this number
_PREFIX = np.uint64(0x9E3779B97F4A7C15)  # so that a word and the same letters as a prefix are two features
_LONGEST = 1024  # bytes of a word whose positions enter the hash
_POWERS = np.cumprod(np.full(_LONGEST, PRIME))

_TEXTS_AT_ONCE = 2**16  # the low 16 bits of a hash make room for the number of a text
_LETTERS_AT_ONCE = 2**20
_LOW = np.uint64(_TEXTS_AT_ONCE - 1)
_MOST_COUNTED = 2**23  # features; while more are counted, the rarest are forgotten


class NGrams:
    """A pure function from a text to its words and runs of words, and how often each occurs in it.

    Features are numbered by falling frequency, from 1: feature 1 is in the most training texts. Unknown ones are left
    out. A token is LEVELS · feature + level, where level is ⌊log2⌋ of how often the feature occurs in the text, 3 at
    most.

    Args:
        known: uint64 [features], the hashes of the features in the order of their numbers.
        words: longer texts are cut after this number of words.
        order: longest run of words that is one feature; runs of 1, 2, … order words all are features.
        lowercase: whether `The` and `the` are one word.
        prefix: first letters of a word that are a feature as well: `vote` and `voted` share one; 0: none.
    """

    padding = _EMPTY

    def __init__(self, known: np.ndarray, *, words: int, order: int, lowercase: bool, prefix: int = 0) -> None:
        if words < 1 or order < 1 or prefix < 0:
            raise DataError(
                f"n-grams of words={words}, order={order}, prefix={prefix}: allowed are words and order from 1, "
                "prefix from 0. See [encode]."
            )
        self.words = words
        self.order = order
        self.lowercase = lowercase
        self.prefix = prefix
        self.vocabulary_size = LEVELS * (len(known) + 1)
        self._known = known
        self._numbers = np.argsort(known).astype(np.int64)
        self._sorted = known[self._numbers]

    @classmethod
    def learn(
        cls,
        texts: Iterable[Sequence[str]],
        features: int,
        *,
        words: int,
        order: int,
        lowercase: bool,
        prefix: int = 0,
        workers: int = 1,
    ) -> Self:
        """Make an encoder with the features of these texts: at most `features`, those that are in the most texts.

        The texts come in lists; each list is counted by one of `workers` processes.
        """
        unknowing = cls(np.empty(0, np.uint64), words=words, order=order, lowercase=lowercase, prefix=prefix)
        counted = _Counts()
        for hashes, times in parallel.map(unknowing._count, texts, workers=workers, seed=None, progress=False):
            counted.add(hashes, times)
        known = counted.most_frequent(features)
        return cls(known, words=words, order=order, lowercase=lowercase, prefix=prefix)

    def _count(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes of these texts' features, rising (uint64), and in how many texts each occurs (int64)."""
        counted = _Counts()
        for some in _cut_up(texts):
            counted.add(*_runs(self._find(texts[some]).hashes))
        return counted.merge()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one int32 [distinct features] array per text, never empty: a token for each, ascending."""
        rows: list[np.ndarray] = []
        for some in _cut_up(texts):
            rows += self._number(self._find(texts[some]), some.stop - some.start)
        return rows

    def save(self, folder: Path) -> None:
        """Write `encoder.json` and `features.npy`, from which `NGrams.load` makes an equal encoder."""
        fields = {
            "kind": KIND,
            "words": self.words,
            "order": self.order,
            "lowercase": self.lowercase,
            "prefix": self.prefix,
        }
        (folder / "encoder.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        np.save(folder / FEATURES, self._known.astype("<u8"))

    @classmethod
    def load(cls, folder: Path, fields: Mapping[str, Any]) -> Self:
        """Make the encoder that `save` described; `fields` are those of `encoder.json`.

        Raises:
            ModelError: a field or `features.npy` is missing or unusable, or they are of another kind of encoder.
        """
        names = {"words": int, "order": int, "lowercase": bool, "prefix": int}
        wrong = [name for name, kind in names.items() if type(fields.get(name)) is not kind]
        if fields.get("kind") != KIND or wrong:
            raise ModelError(
                f"encoder.json: kind {fields.get('kind')!r}, unusable fields {wrong}; allowed is kind "
                f"{KIND!r} with {', '.join(names)}. Prepare the data again, or restore the file."
            )
        try:
            if not (folder / FEATURES).is_file():  # a pipe would keep the reader waiting
                raise OSError
            known = np.load(folder / FEATURES)
        except (OSError, ValueError, EOFError, MemoryError):  # NumPy's own message would advise to read it as pickle
            raise ModelError(f"{str(folder / FEATURES)!r}: missing or no row of numbers. Restore the file.") from None
        if known.ndim != 1 or known.dtype != np.uint64:
            raise ModelError(f"{str(folder / FEATURES)!r}: allowed is a row of uint64 numbers. Restore the file.")
        return cls(known, **{name: fields[name] for name in names})

    def _number(self, found: _Occurrences, texts: int) -> list[np.ndarray]:
        """Return the rows of so many texts."""
        hashes, of_hash = _runs(found.hashes)
        places = np.minimum(np.searchsorted(self._sorted, hashes), max(len(self._sorted) - 1, 0))
        if len(self._sorted):
            numbers = np.where(self._sorted[places] == hashes, self._numbers[places] + 1, _EMPTY)
        else:
            numbers = np.full(len(hashes), _EMPTY)
        numbers = np.repeat(numbers, of_hash)
        there = numbers != _EMPTY
        tokens = LEVELS * numbers[there] + np.minimum(np.frexp(found.times[there])[1] - 1, LEVELS - 1)
        silent = np.setdiff1d(np.arange(texts), found.texts[there])
        keys = np.sort(np.concatenate([found.texts[there] << 32 | tokens, silent << 32 | _EMPTY]))
        ends = np.searchsorted(keys, np.arange(1, texts) << 32)
        return np.split((keys & 0xFFFFFFFF).astype(np.int32), ends)

    def _find(self, texts: Sequence[str]) -> _Occurrences:
        """Find the features of at most 65,536 texts."""
        packed = [self._spell(text) for text in texts]
        words = _Words.cut(packed, self.words)
        hashes = single = runs = words.hashes()
        of_text = owners = words.texts
        for length in range(2, self.order + 1):
            same = owners[: 1 - length] == owners[length - 1 :]
            runs = mix(runs[:-1] * PRIME + single[length - 1 :])
            hashes, of_text = (
                np.concatenate([hashes, runs[same]]),
                np.concatenate([of_text, owners[: 1 - length][same]]),
            )
        if self.prefix:
            hashes = np.concatenate([hashes, words.hashes(self.prefix)])
            of_text = np.concatenate([of_text, owners])
        keys, times = _runs(np.sort((hashes & ~_LOW) | of_text.astype(np.uint64)))
        return _Occurrences(hashes=keys & ~_LOW, texts=(keys & _LOW).astype(np.int64), times=times)

    def _spell(self, text: str) -> bytes:
        """Return a text's words in UTF-8, with spaces between them."""
        if self.lowercase:
            text = text.lower()
        if text.isascii():
            return text.encode("ascii").translate(_SPACED)
        return " ".join(_WORD.findall(text)).encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Occurrences:
    """Which feature occurs in which text, and how often; by feature, then by text. Arrays run parallel.

    hashes: uint64, with zeros in the low 16 bits. texts: int64. times: int64, from 1.
    """

    hashes: np.ndarray
    texts: np.ndarray
    times: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    """The words of some texts, one after the other.

    letters: uint8 [bytes of all words]. lengths: int64 [words], bytes. texts: int64 [words], the text of each.
    """

    letters: np.ndarray
    lengths: np.ndarray
    texts: np.ndarray

    @classmethod
    def cut(cls, packed: Sequence[bytes], most: int) -> Self:
        """Cut texts at spaces; leave out what comes after `most` words of a text."""
        joined = np.frombuffer(b" ".join([b"", *packed, b""]), np.uint8)
        is_letter = joined != _SPACE
        bounds = np.flatnonzero(is_letter[1:] != is_letter[:-1]) + 1  # alternately the begin and the end of a word
        begins, ends = bounds[::2], bounds[1::2]
        starts = np.cumsum([1, *(len(text) + 1 for text in packed)])  # of each text, and of one after the last
        firsts = np.searchsorted(begins, starts)
        counts = np.diff(firsts)
        texts = np.repeat(np.arange(len(packed)), counts)
        letters, lengths = joined[is_letter], ends - begins
        if counts.max(initial=0) > most:
            kept = np.arange(len(begins)) - firsts[texts] < most
            letters, lengths, texts = letters[np.repeat(kept, lengths)], lengths[kept], texts[kept]
        return cls(letters=letters, lengths=lengths, texts=texts)

    def hashes(self, prefix: int = 0) -> np.ndarray:
        """Return uint64 [words]: hashes of the words, or of their first `prefix` letters."""
        if not len(self.lengths):
            return np.empty(0, np.uint64)
        begins = np.cumsum(self.lengths) - self.lengths
        places = np.arange(len(self.letters)) - np.repeat(begins, self.lengths)
        terms = (self.letters + np.uint64(1)) * _POWERS[np.minimum(places, _LONGEST - 1)]
        if not prefix:
            return mix(np.add.reduceat(terms, begins))
        leads = np.cumsum((self.letters & 0xC0) != 0x80)  # in UTF-8 the other bytes continue a letter
        letter = leads - np.repeat(leads[begins], self.lengths)
        return mix(np.add.reduceat(np.where(letter < prefix, terms, np.uint64(0)), begins) + _PREFIX)


class _Counts:
    """In how many texts each feature occurs."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, hashes: np.ndarray, texts: np.ndarray) -> None:
        """Add some features, by rising hash, and in how many further texts each occurs."""
        self._parts.append((hashes, texts))
        if sum(len(hashes) for hashes, _ in self._parts) > _MOST_COUNTED:
            hashes, texts = self.merge()
            kept = np.argsort(-texts, kind="stable")[: _MOST_COUNTED // 2]
            kept.sort()
            self._parts = [(hashes[kept], texts[kept])]

    def most_frequent(self, features: int) -> np.ndarray:
        """Return uint64 [at most `features`]: the hashes of the most frequent features, the most frequent first."""
        hashes, texts = self.merge()
        return hashes[np.argsort(-texts, kind="stable")[:features]]

    def merge(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all features by rising hash (uint64), and in how many texts each occurs (int64)."""
        hashes = np.concatenate([np.empty(0, np.uint64), *(hashes for hashes, _ in self._parts)])
        texts = np.concatenate([np.empty(0, np.int64), *(texts for _, texts in self._parts)])
        order = np.argsort(hashes, kind="stable")
        hashes, repeats = _runs(hashes[order])
        if len(hashes):
            texts = np.add.reduceat(texts[order], np.cumsum(repeats) - repeats)
        self._parts = [(hashes, texts)]
        return self._parts[0]


def _cut_up(texts: Sequence[str]) -> Iterator[slice]:
    """Runs of texts that are hashed at once: a few megabytes at a time are faster than all, and take less memory."""
    return cut_texts(texts, most_letters=_LETTERS_AT_ONCE, most_texts=_TEXTS_AT_ONCE)


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct values of a sorted array, and how often each occurs in it (int64)."""
    if not len(ordered):
        return ordered, np.empty(0, np.int64)
    begins = np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])
    return ordered[begins], np.diff(begins, append=len(ordered))
