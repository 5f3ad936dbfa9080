"""Where tasks are run, as `sharing.py` sees it.

Owns the interfaces. `local.py` runs tasks in processes of this host, `cluster.py` on a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from unisono.parallel.item_batches import ItemBatch, ItemFault, MapJob, Outcome


class Pool(Protocol):
    """Workers of one call."""

    def capacity(self, ahead: bool) -> int:
        """How many batches can be submitted now: one for each idle worker; with `ahead`, one more for each that is not,
        so that it never waits."""
        ...

    def submit(self, batch: ItemBatch) -> list[ItemFault]:
        """Have some worker run a batch. Returns faults for the items that cannot be sent; the others are sent."""
        ...

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """Return what has come back, as soon as there is something, at the latest after `seconds`. Lost workers are
        replaced."""
        ...

    def close(self, at_once: bool) -> None:
        """End all workers; `at_once`, also those at work."""
        ...


class Engine(Protocol):
    """A kind of workers."""

    inherits: bool
    """Whether workers see the caller's memory as it was when the call began, and share what it shares."""

    def count(self, workers: int | str) -> int:
        """How many workers "auto" are."""
        ...

    def start(self, job: MapJob, workers: int, timeout_seconds: float | None) -> Pool:
        """Start workers for a job."""
        ...
