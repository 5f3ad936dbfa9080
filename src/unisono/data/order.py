"""Which samples each step's microbatches hold: a pure function of (seed, samples' lengths, sizes, step).

Owns the shuffle and the cut of a step into microbatches. It gets no facts about workers, so it cannot depend on them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from unisono.data.hashing import mix
from unisono.data.samplers import EpochSamples

KEPT_STEPS = 32
"""The number of steps that are remembered: the feed reads some while the steps before are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update of the weights: its number from 0, its epoch, and the sample numbers (int64) of each microbatch.

    repeats: how often a sampler gave each sample before in the epoch, int64 of the same shapes; None: never.
    """

    number: int
    epoch: int
    microbatches: tuple[np.ndarray, ...]
    repeats: tuple[np.ndarray, ...] | None = None

    @property
    def samples(self) -> int:
        return sum(len(input_split) for input_split in self.microbatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The order of all training: every sample exactly once an epoch, in a new permutation each epoch.

    lengths (int32 [samples]), padded: those of a `Source`.
    min_samples: the least number of samples in a microbatch, where a step allows it: 2 for a module whose BatchNorm
        compares samples. A step is cut into fewer microbatches where one would have less, and an epoch's last step that
        has less joins the step before.
    drop_last: leave out the last step of an epoch where it is smaller than the others.
    sampled: the samples of each epoch, instead of the permutation.
    shuffled: false: no permutation; sample i is at place i, as in a stream.
    """

    lengths: np.ndarray
    padded: bool
    samples_per_step: int
    microbatches: int
    seed: int
    total_steps: int
    min_samples: int = 1
    drop_last: bool = False
    sampled: EpochSamples | None = None
    shuffled: bool = True
    _recent: dict[int, Step] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def samples_per_epoch(self) -> int:
        return len(self.lengths) if self.sampled is None else self.sampled.per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return cut_epoch(
            self.samples_per_epoch, self.samples_per_step, drop_last=self.drop_last, min_samples=self.min_samples
        )

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Yield the steps from `start` to the end of training."""
        for number in range(start, self.total_steps):
            yield self.step(number)

    def step(self, number: int) -> Step:
        """Return step `number`. The last step of an epoch may be smaller; no microbatch is ever empty."""
        if number not in self._recent:
            while len(self._recent) >= KEPT_STEPS:
                self._recent.pop(next(iter(self._recent)))
            self._recent[number] = self._make(number)
        return self._recent[number]

    def _make(self, number: int) -> Step:
        epoch, within = divmod(number, self.steps_per_epoch)
        first = within * self.samples_per_step
        is_last = within == self.steps_per_epoch - 1 and not self.drop_last
        end = self.samples_per_epoch if is_last else first + self.samples_per_step
        repeats = None
        if self.sampled is not None:
            samples = self.sampled.of(epoch)[first:end]
            repeated = self.sampled.repeats(epoch)
            repeats = None if repeated is None else repeated[first:end]
        elif self.shuffled:
            positions = np.arange(first, end, dtype=np.uint64)
            samples = permute(positions, size=len(self.lengths), key=(self.seed, epoch)).astype(np.int64)
        else:
            samples = np.arange(first, end, dtype=np.int64)
        parts = self._cut(samples)
        return Step(
            number=number,
            epoch=epoch,
            microbatches=tuple(samples[part] for part in parts),
            repeats=None if repeats is None else tuple(repeats[part] for part in parts),
        )

    def _cut(self, samples: np.ndarray) -> list[np.ndarray]:
        """The places, among `samples`, of each microbatch's samples."""
        lengths = np.maximum(self.lengths[samples], 1)
        longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
        pieces = min(self.microbatches, len(samples))
        parts = cut(lengths[longest_first], pieces, padded=self.padded)
        while pieces > 1 and min(map(len, parts)) < self.min_samples:
            pieces = min(pieces - 1, max(len(samples) // self.min_samples, 1))
            parts = cut(lengths[longest_first], pieces, padded=self.padded)
        return [longest_first[part] for part in parts]


def cut_epoch(samples: int, samples_per_step: int, *, drop_last: bool = False, min_samples: int = 1) -> int:
    """Number of steps in an epoch. samples_per_step is the global batch size; drop_last and min_samples are as in
    `Order`. 0: all samples would be dropped."""
    whole, rest = divmod(samples, samples_per_step)
    return whole if not rest or drop_last or (whole and rest < min_samples) else whole + 1


def count_steps(
    samples: int,
    samples_per_step: int,
    epochs: float,
    max_steps: int = 0,
    *,
    drop_last: bool = False,
    min_samples: int = 1,
) -> int:
    """Number of steps in `epochs` passes (a fraction rounds up), at most `max_steps` where that is not 0."""
    steps_per_epoch = cut_epoch(samples, samples_per_step, drop_last=drop_last, min_samples=min_samples)
    total = math.ceil(steps_per_epoch * epochs)
    return min(total, max_steps) if max_steps else total


def cut(lengths: np.ndarray, pieces: int, *, padded: bool) -> list[np.ndarray]:
    """Divide lengths (positive, falling) into non-empty parts of nearly equal cost; return each part's places, rising.

    A padded part costs its number of samples times its longest, so it takes neighbours. A ragged part costs the sum of
    its lengths, and more the longer they are, so it takes some of the longest and some of the shortest.
    """
    if not padded:
        return _cut_from_both_ends(lengths, pieces)
    bounds = [0]
    for number, bound in enumerate(_equal_rectangles(lengths.tolist(), pieces), start=1):
        bounds.append(min(max(round(bound), bounds[-1] + 1), len(lengths) - (pieces - number)))
    bounds.append(len(lengths))
    return [np.arange(bounds[rank], bounds[rank + 1]) for rank in outside_in(pieces)]


def outside_in(pieces: int) -> list[int]:
    """The numbers 0 … pieces − 1 in the order first, last, second, second to last …

    Rectangles of equal predicted cost still differ in true cost, and steadily from the longest samples to the shortest.
    In this order neighbours make up for each other, so contiguous shares of a step take equally long.
    """
    return [rank for low in range((pieces + 1) // 2) for rank in dict.fromkeys((low, pieces - 1 - low))]


_TRIED = range(-2, 3)  # the numbers of long samples tried, relative to those that make half a share


def _cut_from_both_ends(lengths: np.ndarray, pieces: int) -> list[np.ndarray]:
    """Half of a part's cost comes from the longest samples that are left, the rest from the shortest.

    Whole samples do not add up to an even share, so several numbers of long ones are tried, each with as many short
    ones as fit. The cost of the first 1, 2, 3 … parts is made even, so contiguous shares of a step are even, too.
    """
    total = [0, *np.cumsum(lengths, dtype=np.int64).tolist()]
    first, last = 0, len(lengths)
    parts = []
    for input_split in range(1, pieces):
        wanted = total[-1] * input_split / pieces  # of the first `input_split` parts
        later = pieces - input_split  # parts that need at least one sample each
        half = bisect_left(total, wanted / 2)
        tried = []  # how far off, start, end
        for more in _TRIED:
            start = min(max(half + more, first + 1), last - later)
            end = min(max(round(_place(total, total[-1] + total[start] - wanted)), start + later), last)
            tried.append((abs(total[start] + total[-1] - total[end] - wanted), start, end))
        _, start, end = min(tried)
        parts.append(np.r_[first:start, end:last])
        first, last = start, end
    return [*parts, np.arange(first, last)]


def _place(rising: list[int], value: float) -> float:
    """The position of a value among these numbers, not below the first: np.interp, faster for a single value."""
    after = bisect_right(rising, value)
    if after == len(rising):
        return after - 1
    low, high = rising[after - 1], rising[after]
    return 1 / (high - low) * (value - low) + (after - 1)


def _equal_rectangles(lengths: list[int], pieces: int) -> list[float]:
    """Real-valued inner bounds at which every part, padded to its first length, costs the same (bisection on the
    cost). Where a bound jumps over the next length as the cost rises, the last part costs less."""

    def walk(cost: float) -> list[float]:
        bounds, position = [], 0.0
        for _ in range(pieces):
            position += cost / lengths[min(int(position), len(lengths) - 1)]
            bounds.append(position)
        return bounds

    low, high = 0.0, float(len(lengths) * lengths[0])
    for _ in range(40):
        cost = (low + high) / 2
        if walk(cost)[-1] < len(lengths):
            low = cost
        else:
            high = cost
    return walk(high)[:-1]


def permute(positions: np.ndarray, *, size: int, key: tuple[int, int]) -> np.ndarray:
    """Map positions (uint64, each < size) one to one onto 0 … size − 1, without state and in O(1) each.

    A Feistel network of six rounds over the next even power of two; a result outside `size` goes on along its cycle
    (Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, 2002). The round function is splitmix64's finaliser.
    """
    half = np.uint64(max(1, math.ceil(math.log2(max(size, 2)) / 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = _keys_of_rounds(*key)

    def once(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & mask
        for turn in keys:
            left, right = right, left ^ (_mix(right ^ turn) & mask)
        return (left << half) | right

    values = once(positions.astype(np.uint64))
    while (outside := values >= size).any():
        values[outside] = once(values[outside])
    return values


@lru_cache
def _keys_of_rounds(seed: int, epoch: int) -> list[np.ndarray]:
    numbers, epochs = (np.array([number % 2**64], np.uint64) for number in (seed, epoch))
    return [_mix(_mix(numbers + np.uint64(turn)) ^ _mix(epochs)) for turn in range(1, 7)]


def _mix(values: np.ndarray) -> np.ndarray:
    return mix(values + np.uint64(0x9E3779B97F4A7C15))
