"""The interfaces through which `sharing.py` runs tasks.

Owns the interfaces. `local_processes.py` runs tasks in processes of this host, `ray_actors.py` on a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from unisono.parallel.item_batches import ItemBatch, ItemFault, MapJob, Outcome


class Pool(Protocol):
    """Workers of one call."""

    def capacity(self, ahead: bool) -> int:
        """How many batches can be submitted now: one for each idle worker; with `ahead`, also one for each busy
        worker, so that it never waits."""
        ...

    def submit(self, batch: ItemBatch) -> list[ItemFault]:
        """Let a worker run a batch. Returns faults for the items that cannot be sent; the others are sent."""
        ...

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """Return the outcomes that have arrived, as soon as there is one, at the latest after `seconds`. Lost workers
        are replaced."""
        ...

    def close(self, at_once: bool) -> None:
        """End all workers; with `at_once`, also the busy ones."""
        ...


class Engine(Protocol):
    """A kind of workers."""

    inherits: bool
    """Whether workers have the caller's memory as it was when the call began, and share its shared memory."""

    def count(self, workers: int | str) -> int:
        """The number of workers for "auto"."""
        ...

    def start(self, job: MapJob, workers: int, timeout_seconds: float | None) -> Pool:
        """Start workers for a job."""
        ...
