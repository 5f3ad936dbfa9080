"""What the same bits cost, and what a second worker gains: unisono against itself.

    python benchmarks/promise.py

*An ordinary sum*: the same engine, but each worker adds its contributions as they come, into one buffer, and owners add
one partial sum a worker, as an all-reduce does; the result then depends on the number of workers. *One worker* does all
the work of a step by itself, on one core. *Strangers* are as many single workers at once, each with all the work of a
step, which have nothing in common but the machine: what they gain is what it has to give to two. Runs alternate.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from statistics import mean, median
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


def strangers(workload: Workload) -> float:
    """The seconds of `step.train` on a single worker that has others like it beside it: the mean of them all."""
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(WORKERS, timeout=600), context.SimpleQueue()

    def one() -> None:
        found.put(in_unisono(lambda exchange, memory: train(workload, exchange, memory, barrier.wait), workers=1))

    everybody = [context.Process(target=one) for _ in range(WORKERS)]
    for process in everybody:
        process.start()
    for process in everybody:
        process.join()
        if process.exitcode:
            raise SystemExit("one of the workers beside each other failed")
    return mean(found.get() for _ in everybody)


def compare(workload: Workload) -> dict[str, Cell]:
    """Alternate the four; one row of the table."""
    seconds: dict[str, list[float]] = {"same bits": [], "ordinary sum": [], "one worker": [], "strangers": []}
    for _ in range(REPEATS):
        seconds["same bits"].append(in_unisono(lambda exchange, memory: train(workload, exchange, memory)))
        seconds["ordinary sum"].append(in_unisono(lambda exchange, memory: ordinary(workload, exchange, memory)))
        seconds["one worker"].append(in_unisono(lambda exchange, memory: train(workload, exchange, memory), workers=1))
        seconds["strangers"].append(strangers(workload))
    milliseconds = {name: Spread(values=tuple(v * 1e3 / workload.steps for v in s)) for name, s in seconds.items()}

    def against(other: str, one: str = "same bits", times: int = 1) -> Spread:
        return Spread(values=tuple(times * b / a for a, b in zip(seconds[one], seconds[other], strict=True)))

    print(workload.name, median(against("ordinary sum").values), median(against("one worker").values), file=sys.stderr)
    return {
        "workload": workload.name,
        **{f"{name}, ms a step": value for name, value in milliseconds.items()},
        "ordinary sum / same bits": against("ordinary sum"),
        f"one worker / {WORKERS}": against("one worker"),
        f"{WORKERS} × one worker / {WORKERS} strangers": against("one worker", "strangers", WORKERS),
    }


def main() -> None:
    """Measure all rows."""
    rows = [compare(WORKLOADS[name](precision, microbatches)) for name, precision, microbatches in ROWS]
    title = f"The price of the same bits, {WORKERS} workers with 1 thread each, {REPEATS} rounds in turns"
    record("promise", title, rows)


if __name__ == "__main__":
    main()
