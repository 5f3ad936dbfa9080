"""How texts become numbers, as the rest of the house sees it.

Owns the interface `Encoder`. `data/ngrams.py` hashes word n-grams, `data/tokens.py` uses the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Encoder(Protocol):
    """A pure function from a text to token numbers, that can be kept in a folder and read back."""

    vocabulary_size: int
    """Token numbers are below this."""

    padding: int
    """Token number that stands for nothing; a text without a token has this one."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one int32 [tokens] array per text, never empty."""
        ...

    def save(self, folder: Path) -> None:
        """Write `encoder.json` (and `tokenizer.json`, where there is one), from which `load_encoder` restores an equal
        encoder."""
        ...
