"""Workers as processes of this host, forked: they share this process's imports and objects, and nothing is sent.

Owns the children of `run`: their start, the report of their failures, and that none outlives its parent; those of a
training are the supervisor's. docs/design/0006-launch.md says why not torch.distributed.elastic's starter.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from unisono import errors
from unisono.errors import Interrupted, UserError, WorkerError
from unisono.processes.forking import (
    ChildProcess,
    describe_end,
    end_with_parent,
    flush_output,
    forget_kernel_buffers,
    fork,
    rest_threads,
)
from unisono.processes.limits import within_limits
from unisono.runtime.channel import Channel, pair
from unisono.runtime.launchers.devices import check_gpus
from unisono.runtime.launchers.launcher import Training, count_workers
from unisono.runtime.launchers.rank_assignment import give_assignments, receive_assignment
from unisono.runtime.signals import in_main_thread
from unisono.runtime.supervisor import Supervisor
from unisono.runtime.worker import STOPPING, Act, guarded, work
from unisono.runtime.worker_pool import StartWorker, start_forked

GRACE_SECONDS = 5.0  # for the others, after one has failed


class Fork:
    """Launches copies of this process."""

    def count(self, wanted: str | int, microbatches: int, device: str) -> int:
        """As wanted; "auto": all GPUs, else all cores."""
        return count_workers(wanted, microbatches, device)

    def train(self, training: Training) -> None:
        """Train under a supervisor, which brings the run through losses of workers."""
        rest_threads()  # a task may use several, whatever the recipe says
        supervise(training, start_forked)

    def run(self, act: Act, *, workers: int, threads: int, device: str) -> bool:
        """Run `act` in each; this process reports for them."""
        rest_threads()
        launch(workers, act, threads=threads, device=device)
        return True


def supervise(training: Training, start: StartWorker) -> None:
    """Train in processes of this host that `start` starts.

    Raises:
        RecipeError: this host does not allow so many.
    """
    with within_limits(training.workers):
        _supervise(training, start)


def _supervise(training: Training, start: StartWorker) -> None:
    observer = training.open_observer(True)
    try:
        Supervisor(
            training.runner,
            recipe=training.recipe,
            folder=training.folder,
            observer=observer,
            workers=training.workers,
            faults=training.faults,
            may_stop=training.may_stop,
            start=start,
        ).run()
    finally:
        observer.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ActSpec:
    """What a process that runs an `Act` gets at its start. channel: on which its rank assignment comes. scratch: the
    folder for the error that it raises. inherited: what a copy of this process has to close."""

    rank: int
    channel: Channel
    threads: int
    device: str
    scratch: Path
    parent: int
    inherited: tuple[Channel, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The same in plain values, for a process that has inherited the channel."""
        return {
            "rank": self.rank,
            "channel": self.channel.fileno(),
            "threads": self.threads,
            "device": self.device,
            "scratch": str(self.scratch),
            "parent": self.parent,
        }

    @staticmethod
    def from_plain(values: dict[str, Any]) -> ActSpec:
        """What `plain` has described."""
        channel = Channel(socket.socket(fileno=values["channel"]))
        given = {"scratch": Path(values["scratch"]), "channel": channel}
        return ActSpec(**values | given)


StartAct = Callable[[ActSpec, Act], ChildProcess]
"""How to start a process that runs `serve_act`."""


def fork_act(spec: ActSpec, act: Act) -> ChildProcess:
    """A copy of this process."""
    return fork(serve_act, (spec, lambda: act), f"worker {spec.rank}")


def launch(workers: int, act: Act, *, threads: int, device: str, start: StartAct = fork_act) -> None:
    """Run `act` in `workers` processes; return when all have ended well.

    Raises:
        RecipeError: this host has GPUs, and fewer than that.
        UserError, Interrupted, …: the error of the worker that failed first, as it raised it.
        WorkerError: a worker failed unexpectedly, or was killed; with its rank and traceback.
    """
    check_gpus(workers, device)
    flush_output()
    with within_limits(workers), tempfile.TemporaryDirectory(prefix="unisono-") as scratch:
        forget_kernel_buffers()
        children: list[ChildProcess] = []
        channels: list[Channel] = []
        with _StopSignals(children) as interrupts:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # until all are started and handle signals
            try:
                for rank in range(workers):
                    mine, theirs = pair()
                    channels.append(mine)
                    spec = ActSpec(
                        rank=rank, channel=theirs, threads=threads, device=device, scratch=Path(scratch),
                        parent=os.getpid(), inherited=tuple(channels),
                    )  # fmt: skip
                    try:
                        children.append(start(spec, act))
                    finally:
                        theirs.close()
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                _watch(children, channels)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                _end(children)
                for channel in channels:
                    channel.close()
        _raise_first_failure(children, Path(scratch), interrupts.asked)


def serve_act(spec: ActSpec, open_act: Callable[[], Act]) -> None:
    """Run an `Act` in this process, as one of several."""
    end_with_parent(spec.parent)
    for channel in spec.inherited:
        channel.close()

    def main() -> None:
        act = open_act()
        spec.channel.send({"waiting": ""})
        assignment = receive_assignment(spec.channel)
        assert assignment is not None
        work(assignment, act, threads=spec.threads, wanted_device=spec.device)

    code = guarded(main, (spec.scratch / f"{spec.rank}.json").write_text, spec.rank)
    flush_output()
    os._exit(code)  # no clean-up of what was inherited from the parent


def _watch(children: Sequence[ChildProcess], channels: Sequence[Channel]) -> None:
    """Give out rank assignments when all wait for one. Return when all have ended, or soon after one has failed."""
    deadline: float | None = None
    running, late, ready = list(children), list(channels), 0
    while running and (deadline is None or time.monotonic() < deadline):
        watched: list[Any] = [*(child.sentinel for child in running), *late]
        said: list[Any] = wait(watched, timeout=0.2 if deadline else None)
        for channel in [one for one in late if one in said]:
            late.remove(channel)
            ready += bool(channel.drain())  # nothing comes from a worker that has ended
            if ready == len(channels):
                give_assignments(channels)
        running = [child for child in running if child.exitcode is None]
        if deadline is None and any(child.exitcode for child in children):
            deadline = time.monotonic() + GRACE_SECONDS


def _end(children: Sequence[ChildProcess]) -> None:
    """Make sure that no child is left."""
    for child in children:
        if child.exitcode is None:
            child.kill()
    for child in children:
        child.join()


class _StopSignals:
    """Within: the first Ctrl-C or SIGTERM requests a stop after the step, the second one kills them."""

    def __init__(self, children: Sequence[ChildProcess]) -> None:
        self.asked = 0
        self._children = children
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        for signum in STOPPING if in_main_thread() else ():
            self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked == 1:
            print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)
        for child in self._children:
            if child.exitcode is None and child.pid:
                os.kill(child.pid, signal.SIGTERM if self.asked == 1 else signal.SIGKILL)


def _raise_first_failure(children: Sequence[ChildProcess], scratch: Path, asked: int) -> None:
    """Raise the cause: the earliest error that is no symptom of another's end; without one, name a killed worker."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in scratch.glob("*.json")]
    reports.sort(key=lambda report: (report["symptom"], report["when"]))
    written = {report["rank"] for report in reports}
    killed = [rank for rank, child in enumerate(children) if child.exitcode and rank not in written]
    if asked > 1:
        raise Interrupted(
            "stopped at once. The last checkpoint, if there is one, is whole: go on with --resume (resume=True)."
        )
    if reports and not reports[0]["symptom"]:
        raise _rebuild(reports[0])
    if killed:
        code = children[killed[0]].exitcode or 0
        how = describe_end(code)
        hint = " It may have been out of memory: dmesg tells." if code == -signal.SIGKILL else ""
        raise WorkerError(
            f"worker {killed[0]} {how}.{hint} Go on from the last checkpoint with --resume (resume=True)."
        )
    if reports:
        raise _rebuild(reports[0])


def _rebuild(report: dict[str, Any]) -> Exception:
    kind = getattr(errors, report["kind"], None)
    if report["known"] and isinstance(kind, type) and issubclass(kind, (UserError, errors.DivergedError, Interrupted)):
        return kind(report["message"])
    return WorkerError(f"worker {report['rank']} failed: {report['limit'] or chr(10) + report['traceback']}")
