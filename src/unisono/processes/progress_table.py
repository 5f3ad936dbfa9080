"""The progress table: each worker of this host writes what it does, in memory that its supervisor reads.

One row of numbers per worker, written without a lock or a system call, so that the last entry of a worker can be read
even after it was killed or stopped, or while it hangs. The table also carries what the supervisor sends to all workers:
the number of the generation that goes on, and a request to stop or to regroup after the step.

Owns the memory and its layout. `runtime/` decides what follows from a row.
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from unisono.errors import LostPeerError
from unisono.processes.fault_injection import Fault, strike
from unisono.processes.forking import end_copy

PHASES = (
    "start",  # of the process; imports, warm-up
    "wait",  # for a rank assignment, from the supervisor
    "prepare",  # the data
    "join",  # meeting the others, building, probing, restoring
    "begin",
    "load",
    "contribute",
    "audit",
    "reduce",
    "update",
    "commit",
    "report",
    "evaluate",
    "save",
    "finish",
)
"""The phases of a worker: from "begin" to "commit" the verbs of the loop, then what may follow a step."""

RUNNING, STOP, REGROUP, FINISH = 0, 1, 2, 3
"""Requests of the supervisor to all workers, at the end of a step. FINISH: end normally, as after the last step."""

_GENERATION, _REQUEST, _PREPARED, _ASKED_FIRST, _STRUCK, _HEADER = 0, 1, 2, 3, 8, 64
MOST_FAULTS = _HEADER - _STRUCK
_PHASE, _STEP, _MICROBATCH, _SINCE, _ENTERED, _LEFT, _CALL, _HEARD, _ROW = 0, 1, 2, 3, 4, 5, 6, 7, 8
HEARING_SECONDS = 0.0005  # between two reads of the number of events that observers have seen
CALLS = ("", "add_integers", "to_owners", "gather_shards", "gather_bytes", "wait_for_all", "join", "send_to_first")
"""Ways to wait for other workers."""


class Progress(Protocol):
    """The progress table as a worker's modules see it: they write what they are about to do."""

    def at(self, phase: str, step: int = -1, microbatch: int = -1) -> None:
        """Write what comes next. Raises LostPeerError where the group has been dissolved."""
        ...

    def enter(self, call: str) -> None:
        """An exchange begins: from here on this worker may wait for others."""
        ...

    def leave(self) -> None:
        """The exchange is over."""
        ...


class Unwatched:
    """A `Progress` that no process reads: under torchrun, and in tests."""

    def at(self, phase: str, step: int = -1, microbatch: int = -1) -> None:
        return

    def enter(self, call: str) -> None:
        return

    def leave(self) -> None:
        return


UNWATCHED = Unwatched()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The last entry of a worker.

    since: seconds of the monotonic clock. entered, left: exchanges of this generation. waiting: the exchange that it is
    in; "" for none.
    """

    phase: str
    step: int
    microbatch: int
    since: float
    entered: int
    left: int
    waiting: str

    def __str__(self) -> str:
        place = f" of step {self.step + 1}" if self.step >= 0 else ""
        place = f" (microbatch {self.microbatch}{place})" if self.microbatch >= 0 else place.replace(" of", " in")
        return f"{self.phase}{place}{f', in the exchange {self.waiting}' if self.waiting else ''}"


class ProgressTable:
    """The whole table. The supervisor makes it, in unnamed memory, so it ends with the last process.

    file: the descriptor of an existing one; a new process opens the table with it.
    """

    def __init__(self, rows: int, file: int = -1) -> None:
        self.rows = rows
        size = (_HEADER + rows * _ROW) * 8
        self._file = file if file >= 0 else _new_file(size)
        self._memory = mmap.mmap(self._file, size)
        self._words = np.frombuffer(self._memory, np.int64)

    def fileno(self) -> int:
        """The descriptor of its memory; −1: only a forked process can have it."""
        return self._file

    def close(self) -> None:
        """Close the descriptor; the memory stays as long as it is in use."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def generation(self) -> int:
        """The group of workers that goes on. A worker of an older group drops its work."""
        return int(self._words[_GENERATION])

    @generation.setter
    def generation(self, number: int) -> None:
        self._words[_GENERATION] = number

    @property
    def request(self) -> int:
        """RUNNING, STOP, REGROUP or FINISH."""
        return int(self._words[_REQUEST])

    @request.setter
    def request(self, wanted: int) -> None:
        self._words[_REQUEST] = wanted

    @property
    def prepared(self) -> bool:
        """Whether the data has been prepared on this host, so that a worker may open it without waiting."""
        return bool(self._words[_PREPARED])

    @prepared.setter
    def prepared(self, done: bool) -> None:
        self._words[_PREPARED] = int(done)

    @property
    def observers_first(self) -> bool:
        """Whether a step ends only after observers have seen the events before it: they may request the end, and the
        step at which the run ends must not depend on how fast they are."""
        return bool(self._words[_ASKED_FIRST])

    @observers_first.setter
    def observers_first(self, wanted: bool) -> None:
        self._words[_ASKED_FIRST] = int(wanted)

    def count_heard(self, slot: int) -> None:
        """One more event from the worker in `slot` has been passed to the observers."""
        self._words[_HEADER + slot * _ROW + _HEARD] += 1

    def count_strike(self, fault: int) -> int:
        """How often fault number `fault` has been injected before; counts one more."""
        before = int(self._words[_STRUCK + fault])
        self._words[_STRUCK + fault] = before + 1
        return before

    def row(self, slot: int) -> Row:
        """The last entry of the worker in `slot`."""
        words = self._words[_HEADER + slot * _ROW :][:_ROW].tolist()
        waiting = CALLS[words[_CALL]] if words[_ENTERED] > words[_LEFT] else ""
        return Row(
            phase=PHASES[words[_PHASE]],
            step=words[_STEP],
            microbatch=words[_MICROBATCH],
            since=words[_SINCE] / 1e9,
            entered=words[_ENTERED],
            left=words[_LEFT],
            waiting=waiting,
        )

    def clear(self, slot: int) -> None:
        """A worker is about to be started in `slot`."""
        self._words[_HEADER + slot * _ROW :][:_ROW] = 0
        self._words[_HEADER + slot * _ROW + _SINCE] = time.monotonic_ns()

    def progress_writer(self, slot: int, faults: tuple[Fault, ...] = ()) -> ProgressWriter:
        """The progress writer of the worker in `slot`."""
        return ProgressWriter(self, self._words[_HEADER + slot * _ROW :][:_ROW], faults)


class ProgressWriter:
    """The progress writer of one worker. Faults are injected where it writes."""

    def __init__(self, progress_table: ProgressTable, words: np.ndarray, faults: tuple[Fault, ...]) -> None:
        self.progress_table = progress_table
        self.rank = -1
        self.generation = -1
        self._words = words
        self._faults = faults
        self._process = os.getpid()

    def assignment(self, rank: int, generation: int) -> None:
        """Begin a new generation, in which this worker has this rank; rank −1: it waits for one."""
        self.rank, self.generation = rank, generation
        self._words[_ENTERED] = self._words[_LEFT] = 0

    def at(self, phase: str, step: int = -1, microbatch: int = -1) -> None:
        end_copy(self._process)
        words = self._words
        words[_PHASE], words[_STEP], words[_MICROBATCH] = PHASES.index(phase), step, microbatch
        words[_SINCE] = time.monotonic_ns()
        if self._faults:
            strike(self._faults, self.progress_table.count_strike, self.rank, phase, step, microbatch)
        self._check()

    def enter(self, call: str) -> None:
        end_copy(self._process)
        self._words[_CALL] = CALLS.index(call)
        self._words[_ENTERED] += 1
        self._words[_SINCE] = time.monotonic_ns()
        self._check()

    def leave(self) -> None:
        self._words[_LEFT] += 1
        self._words[_SINCE] = time.monotonic_ns()

    def wait_until_heard(self, events: int) -> None:
        """Wait until observers have seen this number of events of this worker. This wait does not count as a hang."""
        while self._words[_HEARD] < events:
            self._words[_SINCE] = time.monotonic_ns()
            self._check()
            time.sleep(HEARING_SECONDS)

    def _check(self) -> None:
        if self.generation >= 0 and self.progress_table.generation != self.generation:
            raise LostPeerError("the group of workers has been dissolved")


def _new_file(size: int) -> int:
    """A memory file of this size; −1 where the system has none, or does not allow one of this size."""
    if not hasattr(os, "memfd_create"):
        return -1
    file = os.memfd_create("unisono")
    try:
        os.ftruncate(file, size)
    except OSError:  # RLIMIT_FSIZE applies to it
        os.close(file)
        return -1
    return file
