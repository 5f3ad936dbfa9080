"""Checkpoints written by the supervisor: in a process of their own, from the snapshot, while training goes on.

Owns that process, and the list of requests that wait for it. `storage/checkpoints.py` defines what is in a checkpoint;
the values come from the snapshot.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from unisono.engine.snapshot import Snapshot
from unisono.errors import RunFolderError
from unisono.processes.forking import describe_end, end_with_parent, fork
from unisono.runtime.background_writer import tell_written, warn_rescued, warn_unwritten
from unisono.runtime.signals import ASKING
from unisono.storage import checkpoints
from unisono.tracking.events import CheckpointWritten, Notice

NICENESS = 5  # training has priority
MOST_LETTERS = 4096  # of the reason why a checkpoint is not where it should be

Reply = Callable[[dict[str, Any]], None]


class CheckpointWriter:
    """Writes the run's checkpoints, one at a time. `tell` is called with the result of each."""

    def __init__(self, run: Path, keep: int, memory: int, tell: Callable[[CheckpointWritten | Notice], None]) -> None:
        self.step = -1  # the step that is being written, or was written last
        self.was_written = True
        self.place = run  # the run folder, or another one where it cannot be written
        self._run = run
        self._keep = keep
        self._memory = memory
        self._result = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - for as long as the run lives
        self._tell = tell
        self._process: BaseProcess | None = None
        self._began = 0.0
        self._waited_seconds = 0.0
        self._asking: tuple[Reply, float] | None = None
        self._settling: list[Reply] = []

    @property
    def sentinels(self) -> list[int]:
        """What becomes readable when something is written: a descriptor, or none."""
        return [self._process.sentinel] if self._process is not None else []

    def ask(self, reply: Reply) -> None:
        """The present commit is to be written; `reply` is called when that has begun."""
        self._asking = reply, time.monotonic()

    def settle(self, reply: Reply) -> None:
        """`reply` is called when everything is written."""
        self._settling.append(reply)

    def look(self, limit_seconds: float) -> None:
        """Check the progress of the present write, and begin the next one that was requested. With a limit above 0, a
        writer that takes longer while another write is requested is abandoned: a disk may hang, training goes on."""
        self._conclude()
        if self._asking and self._process is not None and 0 < limit_seconds < time.monotonic() - self._began:
            self.kill()
        if self._process is not None:
            return
        if self._asking is not None:
            reply, since = self._asking
            self._asking = None
            facts = Snapshot(self._memory).facts()
            if int(facts["step"]) != self.step:
                self._begin(facts, time.monotonic() - since)
            reply({"accepted": True})
        if self._settling and self._process is None:
            for reply in self._settling:
                reply({"written": self.was_written})
            self._settling = []

    def write_now(self, limit_seconds: float) -> bool:
        """Write the present commit before returning, in so many seconds; return whether it was written."""
        facts = Snapshot(self._memory).facts()
        if int(facts["step"]) != self.step:
            self.kill()
            self._begin(facts, 0.0)
        self.finish(limit_seconds)
        return self.was_written

    def finish(self, limit_seconds: float) -> None:
        """Wait for the end of the present write; abandon it after the time limit."""
        if self._process is not None:
            self._process.join(limit_seconds)
            self.kill()

    def kill(self) -> None:
        """End the present write: its unfinished files are ignored, and the next write removes them."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._conclude()

    def _begin(self, facts: Mapping[str, Any], waited_seconds: float) -> None:
        self.step = int(facts["step"])
        self._began, self._waited_seconds = time.monotonic(), waited_seconds
        os.ftruncate(self._result.fileno(), 0)
        self._process = fork(self._write, (facts, os.getpid()), "checkpoint")

    def _conclude(self) -> None:
        if self._process is None or self._process.exitcode is None:
            return
        code, seconds, self._process = self._process.exitcode, time.monotonic() - self._began, None
        self.was_written = code == 0
        result = json.loads(os.pread(self._result.fileno(), 65_536, 0) or b"{}")
        if self.was_written:
            path = Path(result["path"])
            self.place = path.parent.parent
            if result["why"]:
                self._tell(warn_rescued(path, result["why"]))
            self._tell(tell_written(path, seconds, self._waited_seconds))
        else:
            self._tell(warn_unwritten(result.get("why") or f"the writer {describe_end(code)}"))
            self.step = -1

    def _write(self, facts: Mapping[str, Any], parent: int) -> None:
        end_with_parent(parent)
        for signum in ASKING:
            signal.signal(signum, signal.SIG_IGN)
        os.nice(NICENESS)
        why, path = "", None
        try:
            content = Snapshot(self._memory).content(facts)
            path, why = checkpoints.write_somewhere(content, self._run, keep=self._keep)
        except RunFolderError as error:
            why = str(error)
        except BaseException as error:  # noqa: BLE001 - a process of its own: every failure is reported
            why = f"{type(error).__name__}: {error}"
        os.pwrite(self._result.fileno(), json.dumps({"path": str(path), "why": why[:MOST_LETTERS]}).encode(), 0)
        os._exit(int(path is None))
