"""Tasks of a call: what a task is, what it returns, and how a batch of tasks is run, by any engine.

Owns a task's random key, and that every error is reported with the task's number. Depends on no engine.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

import numpy.random  # noqa: F401 - NumPy imports it at its first use, which would be in each worker
from threadpoolctl import threadpool_limits

from unisono.determinism import keys
from unisono.determinism.nodes import Node
from unisono.errors import ParallelError

SECONDS_PER_BATCH = 0.05
"""A batch that runs longer is given back: other workers may be free for the rest of its tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapJob:
    """What all tasks of a call have in common.

    combine: combines two results, where the call returns one result for all items.
    seed: with a task's number it gives the task's random key; None: generators are left alone.
    """

    function: Callable[[Any], Any]
    combine: Callable[[Any, Any], Any] | None = None
    seed: int | None = 0
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemBatch:
    """Some tasks for one worker: items and their numbers, rising."""

    id: int
    numbers: Sequence[int]
    items: Sequence[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemFault:
    """An error that a task raised: its text, its traceback, and the exception itself where it can be sent."""

    number: int
    error: str
    trace: str
    exception: BaseException | None = None


@dataclass(slots=True, kw_only=True)
class Outcome:
    """The outcome of a batch.

    done, values: tasks and their results; none where results are combined.
    nodes: complete nodes of the tree over the tasks' numbers, where results are combined.
    faults: tasks that raised. Numbers that are in none of these must run again: their worker was lost, or had
    worked long enough.
    broken: the error that `combine` raised; the call cannot go on.
    loss, at: how the worker was lost, and the number of the task that it ran (−1: none). suspect: it was running
    one of them, and it is unknown which. late: it was ended, since the task took too long.
    seconds: of work. bytes_: sent, both ways.
    """

    id: int
    done: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    nodes: list[tuple[Node, Any]] = field(default_factory=list)
    faults: list[ItemFault] = field(default_factory=list)
    broken: ItemFault | None = None
    loss: str = ""
    at: int = -1
    suspect: bool = False
    late: bool = False
    seconds: float = 0.0
    bytes_: int = 0

    @property
    def numbers(self) -> set[int]:
        """The tasks that have a result or a fault."""
        done = {*self.done, *(fault.number for fault in self.faults)}
        for node, _ in self.nodes:
            done.update(range(node.index << node.level, (node.index + 1) << node.level))
        return done


_current: list[int] = []  # the random key of the task at work


def key() -> int:
    """Return the random key of the task at work, a 63-bit integer: equal for equal (seed, number of the task) only.

    `numpy.random.default_rng(key())` is the task's own generator. The global generators of `random`, NumPy and torch
    are seeded from the same key before each task.

    Raises:
        ParallelError: no task is at work here, or the call's seed is None.
    """
    if not _current:
        raise ParallelError("there is no random key here. Call key() within a task of map or map_reduce with a seed.")
    return _current[0]


def settle(threads: int) -> None:
    """A new worker calls it: set the number of kernels' threads, in libraries that are loaded now or later; let torch
    be seeded when it is imported; forget the task that was running in the process from which it was forked."""
    _current.clear()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    threadpool_limits(threads)
    sys.meta_path.insert(0, SeedTorch())


def run(
    job: MapJob, batch: ItemBatch, board: MutableSequence[int] | memoryview, send: Callable[[Any], None]
) -> Outcome:
    """Run a batch's tasks one after the other, until they have taken long enough.

    `board` holds the number of the running task, and its start (nanoseconds); at the end −1. `send` takes each
    result as soon as it exists: a function may use the same memory for the next one. It raises if it cannot send;
    where results are combined, it is not called.
    """
    outcome = Outcome(id=batch.id)
    function, combine, seed = job.function, job.combine, job.seed
    clock = time.monotonic_ns
    now = started = clock()
    latest = started + int(SECONDS_PER_BATCH * 1e9)
    for number, item in zip(batch.numbers, batch.items, strict=True):
        board[1] = now
        board[0] = number
        if seed is not None:
            _current[:] = [keys.key(seed, "task", number)]
            keys.seed_all(_current[0])
        try:
            value = function(item)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - reports whatever a user's function raises, with its item
            outcome.faults.append(describe(number, error))
        else:
            _keep(outcome, number, value, combine, send)
        now = clock()
        if now > latest or outcome.broken:
            break
    board[0] = -1
    _current.clear()
    outcome.seconds = (now - started) / 1e9
    return outcome


def describe(number: int, error: BaseException) -> ItemFault:
    """A task's error as a report."""
    told = "".join(traceback.format_exception_only(error)).strip()
    return ItemFault(number=number, error=told, trace="".join(traceback.format_exception(error)), exception=error)


def _keep(
    outcome: Outcome,
    number: int,
    value: Any,
    combine: Callable[[Any, Any], Any] | None,
    send: Callable[[Any], None],
) -> None:
    """Send a result, or combine it with those before it."""
    if combine is not None:
        outcome.nodes.append((Node(0, number), value))
        outcome.broken = _combine(outcome.nodes, combine)
        return
    try:
        send(value)
    except Exception as error:  # noqa: BLE001 - a user's class
        told = f"its result cannot be sent: {error}"
        outcome.faults.append(ItemFault(number=number, error=told, trace=told))
    else:
        outcome.done.append(number)


def _combine(nodes: list[tuple[Node, Any]], combine: Callable[[Any, Any], Any]) -> ItemFault | None:
    """Combine siblings at the end of complete nodes, while there are any. Returns the error that `combine` raised."""
    while len(nodes) > 1 and nodes[-2][0].is_left_of(nodes[-1][0]):
        (left, a), (_, b) = nodes[-2:]
        try:
            nodes[-2:] = [(left.parent, combine(a, b))]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a user's function
            return describe(left.index << left.level, error)
    return None


class SeedTorch(MetaPathFinder):
    """Seeds torch's generator when a task imports torch first: otherwise the task's result would depend on whether its
    worker had imported it for an earlier one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find torch as the other finders do, and seed it once it is imported."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def seeded(module: Any) -> None:
                execute(module)
                if _current:
                    module.default_generator.manual_seed(_current[0])

            spec.loader.exec_module = seeded  # type: ignore[method-assign]
        return spec
