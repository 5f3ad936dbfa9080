"""The processes that a supervisor watches: it starts them, reads their messages, and ends them.

Owns the children and their channels. Decides nothing; `supervisor.py` does.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TextIO

from unisono.processes.fault_injection import Fault
from unisono.processes.forking import ChildProcess, fork
from unisono.processes.progress_table import ProgressTable
from unisono.runtime.channel import Channel, Message, pair
from unisono.runtime.launchers.rank_assignment import give_assignments
from unisono.runtime.restart_budget import End
from unisono.runtime.signals import ASKING
from unisono.runtime.supervised_worker import DUMP, WorkerSpec, Workload, serve

DUMP_SECONDS = 1.0  # to write stacks

StartWorker = Callable[[WorkerSpec, Workload], ChildProcess]
"""How to start a worker's process on this host; it runs `supervised_worker.serve`."""


def start_forked(spec: WorkerSpec, workload: Workload) -> ChildProcess:
    """A copy of this process."""
    return fork(serve, (spec, lambda: workload), f"worker {spec.slot}", hold=ASKING)


@dataclass(slots=True, kw_only=True, eq=False)
class WorkerHandle:
    """A worker's process. rank, generation: of its present or last rank assignment; −1: none yet. waiting: for a rank
    assignment. asking: it waits for an answer."""

    slot: int
    process: ChildProcess
    channel: Channel
    report: TextIO
    stacks: TextIO
    rank: int = -1
    generation: int = -1
    waiting: bool = False
    leaving: bool = False
    asking: bool = False

    def answer(self, message: Message) -> None:
        """Answer the worker's request."""
        self.asking = False
        self.channel.send(message)

    def files(self) -> tuple[Channel | TextIO, ...]:
        """What the supervisor has open for this worker."""
        return self.channel, self.report, self.stacks

    @property
    def number(self) -> int:
        """The number used in messages: its rank, or before it has one the rank that it will probably have."""
        return self.rank if self.rank >= 0 else self.slot

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


class WorkerPool:
    """All workers of a run on this host. `wake` is a descriptor that ends a wait."""

    def __init__(
        self,
        workload: Workload,
        start: StartWorker,
        progress_table: ProgressTable,
        *,
        memory: int,
        threads: int,
        device: str,
        faults: Sequence[Fault],
        wake: int,
    ) -> None:
        self.handles: dict[int, WorkerHandle] = {}
        self._workload = workload
        self._start = start
        self._progress_table = progress_table
        self._memory = memory
        self._threads = threads
        self._device = device
        self._faults = tuple(faults)
        self._wake = wake

    def staying(self) -> list[WorkerHandle]:
        """Workers that have not been released, by slot."""
        return [handle for slot, handle in sorted(self.handles.items()) if not handle.leaving]

    def start_workers(self, count: int) -> None:
        """Start workers until `count` are staying, in the lowest free slots. A slot that a leaving worker still has,
        with its GPU, is free only after that worker has ended."""
        free = [slot for slot in range(count) if slot not in self.handles]
        for slot in free[: max(0, count - len(self.staying()))]:
            self._progress_table.clear(slot)
            mine, theirs = pair()
            report, stacks = _new_file(), _new_file()
            spec = WorkerSpec(
                slot=slot,
                channel=theirs,
                progress_table=self._progress_table,
                memory=self._memory,
                threads=self._threads,
                device=self._device,
                workers=count,
                report=report,
                stacks=stacks,
                parent=os.getpid(),
                faults=self._faults,
                inherited=tuple(one for handle in self.handles.values() for one in handle.files()),
            )
            try:
                process = self._start(spec, self._workload)
            finally:
                theirs.close()
            self.handles[slot] = WorkerHandle(slot=slot, process=process, channel=mine, report=report, stacks=stacks)

    def assignment(self, generation: int, chosen: Sequence[WorkerHandle]) -> None:
        """Give the chosen workers rank assignments in a new group."""
        for rank, handle in enumerate(chosen):
            handle.rank, handle.generation, handle.waiting = rank, generation, False
        give_assignments([handle.channel for handle in chosen], generation)

    def release(self, handles: Iterable[WorkerHandle]) -> None:
        """Release waiting workers: they are not needed any more."""
        for handle in handles:
            if handle.waiting:
                handle.waiting, handle.leaving = False, True
                handle.channel.send({"leave": True})

    def wait(self, seconds: float, others: Iterable[int]) -> None:
        """Return when something may have happened to a worker, or to `others` (descriptors), at the latest after
        `seconds`."""
        watched: list[Any] = [self._wake, *others]
        for handle in self.handles.values():
            watched += [handle.process.sentinel, handle.channel]
        if self._wake in wait(watched, seconds):
            with suppress(BlockingIOError):
                os.read(self._wake, 4096)

    def listen(self) -> list[tuple[WorkerHandle, Message]]:
        """The messages of workers since the last call."""
        return [(handle, message) for handle in list(self.handles.values()) for message in handle.channel.drain()]

    def reap(self) -> tuple[list[tuple[WorkerHandle, Message]], list[tuple[WorkerHandle, End]]]:
        """Remove the workers that have ended; return their last messages, and how they ended."""
        words: list[tuple[WorkerHandle, Message]] = []
        ends: list[tuple[WorkerHandle, End]] = []
        for handle in list(self.handles.values()):
            code = handle.process.exitcode
            if code is None:
                continue
            words += [(handle, message) for message in handle.channel.drain()]
            handle.channel.close()
            del self.handles[handle.slot]
            written = _read(handle.report)
            report = json.loads(written) if written else None
            stacks = "" if code == -signal.SIGKILL else _read(handle.stacks)
            handle.report.close()
            handle.stacks.close()
            ends.append((handle, End(worker=handle.number, code=code, report=report, stacks=stacks)))
        return words, ends

    def terminate(
        self, handles: Iterable[WorkerHandle]
    ) -> tuple[list[tuple[WorkerHandle, Message]], list[tuple[WorkerHandle, End]]]:
        """Kill workers at once; return the last messages of those that have ended, and how they ended."""
        chosen = list(handles)
        for handle in chosen:
            handle.leaving = True
            handle.process.kill()
        for handle in chosen:
            handle.process.join()
        return self.reap()

    def end(self) -> None:
        """Make sure that no child is left."""
        self.terminate(self.handles.values())

    @staticmethod
    def is_stopped(handle: WorkerHandle) -> bool:
        """Whether a worker's process is stopped by a signal."""
        try:
            stat = Path(f"/proc/{handle.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    def dump_stacks(self, folder: Path, told: str) -> None:
        """Have every worker write its stacks, into `folder`/worker-N.txt under its last row of the progress table.

        A stopped one has to be continued for that; a worker that counts as lost may be continued.
        """
        sizes = {slot: len(_read(handle.stacks)) for slot, handle in self.handles.items()}
        rows = {slot: str(self._progress_table.row(slot)) for slot in self.handles}
        for handle in self.handles.values():
            with suppress(ProcessLookupError):
                os.kill(handle.pid, DUMP)
                if self.is_stopped(handle):
                    os.kill(handle.pid, signal.SIGCONT)
        deadline = time.monotonic() + DUMP_SECONDS
        while time.monotonic() < deadline and any(
            len(_read(handle.stacks)) <= sizes[slot] for slot, handle in self.handles.items()
        ):
            time.sleep(0.01)
        time.sleep(0.05)  # the rest of a text that has begun
        folder.mkdir(parents=True, exist_ok=True)
        for slot, handle in self.handles.items():
            stacks = _read(handle.stacks)[sizes[slot] :] or "it wrote no stacks\n"
            text = f"{told}\nworker {handle.number}, process {handle.pid}, was at {rows[slot]}\n\n{stacks}"
            (folder / f"worker-{handle.number}.txt").write_text(text, encoding="utf-8")


def _new_file() -> TextIO:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(file: TextIO) -> str:
    """All of a file that another process writes."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
