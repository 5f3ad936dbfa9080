"""Checkpoints written by the supervisor: in a process of their own, from the snapshot, while training goes on.

Owns that process. What is in a checkpoint is the matter of `checkpoint/`, where the values come from of the snapshot.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from unisono.checkpoint import checkpoints
from unisono.checkpoint.background import tell_written, warn_unwritten
from unisono.engine.snapshot import Snapshot
from unisono.errors import RunFolderError
from unisono.events import CheckpointWritten, Notice
from unisono.launch.worker import STOPPING

PR_SET_PDEATHSIG = 1
NICENESS = 5  # training comes first


class Writing:
    """Writes the run's checkpoints, one at a time."""

    def __init__(self, folder: Path, keep: int, memory: int, scratch: Path) -> None:
        self.last_written = True
        self.step = -1  # that is being written, or was last
        self._folder = folder
        self._keep = keep
        self._memory = memory
        self._error = scratch / "writing.txt"
        self._process: BaseProcess | None = None
        self._began = 0.0
        self._waited_seconds = 0.0
        self._asked = 0.0

    @property
    def sentinel(self) -> int | None:
        """A descriptor that becomes readable at the end of what is being written."""
        return self._process.sentinel if self._process is not None else None

    @property
    def busy_seconds(self) -> float:
        """For how long the present one has been written; 0: none is."""
        return time.monotonic() - self._began if self._process is not None else 0.0

    def begin(self, facts: Mapping[str, Any], waited_seconds: float = 0.0) -> None:
        """Begin to write the commit with these facts."""
        assert self._process is None
        self.step = int(facts["step"])
        self._began, self._waited_seconds = time.monotonic(), waited_seconds
        self._error.unlink(missing_ok=True)
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=self._write, args=(facts, os.getpid()), name="checkpoint")
        self._process.start()

    def look(self) -> CheckpointWritten | Notice | None:
        """What has become of it, once it has ended."""
        if self._process is None or self._process.exitcode is None:
            return None
        code, seconds, self._process = self._process.exitcode, time.monotonic() - self._began, None
        self.last_written = code == 0
        if code == 0:
            return tell_written(checkpoints.name_checkpoint(self._folder, self.step), seconds, self._waited_seconds)
        why = self._error.read_text(encoding="utf-8") if self._error.exists() else f"the writer ended with {code}"
        self.step = -1
        return warn_unwritten(why)

    def finish(self, seconds: float) -> CheckpointWritten | Notice | None:
        """Wait for the end, at most so long; end it then."""
        if self._process is None:
            return None
        self._process.join(max(seconds, 0.0))
        if self._process.exitcode is None:
            self.kill()
        return self.look()

    def kill(self) -> None:
        """End it; what it had begun is not seen, and is cleared away by the next one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _write(self, facts: Mapping[str, Any], parent: int) -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for signum in (*STOPPING, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_IGN)
        if os.getppid() != parent:
            os._exit(1)
        os.nice(NICENESS)
        code = 0
        try:
            content = Snapshot(self._memory).content(facts)
            checkpoints.write(content, self._folder, keep=self._keep)
        except (RunFolderError, OSError) as error:
            self._error.write_text(str(error), encoding="utf-8")
            code = 1
        except BaseException as error:  # noqa: BLE001 - a process of its own: whatever ends it is told
            self._error.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            code = 1
        sys.stderr.flush()
        os._exit(code)
