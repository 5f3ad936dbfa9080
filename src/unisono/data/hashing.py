"""Hashing by whole arrays: how bits are spread, and how many texts are hashed at once.

Owns what the hashes of n-grams, of near-duplicates and of the order have in common. It uses integer arithmetic only,
so it is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

PRIME = np.uint64(0x100000001B3)
"""The prime of FNV, with which a polynomial of letters or hashes is made."""

_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(numbers: np.ndarray) -> np.ndarray:
    """Spread every bit of these uint64 over all 64, in place; return them. SplitMix64's finaliser (Steele et al.,
    2014)."""
    numbers ^= numbers >> np.uint64(30)
    numbers *= _MIX_1
    numbers ^= numbers >> np.uint64(27)
    numbers *= _MIX_2
    numbers ^= numbers >> np.uint64(31)
    return numbers


def cut_texts(texts: Sequence[str], *, most_letters: int, most_texts: int) -> Iterator[slice]:
    """Cut texts into runs that are hashed at once: each ends with the text that reaches one of the limits."""
    start = letters = 0
    for number, text in enumerate(texts):
        letters += len(text)
        if letters >= most_letters or number + 1 - start == most_texts:
            yield slice(start, number + 1)
            start, letters = number + 1, 0
    if start < len(texts):
        yield slice(start, len(texts))
