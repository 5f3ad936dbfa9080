"""Which worker computes which microbatches of a step. No choice made here can change a bit.

Owns the contiguous ranges: even ones at first, then ranges that follow the workers' measured speeds. Does not measure,
and does not communicate: every worker computes the same ranges from the same integers. Handles no samples.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from heapq import nsmallest
from itertools import accumulate, pairwise
from operator import itemgetter

from unisono.determinism.nodes import nodes

REMEMBERED = 5  # measurements of a worker; their median ignores two outliers
SURE = 8  # medians, after which a pace is used
SMOOTHING = 32  # medians, over which a pace is averaged
JUMP_PERCENT = 25  # when all remembered measurements differ from a pace by more, it is no longer valid
GAIN_PERCENT = 4  # of the step's predicted time, below which no work moves
SLACK_PERCENT = 1  # of the step's predicted time, that may be lost for larger nodes
FOLLOWED = 16  # possible bounds between two workers, while a cut is chosen
MOVE_PARTS = 16  # a bound moves by at most a sixteenth of the microbatches a step (or by 1, if that is more)


def shares(microbatches: int, workers: int) -> list[range]:
    """Cut 0 … microbatches − 1 into one contiguous range per worker, their lengths differing by at most 1.

    Of two possible bounds, the one that starts larger nodes of the tree is taken: fewer nodes travel.
    With more workers than microbatches (a small last step) some ranges are empty.
    """
    short, rest = divmod(microbatches, workers)
    bounds = [0]
    for worker in range(1, workers):
        longer_left = rest - (bounds[-1] - short * (worker - 1))  # ranges that must still be one longer
        bound = bounds[-1] + short
        may_be_longer = longer_left > 0
        must_be_longer = longer_left > workers - worker
        if must_be_longer or (may_be_longer and _trailing_zeros(bound + 1) > _trailing_zeros(bound)):
            bound += 1
        bounds.append(bound)
    bounds.append(microbatches)
    return _ranges(bounds)


class Assignment:
    """The shares of every step, following the workers' speeds. Each worker holds one; all get the same input.

    The workers must agree in every share, or they would wait for each other forever. So all arithmetic here is on
    Python integers, and its only input is the numbers of microbatches and the times, which are the same everywhere.

    The predicted time of a step is the largest number of microbatches · pace of all workers. When the predicted gain of
    the best cut is at least 4 %, it becomes the *target*, and the bounds move there within a few tens of steps. Until
    the paces of all workers are known the shares are even, and so they stay with more workers than microbatches.

    After workers came or went, make a new one.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._paces = [_Pace() for _ in range(workers)]
        self._bounds = [0] * (workers + 1)  # of the largest step so far; smaller ones are cut in proportion
        self._target = self._bounds
        self._even = True
        self._given: list[range] = []
        self._number = 0

    @property
    def number(self) -> int:
        """A digest of the current cut and all before it, in 48 bits: the sum over many workers fits into an int64.

        It differs wherever two histories of cuts differ (except for one chance in 2^48). A smaller last step has no
        number of its own: its shares follow from the current cut.
        """
        return self._number

    def shares(self, microbatches: int) -> list[range]:
        """Cut the next step's 0 … microbatches − 1 into one contiguous range per worker, in the order of ranks.

        No range is empty unless there are more workers than microbatches: an idle worker would never be measured again.
        A second call before `learn` gives the same result.
        """
        if microbatches > self._bounds[-1]:
            target = self._fit(self._target, microbatches)
            self._adopt(self._fit(self._bounds, microbatches))
            self._target = target
        bounds = self._bounds if microbatches == self._bounds[-1] else self._fit(self._bounds, microbatches)
        self._given = _ranges(bounds)
        return list(self._given)

    def learn(self, microseconds: Sequence[int]) -> None:
        """Use the time that each worker computed on its last share, by rank, to cut the next step.

        0 means not measured: an empty share, or a worker that cannot measure.
        """
        for share, pace, time in zip(self._given, self._paces, microseconds, strict=True):
            if time > 0 and len(share):
                pace.measure(time * 1_000_000 // len(share))
        paces = [pace.known for pace in self._paces]
        if self._bounds[-1] >= self._workers > 1 and all(paces):
            self._aim(paces)
            if self._bounds != self._target:
                self._move_bounds()

    def _aim(self, paces: list[int]) -> None:
        """Choose another target if it is faster by enough: the best there is, found by bisecting the step's time.

        In a time t a worker does ⌊t / pace⌋ microbatches, so t is enough if these sum to all of them.
        """
        microbatches = self._bounds[-1]
        predicted = max((b - a) * pace for (a, b), pace in zip(pairwise(self._target), paces, strict=True))
        enough = predicted * (100 - GAIN_PERCENT) // 100
        too_short = max(paces) - 1  # every worker does one
        if enough <= too_short or sum([enough // pace for pace in paces]) < microbatches:
            return
        while enough - too_short > 1 + enough // 1024:
            middle = (enough + too_short) // 2
            if sum([middle // pace for pace in paces]) < microbatches:
                too_short = middle
            else:
                enough = middle
        allowed = enough + enough * SLACK_PERCENT // 100
        self._target = _cut(microbatches, [allowed // pace for pace in paces])

    def _move_bounds(self) -> None:
        """Move every bound towards its target, a little.

        A bound's new place is the median of its target and of the two ends of its path. So no range becomes longer than
        the longer of its old and its target range, nor shorter than the shorter: no step on the way is slower than both
        the one before it and the target, and none leaves a worker idle.
        """
        way = max(1, self._bounds[-1] // MOVE_PARTS)
        self._adopt([min(max(to, at - way), at + way) for at, to in zip(self._bounds, self._target, strict=True)])
        self._even = False

    def _adopt(self, bounds: list[int]) -> None:
        self._bounds = bounds
        history = f"{self._number}: {bounds}".encode()
        self._number = int.from_bytes(hashlib.blake2b(history, digest_size=6).digest(), "big")

    def _fit(self, bounds: list[int], microbatches: int) -> list[int]:
        """The bounds of a step of another size, in proportion."""
        if self._even:
            return [0, *(share.stop for share in shares(microbatches, self._workers))]
        fitted = [0]
        least = int(microbatches >= self._workers)
        for left, bound in zip(range(self._workers - 1, -1, -1), bounds[1:], strict=True):
            nearest = (2 * bound * microbatches + bounds[-1]) // (2 * bounds[-1])
            fitted.append(min(max(nearest, fitted[-1] + least), microbatches - left * least))
        return fitted


class _Pace:
    """A worker's picoseconds per microbatch.

    Each measurement gives the median of the last five, so that a pause or an evaluation does not count (running
    medians: J. W. Tukey, Exploratory Data Analysis, 1977, chapter 7). At first the pace is the mean of these medians,
    later their exponential mean. A median that differs by much is limited to a fixed difference; when all five
    measurements lie far off on one side, the mean starts anew. The pace becomes known when eight medians have entered.
    So the work stays where it is during up to seven slow steps in a row.
    """

    __slots__ = ("_mean", "_medians", "_recent", "known")

    def __init__(self) -> None:
        self.known = 0  # 0: not yet
        self._recent: deque[int] = deque(maxlen=REMEMBERED)
        self._mean = 0
        self._medians = 0

    def measure(self, pace: int) -> None:
        self._recent.append(pace)
        if len(self._recent) < REMEMBERED:
            return
        ordered = sorted(self._recent)
        median = ordered[REMEMBERED // 2]
        far = self._mean * JUMP_PERCENT // 100
        if ordered[-1] < self._mean - far or ordered[0] > self._mean + far:
            self._mean, self._medians = median, 0
        self._medians = min(self._medians + 1, SMOOTHING)
        self._mean += min(max(median - self._mean, -far), far) // self._medians
        if self._medians >= SURE:
            self.known = max(1, self._mean)


def _cut(microbatches: int, most: list[int]) -> list[int]:
    """Bounds that give every worker 1 … most[worker] microbatches, so that few nodes travel.

    Of all paths to a bound the one with the fewest nodes is kept, and of all bounds between two workers only FOLLOWED;
    with no more bounds than that, the cut has the fewest nodes of all.
    """
    most_right_of = [0, *accumulate(reversed(most[1:]))][::-1]
    sent = {0: 0}  # possible ends of the ranges so far → nodes in them
    ways: list[dict[int, int]] = []  # for every worker: possible end of its range → beginning of that range
    for worker, right in enumerate(most_right_of):
        found: dict[int, tuple[int, int]] = {}
        for start, before in sent.items():
            lowest = max(start + 1, microbatches - right)
            highest = min(start + most[worker], microbatches - (len(most) - 1 - worker))
            for stop in range(lowest, highest + 1):
                way = (before + len(nodes(range(start, stop))), start)
                found[stop] = min(found.get(stop, way), way)
        ways.append({stop: start for stop, (_, start) in found.items()})
        sent = dict(nsmallest(FOLLOWED, ((stop, count) for stop, (count, _) in found.items()), key=itemgetter(1, 0)))
    bounds = [microbatches]
    for began in reversed(ways):
        bounds.append(began[bounds[-1]])
    return bounds[::-1]


def _ranges(bounds: list[int]) -> list[range]:
    return [range(a, b) for a, b in pairwise(bounds)]


def _trailing_zeros(number: int) -> int:
    return (number & -number).bit_length() if number else 64
