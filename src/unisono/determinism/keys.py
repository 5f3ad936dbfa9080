"""Randomness that is keyed, never streamed: a seed for each (seed, purpose, numbers).

Owns the key and the seeding of torch's, NumPy's and Python's global generators. Keeps no generator of its own.
"""

from __future__ import annotations

import hashlib
import random
import sys

import numpy as np


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed, equal only for equal arguments, except for a chance of 2^-63 (SHA-256 of them all)."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_all(key: int) -> None:
    """Seed every global generator (torch's where it is imported, CUDA's where it is in use) from one key."""
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(key)  # torch.manual_seed takes ten times as long, because of unused devices
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    random.seed(key)
