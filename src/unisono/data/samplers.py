"""Samplers: which samples an epoch visits, where a user chooses other than each sample once.

Owns the weighted sampler, and the checks on any sampler: a pure function of (seed, epoch) with as many samples in every
epoch. `order.py` owns the place of each sample in the epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from unisono.data.hashing import mix
from unisono.determinism import keys
from unisono.errors import DataError

Sampler = Callable[[int, int], np.ndarray]
"""(seed, epoch) → int64 [samples per epoch], the numbers of the samples in the order in which they are trained on."""

KEPT_EPOCHS = 2  # a step at an epoch's end is loaded together with one at the next epoch's beginning
ALLOWED = (
    "allowed is unisono.weighted(weights), or a function (seed, epoch) → one-dimensional int64 array of sample numbers"
)


@dataclass(frozen=True, slots=True)
class Weighted:
    """A sampler that gives sample i in proportion to its weight: see `weighted`.

    weights: float64 [samples]. samples_per_epoch: how many an epoch has.
    """

    weights: np.ndarray
    samples_per_epoch: int

    def __call__(self, seed: int, epoch: int) -> np.ndarray:
        """Return the samples of an epoch, int64 [samples_per_epoch].

        Systematic sampling: the weights stand side by side in a random order, with points at equal distances over them.
        """
        key = np.uint64(keys.key(seed, "weighted", epoch))
        shuffled = np.argsort(_draw(key, len(self.weights)), kind="stable")
        ends = np.cumsum(self.weights[shuffled])
        ends *= self.samples_per_epoch / ends[-1]
        first = (float(keys.key(seed, "weighted, first", epoch) >> 31) + 0.5) / 2**32  # in (0, 1)
        places = np.searchsorted(ends, first + np.arange(self.samples_per_epoch), side="right")
        last = np.flatnonzero(self.weights[shuffled])[-1]  # rounding must not exceed it
        chosen = shuffled[np.minimum(places, last)]
        return chosen[np.argsort(_draw(~key, len(chosen)), kind="stable")].astype(np.int64)


def _draw(key: np.uint64, count: int) -> np.ndarray:
    """Random uint64 numbers: SplitMix64 from `key`."""
    return mix(key + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def weighted(weights: Any, samples_per_epoch: int | None = None) -> Weighted:
    """Make a sampler that gives samples in proportion to their weights.

    With n samples per epoch, sample i is given n · weight / sum of weights times an epoch, rounded down or up (which of
    both is drawn anew each epoch, so that the mean is exact). A weight of 0 leaves a sample out. The same sample given
    twice is augmented differently.

    Args:
        weights: one number per sample, at least 0; for balanced classes: 1 / how often the sample's class occurs.
        samples_per_epoch: None: as many as there are weights.

    Raises:
        DataError: a weight is negative or no number, all are 0, or an epoch would have no sample.
    """
    found = np.array(weights, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise DataError(f"weighted: weights of shape {found.shape}; allowed is one number per sample.")
    if wrong := np.flatnonzero(~(np.isfinite(found) & (found >= 0))).tolist():
        raise DataError(
            f"weighted: the weight of sample {wrong[0]} is {found[wrong[0]]}; allowed are finite numbers from 0. "
            f"{len(wrong):,} of {len(found):,} are not."
        )
    if not found.any():
        raise DataError("weighted: all weights are 0, so no sample could be drawn. Give at least one that is more.")
    count = len(found) if samples_per_epoch is None else samples_per_epoch
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DataError(f"weighted: samples_per_epoch = {count!r}; allowed are whole numbers from 1.")
    found.flags.writeable = False
    return Weighted(found, count)


class EpochSamples:
    """The samples of every epoch, as a sampler gives them for a source of `samples`: checked, the newest ones kept.

    Before each call the global generators are seeded from (seed, epoch), so a sampler may draw from them.

    per_epoch: how many samples an epoch has. sha256: of those of the first epoch, for the numerics fingerprint.
    """

    def __init__(self, sampler: Sampler, samples: int, seed: int) -> None:
        if not callable(sampler):
            raise DataError(f"sampler is {type(sampler).__name__}; {ALLOWED}.")
        self._sampler = sampler
        self._samples = samples
        self._seed = seed
        self._kept: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        if isinstance(sampler, Weighted) and len(sampler.weights) != samples:
            raise DataError(
                f"sampler: weighted has {len(sampler.weights):,} weights, and the data {samples:,} samples. Give one "
                "weight per sample, in their order."
            )
        first = self._ask(0)
        self.per_epoch = len(first)
        self.sha256 = hashlib.sha256(first.astype("<i8").tobytes()).hexdigest()
        self._ask(1)
        self._compare(0, first)

    def _compare(self, epoch: int, first: np.ndarray) -> None:
        if not np.array_equal(first, self._ask(epoch)):
            raise DataError(
                f"sampler: asked twice for epoch {epoch}, it gave other samples the second time. It must depend on "
                "(seed, epoch) alone: keep no position and no generator in it, or make the generator anew from both "
                "(numpy.random.default_rng((seed, epoch)))."
            )

    def of(self, epoch: int) -> np.ndarray:
        """The samples of an epoch, int64 [per_epoch]."""
        return self._look_up(epoch)[0]

    def repeats(self, epoch: int) -> np.ndarray | None:
        """How often each sample was given before in the epoch, int64 [per_epoch]; None: each is given once."""
        return self._look_up(epoch)[1]

    def _look_up(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        if epoch not in self._kept:
            while len(self._kept) >= KEPT_EPOCHS:
                self._kept.pop(min(self._kept))
            found = self._ask(epoch)
            self._compare(epoch, found)
            self._kept[epoch] = found, count_repeats(found)
        return self._kept[epoch]

    def _ask(self, epoch: int) -> np.ndarray:
        keys.seed_all(keys.key(self._seed, "sampler", epoch))
        try:
            given = self._sampler(self._seed, epoch)
        except TypeError as error:
            raise DataError(f"sampler cannot be called with (seed, epoch): {error}; {ALLOWED}.") from error
        found = np.asarray(given)
        if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
            raise DataError(
                f"sampler gave for epoch {epoch} {found.dtype} numbers of shape {found.shape}; {ALLOWED}, not empty."
            )
        if len(outside := np.flatnonzero((found < 0) | (found >= self._samples))):
            raise DataError(
                f"sampler gave sample {found[outside[0]]} at place {outside[0]} of epoch {epoch}; allowed are 0 to "
                f"{self._samples - 1}, the numbers of the training samples."
            )
        if epoch and len(found) != self.per_epoch:
            raise DataError(
                f"sampler gave {len(found):,} samples for epoch {epoch} and {self.per_epoch:,} for epoch 0; allowed "
                "is one number for all epochs, since it decides the number of steps."
            )
        return found.astype(np.int64)


def count_repeats(samples: np.ndarray) -> np.ndarray | None:
    """How often each of these numbers occurs before its place, int64 of the same shape; None: all of them differ."""
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]]
    if begins.all():
        return None
    places = np.arange(len(samples))
    found = np.empty(len(samples), np.int64)
    found[order] = places - np.maximum.accumulate(np.where(begins, places, 0))
    return found
