"""A worker's connection to its supervisor: where events go, who writes checkpoints, what is requested of the worker.

Owns the interface, and `UnsupervisedClient`, for a worker without a supervisor (under torchrun): it passes events to
its own observers, writes checkpoints in a thread of its own, and takes requests from signals. The other implementation
is in `supervised_worker.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from unisono.engine.state import TrainState
from unisono.processes.progress_table import FINISH, RUNNING, UNWATCHED, Progress
from unisono.runtime.background_writer import BackgroundWriter
from unisono.tracking import events


class SupervisorClient(Protocol):
    """A worker's connection to its supervisor, if it has one.

    progress: where the worker writes what it is about to do. memory: file descriptor of the run's snapshot; −1: there
    is none.
    prepared: whether the data of this host has been prepared, so that it may be opened without waiting for others.
    """

    memory: int

    @property
    def progress(self) -> Progress: ...

    @property
    def prepared(self) -> bool: ...

    @prepared.setter
    def prepared(self, done: bool) -> None: ...

    def request(self) -> int:
        """What is requested of this worker at the end of a step: progress_table.RUNNING, STOP, REGROUP or FINISH.
        Only worker 0 sees FINISH, and it calls this after observers have seen all its events."""
        ...

    def tell(self, event: events.Event) -> None:
        """Pass on what happened. Worker 0 does."""
        ...

    def save(self, state: TrainState, facts: Mapping[str, Any], folder: Path, keep: int) -> None:
        """Begin to write the committed state into the run folder; every worker calls this. Waits while the one before
        is being written. A failure is reported as a warning, and training goes on."""
        ...

    def settle(self) -> bool:
        """Wait until what was begun is written; return whether it was."""
        ...


class UnsupervisedClient:
    """The supervisor client of a worker without a supervisor. `observers` get events on worker 0 only."""

    progress: Progress = UNWATCHED
    memory = -1
    prepared = False

    def __init__(self, observers: Sequence[events.Observer], request: Callable[[], int]) -> None:
        self._observers = observers
        self._request = request
        self._is_asked_to_finish = False
        self._writer = BackgroundWriter(self.tell)

    def request(self) -> int:
        request = self._request()
        return FINISH if request == RUNNING and self._is_asked_to_finish else request

    def tell(self, event: events.Event) -> None:
        for observer in self._observers:
            if observer.observe(event) == events.STOP:
                self._is_asked_to_finish = True

    def save(self, state: TrainState, facts: Mapping[str, Any], folder: Path, keep: int) -> None:
        self._writer.save(state, facts, folder, keep)

    def settle(self) -> bool:
        return self._writer.settle()

    def close(self) -> None:
        """Close the observers: this is the end."""
        self._writer.close()
        for observer in self._observers:
            observer.close()
