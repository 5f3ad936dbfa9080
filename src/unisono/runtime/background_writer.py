"""Writing a checkpoint while training goes on, in a thread of the worker: for workers that have no supervisor.

Owns the thread and the copies that it writes from. A worker with a supervisor does not need it: its state lies in the
snapshot, where another process can read it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unisono.engine.state import TrainState
from unisono.errors import RunFolderError
from unisono.storage import checkpoints
from unisono.storage.checkpoints import Content
from unisono.tracking import events


class BackgroundWriter:
    """Writes one checkpoint at a time. `tell` gets an event for each, also for failures, when the next one begins or at
    the end."""

    def __init__(self, tell: Callable[[events.Event], None]) -> None:
        self._tell = tell
        self._thread = ThreadPoolExecutor(1, "unisono-checkpoint")
        self._checkpoint_writer: Future[tuple[Path, str, float]] | None = None
        self._waited_seconds = 0.0

    def save(self, state: TrainState, facts: Mapping[str, Any], run: Path, keep: int) -> None:
        """Begin to write the state into the run folder; every worker calls this, worker 0 writes. Waits for the one
        before."""
        began = time.perf_counter()
        self.settle()
        found = state.content()
        if state.exchange.rank == 0:
            copied = Content(  # training goes on while this is written
                parameters={name: value.clone() for name, value in found.parameters.items()},
                buffers={name: value.clone() for name, value in found.buffers.items()},
                optimizer=found.optimizer,
                facts={**found.facts, **facts},
            )
            self._checkpoint_writer = self._thread.submit(_write, copied, run, keep)
            self._waited_seconds = time.perf_counter() - began

    def settle(self) -> bool:
        """Wait until what was begun is written; return whether it was."""
        if self._checkpoint_writer is None:
            return True
        writing, self._checkpoint_writer = self._checkpoint_writer, None
        try:
            path, why, seconds = writing.result()
        except RunFolderError as error:
            self._tell(warn_unwritten(str(error)))
            return False
        if why:
            self._tell(warn_rescued(path, why))
        self._tell(tell_written(path, seconds, self._waited_seconds))
        return True

    def close(self) -> None:
        """End the thread, after it has written."""
        self.settle()
        self._thread.shutdown()


def tell_written(path: Path, seconds: float, waited_seconds: float) -> events.CheckpointWritten:
    """The event that a checkpoint is on disk."""
    step = int(path.name.removeprefix("step-"))
    return events.CheckpointWritten(step=step, path=str(path), seconds=seconds, waited_seconds=waited_seconds)


def warn_unwritten(why: str) -> events.Notice:
    """The event that a checkpoint could not be written."""
    return events.Notice(message=f"no checkpoint, and training goes on: {why}", warning=True)


def warn_rescued(path: Path, why: str) -> events.Notice:
    """The event that a checkpoint is on disk, not in the run's own folder."""
    return events.Notice(
        message=f"{why} The checkpoint is in {str(path)!r} instead. Make the place writable; if the run ends before, "
        f"go on with `--run-folder {path.parent.parent} --resume`.",
        warning=True,
    )


def _write(content: Content, run: Path, keep: int) -> tuple[Path, str, float]:
    began = time.perf_counter()
    path, why = checkpoints.write_somewhere(content, run, keep=keep)
    return path, why, time.perf_counter() - began
