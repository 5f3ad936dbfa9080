"""What ties a worker to whoever watches over it: where events go, who writes checkpoints, what is asked of it.

Owns the interface, and `UnsupervisedClient`, for a worker without a supervisor (under torchrun): it tells its own
observers, writes checkpoints in a thread of its own, and is asked by signals. The other one is in `launch/handle.py`.
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
    """A worker's tie to its supervisor, or to nobody.

    progress: where it says what it is about to do. memory: file descriptor of the run's snapshot; −1: there is none.
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
        """What is asked of this worker at the end of a step: progress_table.RUNNING, STOP, REGROUP or FINISH.
        Of FINISH only worker 0 knows, and it asks once observers have seen all that it told."""
        ...

    def tell(self, event: events.Event) -> None:
        """Pass on what happened. Worker 0 does."""
        ...

    def save(self, state: TrainState, facts: Mapping[str, Any], folder: Path, keep: int) -> None:
        """Begin to write the committed state to disk; every worker calls this. Waits while the one before is being
        written. A failure is told as a warning, and training goes on."""
        ...

    def settle(self) -> bool:
        """Wait until what was begun is written; return whether it was."""
        ...


class UnsupervisedClient:
    """The link of a worker without a supervisor. `observers` listen on worker 0 only."""

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
        """Tell observers that this is the end."""
        self._writer.close()
        for observer in self._observers:
            observer.close()
