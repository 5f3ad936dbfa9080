"""Which tasks go to workers next, and the handling of tasks that fail.

Owns batches, retries and losses. Reads items only as far ahead as it must; uses workers only through a `Pool`. Its
decisions change how long a call takes, never its result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from unisono.determinism.nodes import Node
from unisono.errors import TaskError, WorkerError
from unisono.parallel.executor import Pool
from unisono.parallel.item_batches import ItemBatch, ItemFault, Outcome

AIM_SECONDS = 0.005
"""How long a batch should take: long compared with sending it, short compared with the wait for an idle worker."""

MOST_TASKS, MOST_BYTES = 4096, 2 << 20  # of a batch
LOSSES = 3
"""The number of workers lost at one task after which it fails: the next worker would be lost, too."""

AHEAD, AHEAD_TASKS, AHEAD_BYTES = 4, 16, 256 << 20
"""How far items are read ahead: this many batches per worker, but at least this many tasks, and at most this many
bytes."""

BARREN_LOSSES = 10
"""The number of workers lost in a row, none of them at a task, at which a call ends: workers cannot run here."""

PATIENCE_SECONDS = 1.0  # between two checks of an idle worker pool; results are received at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A task that has failed for good.

    number: place of its item in the input, from 0. error: in a line. trace: where it was raised; empty if its worker
    was lost.
    """

    number: int
    item: Any
    error: str
    trace: str = ""
    exception: BaseException | None = None

    def as_error(self) -> TaskError:
        """The error that reports this failure."""
        told = f"task {self.number} failed: {self.error}\nits item: {shorten(self.item)}"
        return TaskError(f"{told}\n{self.trace}".rstrip(), self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The final results since the last time: results by number, complete nodes, failures."""

    values: list[tuple[int, Any]]
    nodes: list[tuple[Node, Any]]
    failures: list[Failure]


class Sharing:
    """Gives a call's items to a worker pool.

    `given`: how many items the caller has finished with; it limits how far ahead items are read.
    """

    def __init__(self, pool: Pool, items: Iterable[Any], workers: int, retries: int) -> None:
        self.given = 0
        self.taken = 0
        self.exhausted = False
        self._pool = pool
        self._items = enumerate(items)
        self._workers = workers
        self._retries = retries
        self._again: deque[tuple[int, Any]] = deque()  # to run before new ones
        self._alone: deque[tuple[int, Any]] = deque()  # in a batch of their own: a worker was lost at them
        self._flying: dict[int, dict[int, Any]] = {}  # items by number, by batch
        self._tries: dict[int, int] = {}
        self._losses: dict[int, int] = {}
        self._size = 1
        self._ahead = False
        self._most_ahead = 2 * workers
        self._batches = 0
        self._barren = 0

    def stop_reading(self) -> None:
        """Take no further items."""
        self.exhausted = True

    def settle(self) -> Iterator[Settled]:
        """Yield results as they become final, until all are."""
        while True:
            failures = self._submit()
            if not (self._flying or failures or self._again or self._alone) and self.exhausted:
                return
            settled = Settled(values=[], nodes=[], failures=failures)
            waits = bool(self._flying) and not failures
            for outcome in self._pool.wait(PATIENCE_SECONDS if waits else 0.0):
                self._take(outcome, settled)
            yield settled

    def _submit(self) -> list[Failure]:
        failures: list[Failure] = []
        for _ in range(self._pool.capacity(self._ahead)):
            chosen = self._choose()
            if not chosen:
                break
            self._batches += 1
            batch = ItemBatch(id=self._batches, numbers=list(chosen), items=list(chosen.values()))
            self._flying[batch.id] = chosen
            for fault in self._pool.submit(batch):
                item = chosen.pop(fault.number)
                told = f"its item cannot be sent to a worker: {fault.error}"
                failures.append(_fail(fault, item, told))
        return failures

    def _choose(self) -> dict[int, Any]:
        """The next batch's items, by number."""
        if self._alone:
            return dict([self._alone.popleft()])
        chosen = [self._again.popleft() for _ in range(min(self._size, len(self._again)))]
        room = min(self._size - len(chosen), self._most_ahead - (self.taken - self.given))
        if room > 0 and not self.exhausted:
            new = list(islice(self._items, room))
            self.exhausted = len(new) < room
            self.taken += len(new)
            chosen += new
        return dict(chosen)

    def _take(self, outcome: Outcome, settled: Settled) -> None:
        """Note the outcome of a batch; the rest of it runs again."""
        items = self._flying.pop(outcome.id)
        if outcome.broken:
            raise fail_to_combine(outcome.broken.error, outcome.broken.trace) from outcome.broken.exception
        settled.values.extend(zip(outcome.done, outcome.values, strict=True))
        settled.nodes.extend(outcome.nodes)
        left = {}
        if len(outcome.done) < len(items):
            finished = outcome.numbers
            left = {number: item for number, item in items.items() if number not in finished}
        for fault in outcome.faults:
            self._tries[fault.number] = self._tries.get(fault.number, 0) + 1
            if self._tries[fault.number] > self._retries:
                settled.failures.append(_fail(fault, items[fault.number]))
            else:
                self._alone.append((fault.number, items[fault.number]))
        if outcome.at in left:
            self._lose(outcome, left.pop(outcome.at), settled)
        if outcome.suspect:
            self._alone.extend(left.items())
        else:
            self._again.extendleft(reversed(left.items()))
        blamed = outcome.at >= 0 or outcome.late or outcome.suspect
        self._barren = self._barren + 1 if outcome.loss and not blamed else 0
        if self._barren >= BARREN_LOSSES:
            raise WorkerError(
                f"{self._barren} workers in a row were lost; the last one {outcome.loss}. No task is done."
            )
        if not outcome.loss:
            self._measure(outcome, len(items) - len(left))

    def _lose(self, outcome: Outcome, item: Any, settled: Settled) -> None:
        """A worker ended at a task, or was ended since it took too long."""
        number = outcome.at
        counts, most = (self._tries, self._retries + 1) if outcome.late else (self._losses, LOSSES)
        counts[number] = counts.get(number, 0) + 1
        if counts[number] < most:
            self._alone.append((number, item))
            return
        told = "it took longer than timeout_seconds" if outcome.late else f"its worker {outcome.loss}, {LOSSES} times"
        settled.failures.append(Failure(number=number, item=item, error=told))

    def _measure(self, outcome: Outcome, done: int) -> None:
        """Adapt the size of the next batches to the intended time and size."""
        per_task = max(outcome.seconds / max(done, 1), 1e-7)
        bytes_per_task = max(outcome.bytes_ // max(done, 1), 1)
        by_bytes = MOST_BYTES // bytes_per_task
        wanted = min(int(AIM_SECONDS / per_task), by_bytes, MOST_TASKS, 4 * self._size)
        self._size = max(wanted, 1)
        self._ahead = outcome.seconds < 10 * AIM_SECONDS
        by_batches = max(AHEAD * self._size, AHEAD_TASKS) * self._workers
        self._most_ahead = max(2 * self._workers, min(by_batches, AHEAD_BYTES // bytes_per_task))


def _fail(fault: ItemFault, item: Any, told: str = "") -> Failure:
    return Failure(
        number=fault.number, item=item, error=told or fault.error, trace=fault.trace, exception=fault.exception
    )


def fail_to_combine(error: str, trace: str) -> TaskError:
    """The error for a `combine` that raised: neither quarantine nor a retry helps."""
    return TaskError(f"combine failed: {error}\nIt must take any two results, its own among them.\n{trace}".rstrip())


def shorten(item: Any, most: int = 200) -> str:
    """An item in a line."""
    try:
        told = repr(item)
    except Exception as error:  # noqa: BLE001 - a user's class; its error must not hide the one to report
        told = f"<{type(item).__name__}, whose repr raised {error!r}>"
    told = " ".join(told.split())
    return told if len(told) <= most else f"{told[:most]}… ({len(told)} characters)"
