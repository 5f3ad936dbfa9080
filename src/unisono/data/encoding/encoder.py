"""The interface through which the rest of the package turns texts into numbers.

Owns `Encoder`. `ngrams.py` hashes word n-grams, `tokens.py` uses the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Encoder(Protocol):
    """A pure function from a text to token numbers; it can be saved to a folder and loaded again."""

    vocabulary_size: int
    """Token numbers are below this."""

    padding: int
    """The token number for padding; a text without any token has this one."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one int32 [tokens] array per text, never empty."""
        ...

    def encode_marked(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """As `encode`; and which texts were cut, because they are longer than the encoder's limit: bool [texts]."""
        ...

    def save(self, folder: Path) -> None:
        """Write `encoder.json` (and `tokenizer.json`, where there is one), from which `load_encoder` restores an equal
        encoder."""
        ...
