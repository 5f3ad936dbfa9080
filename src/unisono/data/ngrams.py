"""Texts as bags of hashed word n-grams.

Owns what a word is, how words and runs of words are hashed into buckets, and how that is kept in a folder.
Knows nothing of tokenizers, of models, or of what a bucket means to them.

A feature's number is decided by the text and the settings alone, on every machine and in every process: the
hashes are BLAKE2b and integer arithmetic, never Python's salted `hash`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np

from unisono.errors import DataError, ModelError

KIND = "ngrams"

# Scripts written without spaces: each character is a word, and n-grams then find the real words.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # kana, Han
)
# Vowel signs and accents, which `\w` leaves out, so that Hindi, Hebrew or Arabic words are not cut at them.
_MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(rf"[^\W{_ALONE}]+(?:[{_MARKS}]+[^\W{_ALONE}]*)*|[{_ALONE}]")

_EMPTY = 0  # the bucket of a text without words; no n-gram is hashed into it
_PRIME = np.uint64(0x100000001B3)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class NGrams:
    """A pure function from a text to the buckets of its words and runs of words.

    Args:
        words: longer texts are cut after so many words.
        order: longest run of words that is one feature; runs of 1, 2, … order words all are features.
        buckets: how many features there are; bucket 0 is that of a text without words.
        lowercase: whether `The` and `the` are one word.
        prefix: first letters of a word that are a feature as well: `vote` and `voted` share one; 0: none.
    """

    padding = _EMPTY

    def __init__(self, *, words: int, order: int, buckets: int, lowercase: bool, prefix: int = 0) -> None:
        if words < 1 or order < 1 or prefix < 0 or not 2 <= buckets < 2**31:
            raise DataError(
                f"n-grams of words={words}, order={order}, prefix={prefix}, buckets={buckets}: allowed are "
                f"words and order from 1, prefix from 0, buckets from 2 to 2147483647. See [encode]."
            )
        self.words = words
        self.order = order
        self.vocabulary_size = buckets
        self.lowercase = lowercase
        self.prefix = prefix

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one int32 [features] array per text, never empty: its distinct buckets, ascending."""
        words, prefixes = _Hashes(), _Hashes(self.prefix)
        return [self._buckets(self._split(text), words, prefixes) for text in texts]

    def save(self, folder: Path) -> None:
        """Write `encoder.json`, whose fields `NGrams.load` takes."""
        fields = {
            "kind": KIND,
            "words": self.words,
            "order": self.order,
            "buckets": self.vocabulary_size,
            "lowercase": self.lowercase,
            "prefix": self.prefix,
        }
        (folder / "encoder.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, fields: Mapping[str, Any]) -> Self:
        """Make the encoder that `save` described.

        Raises:
            ModelError: a field is missing, or they are of another kind of encoder.
        """
        names = {"words": int, "order": int, "buckets": int, "lowercase": bool, "prefix": int}
        wrong = [name for name, kind in names.items() if type(fields.get(name)) is not kind]
        if fields.get("kind") != KIND or wrong:
            raise ModelError(
                f"encoder.json: kind {fields.get('kind')!r}, unusable fields {wrong}; allowed is kind "
                f"{KIND!r} with {', '.join(names)}. Prepare the data again, or restore the file."
            )
        return cls(**{name: fields[name] for name in names})

    def _split(self, text: str) -> list[str]:
        return _WORD.findall(text.lower() if self.lowercase else text)[: self.words]

    def _buckets(self, words: list[str], hashes: _Hashes, prefixes: _Hashes) -> np.ndarray:
        if not words:
            return np.array([_EMPTY], np.int32)
        single = runs = hashes.of(words)
        found = [single]
        for length in range(2, min(self.order, len(words)) + 1):
            runs = _mix(runs[:-1] * _PRIME + single[length - 1 :])
            found.append(runs)
        if self.prefix:
            found.append(prefixes.of(words))
        buckets = np.concatenate(found) % np.uint64(self.vocabulary_size - 1)
        return np.unique(buckets.astype(np.int32)) + np.int32(1)


class _Hashes(dict[str, int]):
    """Word → 64-bit hash of it, or of its prefix, computed when first asked for: words repeat."""

    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.prefix = prefix

    def __missing__(self, word: str) -> int:
        spelt = f"<{word[: self.prefix]}" if self.prefix else word  # no word has a `<` in it
        digest = blake2b(spelt.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = self[word] = int.from_bytes(digest, "little")
        return number

    def of(self, words: list[str]) -> np.ndarray:
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def _mix(numbers: np.ndarray) -> np.ndarray:
    """Spread every bit over all 64; uint64 in and out. SplitMix64's finaliser (Steele et al., 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX_2
    return numbers ^ (numbers >> np.uint64(31))
