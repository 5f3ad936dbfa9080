"""Which worker computes which microbatches of a step. No choice made here can change a bit.

Owns the contiguous ranges. Knows counts only, neither samples nor costs.
"""

from __future__ import annotations

from itertools import pairwise


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
    return [range(a, b) for a, b in pairwise(bounds)]


def _trailing_zeros(number: int) -> int:
    return (number & -number).bit_length() if number else 64
