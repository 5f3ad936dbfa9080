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
from typing import Any
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
        self._engine: Any = combine.__self__  # type: ignore[attr-defined]
        self._sum: Parts = []

    def add(self, node: Node, value: Parts) -> None:
        """Add a microbatch's contribution."""
        share = self._engine.shares[self._engine._exchange.rank]
        if node.index > share.start:
            parent = one_sum(share)[0] if node.index == share.stop - 1 else Node(-1, 0)
            value = self._combine(parent, self._sum, value)
        self._sum = value

    def clear(self) -> None:
        """Begin anew."""
        self._sum = []


def one_sum(share: range) -> list[Node]:
    """What a worker passes on; no two are siblings, so they are added one after another."""
    return [Node(1, 2 * share.start) if len(share) > 1 else Node(0, share.start)] if share else []


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
