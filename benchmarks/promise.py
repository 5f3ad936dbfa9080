"""What the same bits cost, and what a second worker gains: unisono against itself.

    python benchmarks/promise.py

*An ordinary sum*: the same engine, but each worker adds its contributions as they come, into one buffer, and owners add
one partial sum a worker, as an all-reduce does; the result then depends on the number of workers. *One worker* does all
the work of a step by itself, on one core. *Strangers* are as many single workers at once, each with all the work of a
step, which have nothing in common but the machine: what they gain is what it has to give to two. And *nobody assists*:
who waits for a late worker computes nothing for it.

All are there at once and take turns of a step or a few, asleep in between: a machine whose speed changes from
minute to minute is compared with itself, each turn with those a few seconds before and after it.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from multiprocessing.connection import wait
from statistics import mean, median
from time import perf_counter
from typing import Any
from unittest.mock import patch

from record import Cell, Spread, record
from step import training
from torch import Tensor
from workloads import WORKLOADS, Workload
from world import WORKERS, in_unisono

from unisono.determinism.nodes import Node
from unisono.engine import reduction
from unisono.exchange import shared_memory as shared
from unisono.exchange.protocol import Exchange

ROUNDS = 30  # a multiple of the sides, so that each goes first as often as the others
TURNS_A_RUN = 8  # a turn is this part of a workload's steps, or a single one
ROWS = (("minilm", "float32", 8), ("transformer", "float32", 8))


Parts = list[Tensor | None]
Engine = Callable[[], AbstractContextManager[None]]
"""Within which the engine is another one."""


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


@contextmanager
def ordinary() -> Iterator[None]:
    """The engine with an ordinary sum."""
    with patch.object(reduction, "Tree", RunningSum), patch.object(reduction, "nodes", one_sum):
        yield


@contextmanager
def unassisted() -> Iterator[None]:
    """The engine without desks."""
    with patch.object(shared, "_can_assist", lambda workers: False):
        yield


def steps_a_turn(workload: Workload) -> int:
    """How many steps a turn takes."""
    return max(1, workload.steps // TURNS_A_RUN)


class Side:
    """Workers of one kind, which train when it is their turn: `runs` separate runs of `workers` each."""

    def __init__(self, workload: Workload, runs: int, workers: int, engine: Engine = nullcontext) -> None:
        self._workload, self._workers, self._everybody = workload, workers, runs * workers
        self._engine = engine
        fork = multiprocessing.get_context("fork")
        self._turn, self._together, self._over = fork.Semaphore(0), fork.Barrier(self._everybody), fork.Event()
        self._found, self._seconds = fork.Pipe(duplex=False)
        self._one_at_a_time = fork.Lock()
        self._runs = [fork.Process(target=self._run) for _ in range(runs)]
        for process in self._runs:
            process.start()

    def take(self) -> float:
        """Have all workers train for a turn; return the mean of the seconds that each took."""
        self._wake()
        return mean(self._handle_messages() for _ in range(self._everybody))

    def end(self) -> None:
        """Send the workers home."""
        self._over.set()
        self._together.abort()
        self._wake()
        for process in self._runs:
            process.join()

    def _wake(self) -> None:
        for _ in range(self._everybody):
            self._turn.release()

    def _handle_messages(self) -> float:
        if self._found not in wait([self._found, *(process.sentinel for process in self._runs)]):
            raise SystemExit("a worker failed")
        return float(self._found.recv())

    def _run(self) -> None:
        with self._engine():
            in_unisono(self._train, self._workers)

    def _train(self, exchange: Exchange, memory: int) -> None:
        """One worker, from its start until it is sent home."""
        with training(self._workload, exchange, memory) as done:
            while self._turn.acquire() and not self._over.is_set():
                self._together.wait()
                started = perf_counter()
                for _ in islice(done, steps_a_turn(self._workload)):
                    pass
                exchange.wait_for_all()
                with self._one_at_a_time:
                    self._seconds.send(perf_counter() - started)


def compare(workload: Workload) -> dict[str, Cell]:
    """Let all take turns; one row of the table."""
    with ExitStack() as ends:

        def side(runs: int, workers: int, engine: Engine = nullcontext) -> Side:
            made = Side(workload, runs, workers, engine)
            ends.callback(made.end)
            return made

        sides = {
            "same bits": side(1, WORKERS),
            "ordinary sum": side(1, WORKERS, ordinary),
            "nobody assists": side(1, WORKERS, unassisted),
            "one worker": side(1, 1),
            "strangers": side(WORKERS, 1),
        }
        for made in sides.values():
            made.take()  # warm up
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        names = list(sides)
        for number in range(ROUNDS):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(sides[name].take())
    return in_a_row(workload, seconds)


def in_a_row(workload: Workload, seconds: dict[str, list[float]]) -> dict[str, Cell]:
    """The table's row, from each side's seconds a turn."""
    steps = steps_a_turn(workload)
    milliseconds = {name: Spread(values=tuple(v * 1e3 / steps for v in s)) for name, s in seconds.items()}

    def against(other: str, one: str = "same bits", times: int = 1) -> Spread:
        return Spread(values=tuple(times * b / a for a, b in zip(seconds[one], seconds[other], strict=True)))

    print(workload.name, median(against("ordinary sum").values), median(against("one worker").values), file=sys.stderr)
    return {
        "workload": workload.name,
        **{f"{name}, ms a step": value for name, value in milliseconds.items()},
        "ordinary sum / same bits": against("ordinary sum"),
        "nobody assists / same bits": against("nobody assists"),
        f"one worker / {WORKERS}": against("one worker"),
        f"{WORKERS} × one worker / {WORKERS} strangers": against("one worker", "strangers", WORKERS),
    }


def main() -> None:
    """Measure all rows."""
    rows = [compare(WORKLOADS[name](precision, microbatches)) for name, precision, microbatches in ROWS]
    title = f"The price of the same bits, {WORKERS} workers with 1 thread each, {ROUNDS} rounds of turns"
    record("promise", title, rows)


if __name__ == "__main__":
    main()
