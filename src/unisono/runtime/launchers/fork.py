"""Workers as processes of this host: forked, watched, ended together.

Owns the children: how they start, who hears of their failures, and that none outlives its parent. Forking lets workers
share the imports and the user's objects without pickling; docs/design/0006-launch.md says why not
torch.distributed.elastic's starter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from unisono import errors
from unisono.errors import Interrupted, UserError, WorkerError
from unisono.processes.forking import count_cores, describe_end, end_with_parent, flush_output, forget_kernel_buffers
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.worker import STOPPING, Act, guarded, work

GRACE_SECONDS = 5.0  # for the others, after one has failed


def count_workers(wanted: str | int, microbatches: int, device: str) -> int:
    """The number that `--workers` asks for; "auto": all GPUs, else all cores, at most one per microbatch."""
    if wanted != "auto":
        return int(wanted)
    import torch

    gpus = torch.cuda.device_count() if device != "cpu" else 0
    return max(1, min(gpus or count_cores(), microbatches))


def launch(workers: int, act: Act, *, threads: int, device: str) -> None:
    """Run `act` in `workers` forked processes; return when all have ended well.

    Raises:
        UserError, Interrupted, …: the error of the worker that failed first, as it raised it.
        WorkerError: a worker failed unexpectedly, or was killed; with its rank and traceback.
    """
    flush_output()
    with tempfile.TemporaryDirectory(prefix="unisono-") as scratch, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(workers)
        port = listener.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        forget_kernel_buffers()
        children: list[BaseProcess] = []
        with _StopSignals(children) as interrupts:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # they wait until every child is there, and listens
            for rank in range(workers):
                assignment = RankAssignment(
                    rank=rank,
                    workers=workers,
                    local_rank=rank,
                    local_workers=workers,
                    port=port,
                    listener=listener.fileno(),
                )
                child = fork.Process(
                    target=_child,
                    args=(assignment, act, threads, device, Path(scratch), os.getpid()),
                    name=f"worker {rank}",
                )
                child.start()
                children.append(child)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            try:
                _hang_detector(children)
            finally:
                _end(children)
        _raise_first_failure(children, Path(scratch), interrupts.asked)


def _child(assignment: RankAssignment, act: Act, threads: int, device: str, scratch: Path, parent: int) -> None:
    end_with_parent(parent)
    code = guarded(
        lambda: work(assignment, act, threads=threads, wanted_device=device),
        (scratch / f"{assignment.rank}.json").write_text,
        assignment.rank,
    )
    flush_output()
    os._exit(code)  # no clean-up of what was inherited from the parent


def _hang_detector(children: Sequence[BaseProcess]) -> None:
    """Return when all have ended, or soon after one has failed."""
    deadline: float | None = None
    running = list(children)
    while running and (deadline is None or time.monotonic() < deadline):
        wait([child.sentinel for child in running], timeout=0.2 if deadline else None)
        running = [child for child in running if child.exitcode is None]
        if deadline is None and any(child.exitcode for child in children):
            deadline = time.monotonic() + GRACE_SECONDS


def _end(children: Sequence[BaseProcess]) -> None:
    """Make sure that no child is left."""
    for child in children:
        if child.exitcode is None:
            child.kill()
    for child in children:
        child.join()


class _StopSignals:
    """Within: the first Ctrl-C or SIGTERM asks the workers to stop after their step, the second one kills them."""

    def __init__(self, children: Sequence[BaseProcess]) -> None:
        self.asked = 0
        self._children = children
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        for signum in STOPPING:
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


def _raise_first_failure(children: Sequence[BaseProcess], scratch: Path, asked: int) -> None:
    """Raise the cause: the earliest error that is no symptom of another's end; a killed worker, if nobody wrote one."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in scratch.glob("*.json")]
    reports.sort(key=lambda report: (report["symptom"], report["when"]))
    written = {report["rank"] for report in reports}
    killed = [child for rank, child in enumerate(children) if child.exitcode and rank not in written]
    if asked > 1:
        raise Interrupted("stopped at once. The last checkpoint, if there is one, is whole: go on with --resume.")
    if reports and not reports[0]["symptom"]:
        raise _rebuild(reports[0])
    if killed:
        code = killed[0].exitcode or 0
        how = describe_end(code)
        hint = " It may have been out of memory: dmesg tells." if code == -signal.SIGKILL else ""
        raise WorkerError(f"{killed[0].name} {how}.{hint} Go on from the last checkpoint with --resume.")
    if reports:
        raise _rebuild(reports[0])


def _rebuild(report: dict[str, Any]) -> Exception:
    kind = getattr(errors, report["kind"], None)
    if report["known"] and isinstance(kind, type) and issubclass(kind, (UserError, errors.DivergedError, Interrupted)):
        return kind(report["message"])
    return WorkerError(f"worker {report['rank']} failed:\n{report['traceback']}")
