"""The interface through which the order and the feed read samples.

Owns `Source`. `store.py` implements it for encoded text, `columns.py` for data in memory, `items.py` for datasets of
items, `streams.py` for data that can only be read from its beginning.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor


class Source(Protocol):
    """Samples by number, 0 … len − 1. The same numbers give the same tensors in every process."""

    lengths: np.ndarray
    """int32 [samples]: the cost of a sample, in tokens; all ones where every sample costs the same."""

    padded: bool
    """Whether a microbatch is padded to its longest sample: its cost is then samples × longest, else the sum of
    lengths."""

    prefetchable: bool
    """Whether `take` touches no global random generator, so that it may run ahead in a thread. If not, it is called in
    the worker's own thread, or with `train.loader_workers` in processes that are forked for it."""

    sha256: str
    """Hash of the samples' content, for the numerics fingerprint."""

    def __len__(self) -> int: ...

    def take(self, samples: np.ndarray, epoch: int = 0, repeats: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the host tensors of these samples (int64 [n], in the given order) as one microbatch.

        `epoch` and `repeats` matter only to a source that augments at random: its randomness is keyed by (seed, epoch,
        sample, repeat). repeats: int64 [n], how often a sampler has given each of the samples before in this epoch;
        None: never.
        """
        ...
