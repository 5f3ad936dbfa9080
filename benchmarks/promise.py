"""What the same bits cost, and what a second worker gains: unisono against itself.

    python benchmarks/promise.py

*An ordinary sum*: the same engine, but each worker adds its contributions as they come, into one buffer, and owners add
one partial sum a worker, as an all-reduce does; the result then depends on the number of workers. *One worker* does all
the work of a step by itself, on one core. Runs alternate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

from record import Cell, Spread, record
from step import train
from torch import Tensor
from workloads import WORKLOADS, Workload
from world import WORKERS, in_unisono

from unisono.engine import reduction
from unisono.exchange.protocol import Exchange
from unisono.nodes import Node

REPEATS = 5
ROWS = (("minilm", "float32", 8), ("transformer", "float32", 8))


Parts = list[Tensor | None]


class RunningSum:
    """Takes the place of a worker's tree: one sum, to which every contribution is added; the last addition goes where
    others read, as the tree's does."""

    def __init__(self, combine: Callable[[Node, Parts, Parts], Parts]) -> None:
        self._combine = combine
        self.clear()

    def add(self, number: int, value: Parts) -> None:
        """Add microbatch `number`'s contribution, or rather the one before it."""
        if self._first < 0:
            self._first, self._sum = number, value
            return
        if self._last:
            self._sum = self._combine(Node(-1, 0), self._sum, self._last)
        self._last = value

    @property
    def pending(self) -> list[tuple[Node, Parts]]:
        """The whole sum."""
        if self._first < 0:
            return []
        node = Node(1 if self._last else 0, 2 * self._first)
        if self._last:
            self._sum, self._last = self._combine(node, self._sum, self._last), []
        return [(node, self._sum)]

    def clear(self) -> None:
        """Begin anew."""
        self._first = -1
        self._sum: Parts = []
        self._last: Parts = []


def one_sum(share: range) -> list[Node]:
    """What a worker passes on; no two are siblings, so they are added one after another."""
    return [Node(1 if len(share) > 1 else 0, 2 * share.start)] if share else []


def ordinary(workload: Workload, exchange: Exchange, memory: int) -> float:
    """`step.train` with an ordinary sum."""
    with patch.object(reduction, "Tree", RunningSum), patch.object(reduction, "nodes", one_sum):
        return train(workload, exchange, memory)


def compare(workload: Workload) -> dict[str, Cell]:
    """Alternate the three; one row of the table."""
    seconds: dict[str, list[float]] = {"same bits": [], "ordinary sum": [], "one worker": []}
    for _ in range(REPEATS):
        seconds["same bits"].append(in_unisono(lambda exchange, memory: train(workload, exchange, memory)))
        seconds["ordinary sum"].append(in_unisono(lambda exchange, memory: ordinary(workload, exchange, memory)))
        seconds["one worker"].append(in_unisono(lambda exchange, memory: train(workload, exchange, memory), workers=1))
    milliseconds = {name: Spread(values=tuple(v * 1e3 / workload.steps for v in s)) for name, s in seconds.items()}

    def against(other: str) -> Spread:
        return Spread(values=tuple(b / a for a, b in zip(seconds["same bits"], seconds[other], strict=True)))

    print(workload.name, median(against("ordinary sum").values), median(against("one worker").values), file=sys.stderr)
    return {
        "workload": workload.name,
        **{f"{name}, ms a step": value for name, value in milliseconds.items()},
        "ordinary sum / same bits": against("ordinary sum"),
        f"one worker / {WORKERS}": against("one worker"),
    }


def main() -> None:
    """Measure all rows."""
    rows = [compare(WORKLOADS[name](precision, microbatches)) for name, precision, microbatches in ROWS]
    title = f"The price of the same bits, {WORKERS} workers with 1 thread each, {REPEATS} rounds in turns"
    record("promise", title, rows)


if __name__ == "__main__":
    main()
