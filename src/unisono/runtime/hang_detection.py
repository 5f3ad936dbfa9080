"""Which workers hang: a pure function of the rows of the progress table, and the supervisor's use of it.

A worker that waits in an exchange is excused while another has not come to it. So the function finds the worker that
the others wait for, not the waiting ones. Owns the rule, the deadline, and the folder with all workers' stacks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from unisono.processes.progress_table import ProgressTable, Row
from unisono.runtime.worker_pool import WorkerHandle, WorkerPool

PATIENCE = {
    "join": 10.0,
    "evaluate": 10.0,
    "finish": 60.0,
    "save": 10.0,
    "wait": math.inf,
    "prepare": math.inf,
}
"""Factors on the deadline, for phases that are not a step's. A microbatch of an evaluation may hold many times the
samples of a step, the longest first. Preparing data has no deadline: it may take hours."""
FIRST_STEP_PATIENCE = 30.0
"""Factor before any step has been measured."""
START_PATIENCE = 60.0
"""Factor for a worker that starts, whatever a step takes: it imports, opens the data and builds the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """A worker without progress: its number, for how long, and what it was doing."""

    worker: int
    seconds: float
    row: Row
    stopped: bool

    def __str__(self) -> str:
        stopped = ", stopped by a signal" if self.stopped else ""
        if self.row.phase == "start" and not self.stopped:
            return (
                f"worker {self.worker} was not ready {self.seconds:.0f} s after its start (if a start takes as long "
                "here, raise recovery.hang_factor)"
            )
        return f"worker {self.worker} made no progress for {self.seconds:.0f} s (at {self.row}{stopped})"


def find_stuck(
    rows: Mapping[int, Row],
    *,
    stopped: Collection[int],
    answered: Collection[int] = (),
    now: float,
    limit_seconds: float,
    start_seconds: float,
) -> list[Stuck]:
    """The workers that have made no progress for longer than their deadline, and wait for no other worker.

    rows: of one group of workers. stopped: workers stopped by a signal, for which no phase is an excuse. answered:
    workers that wait for the supervisor. now: seconds of the monotonic clock. start_seconds: the deadline of a start.
    """
    fewest = min((row.entered for row in rows.values()), default=0)
    late = []
    for worker, row in rows.items():
        excused = worker in answered or (row.waiting and fewest < row.entered)
        own = start_seconds if row.phase == "start" else limit_seconds * PATIENCE.get(row.phase, 1.0)
        if now - row.since > (limit_seconds if worker in stopped else math.inf if excused else own):
            late.append(Stuck(worker=worker, seconds=now - row.since, row=row, stopped=worker in stopped))
    return [stuck for stuck in late if stuck.stopped] or late  # a stopped worker explains the others


class HangDetector:
    """Watches the worker pool of one run. `factor` is recovery.hang_factor."""

    def __init__(self, pool: WorkerPool, progress_table: ProgressTable, folder: Path, factor: float) -> None:
        self._pool = pool
        self._progress_table = progress_table
        self._folder = folder
        self._factor = factor
        self._longest_step = 0.0
        self._found = 0
        self._looked = time.monotonic()
        self._not_before = 0.0
        self._spared_until = 0.0

    def learn(self, step_seconds: float) -> None:
        """Note how long a step has taken."""
        self._longest_step = max(self._longest_step, step_seconds)

    def spare(self) -> None:
        """A group has been dissolved: workers that waited for a lost one need time to come back. One that starts has
        waited for none."""
        self._spared_until = time.monotonic() + self.limit_seconds

    @property
    def limit_seconds(self) -> float:
        """How long a worker may be without progress; 0: forever."""
        return self._factor * (max(1.0, self._longest_step) if self._longest_step else FIRST_STEP_PATIENCE)

    def find(self) -> list[tuple[WorkerHandle, Stuck]]:
        """The workers that hang now."""
        now = time.monotonic()
        if now - self._looked > self.limit_seconds / 2:  # the whole run was stopped (Ctrl-Z), and goes on
            self._not_before = now + self.limit_seconds
        self._looked = now
        if not self.limit_seconds or now < self._not_before:
            return []
        found: list[tuple[WorkerHandle, Stuck]] = []
        is_spared = now < self._spared_until
        staying = self._pool.staying()
        at_work = [one for one in staying if not one.waiting and not (is_spared and one.generation >= 0)]
        for generation in {handle.generation for handle in at_work}:
            group = {handle.number: handle for handle in at_work if handle.generation == generation}
            rows = {number: self._progress_table.row(handle.slot) for number, handle in group.items()}
            stuck = find_stuck(
                rows,
                stopped=[number for number, handle in group.items() if self._pool.is_stopped(handle)],
                answered=[number for number, handle in group.items() if handle.asking],
                now=now,
                limit_seconds=self.limit_seconds,
                start_seconds=self._factor * START_PATIENCE,
            )
            found += [(group[one.worker], one) for one in stuck]
        return found

    def describe(self, found: list[tuple[WorkerHandle, Stuck]], step: int) -> str:
        """Describe the workers that hang, after all workers' stacks have been written to a folder of the run."""
        self._found += 1
        told = "; ".join(str(stuck) for _, stuck in found)
        folder = self._folder / "hangs" / f"{self._found:03d}-step-{step + 1:08d}"
        try:
            self._pool.dump_stacks(folder, told)
        except OSError as error:
            return f"{told}; stacks could not be written: {error}"
        return f"{told}; all stacks are in {folder}"
