"""A worker's part in a run, through all the groups of workers that it belongs to.

Owns what a worker keeps from one group to the next: its inputs, and the model that it has built. `run.py` does the work
of one group.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unisono.engine import numerics
from unisono.exchange.protocol import Exchange
from unisono.runtime.run import execute
from unisono.runtime.setup import Job, Ready, leave_alone, make_ready
from unisono.runtime.supervisor_client import SupervisorClient
from unisono.storage import known_hashes
from unisono.tasks.run_inputs import RunInputs
from unisono.tracking import events

OpenInputs = Callable[[int, Callable[[str], None]], RunInputs]
"""How a worker gets its inputs: (workers of this host, what prints a notice) → inputs. A notice that begins with
"warning: " is a warning."""


class Runner:
    """A worker's part in a run, through all the groups of workers that it belongs to. `on_built` is called with
    what the task has built, before anything is done to it. hashes: the file by which workers of a host pass on what one
    of them has verified."""

    def __init__(self, job: Job, open_inputs: OpenInputs, hashes: Path) -> None:
        self.on_built: Callable[[Any], None] = leave_alone
        self._job = job
        self._open_inputs = open_inputs
        self._hashes = hashes
        self._inputs: RunInputs | None = None
        self._ready: Ready | None = None

    def warm(self, device: torch.device, workers: int, client: SupervisorClient) -> None:
        """Before it belongs to a group: prepare what needs no other worker."""
        if client.prepared:
            self._make_ready(device, workers)

    def train(
        self,
        exchange: Exchange,
        device: torch.device,
        client: SupervisorClient,
        *,
        local_rank: int,
        local_workers: int,
        again: bool,
    ) -> bool:
        """Take part in a group; as `execute`. The first worker of each host prepares the data, the others open it.
        `again`: there has been a group before."""
        client.progress.at("prepare")
        if again and client.memory < 0:  # no snapshot: like a run that is resumed, with a module as it was built
            client.settle()
            self._ready, self._job = None, dataclasses.replace(self._job, resume="auto")
        if local_rank == 0 and self._inputs is None:
            tell = client.tell if exchange.rank == 0 else lambda event: None
            known_hashes.forget()
            self._open(local_workers, lambda line: tell(_as_notice(line)))
            known_hashes.pass_on(self._hashes)
            client.prepared = True
        exchange.wait_for_all()
        places = exchange.gather_bytes(os.fsencode(self._hashes))  # one for all, except under torchrun
        self._hashes = Path(os.fsdecode(places[exchange.rank - local_rank]))
        return execute(self._job, self._make_ready(device, local_workers), exchange, client)

    def _open(self, workers: int, notify: Callable[[str], None]) -> RunInputs:
        settings = numerics.Settings()
        self._inputs = self._open_inputs(workers, notify)
        settings.keep()  # items are the user's code
        return self._inputs

    def _make_ready(self, device: torch.device, workers: int) -> Ready:
        if self._inputs is None:
            known_hashes.take_over(self._hashes)
        inputs = self._inputs or self._open(workers, lambda line: None)
        if self._ready is None:
            self._ready = make_ready(self._job, inputs, device, self.on_built)
        return self._ready


def _as_notice(line: str) -> events.Notice:
    message = line.removeprefix("warning: ")
    return events.Notice(message=message, warning=message != line)
