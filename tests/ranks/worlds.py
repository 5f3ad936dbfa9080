"""Real workers for a test, forked processes; and a run as a worker without supervisor has it."""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from unisono.exchange.protocol import Exchange
from unisono.processes.progress_table import RUNNING
from unisono.runtime.launchers.fork import launch
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.run import execute
from unisono.runtime.setup import Job, make_ready
from unisono.runtime.supervisor_client import UnsupervisedClient
from unisono.runtime.worker import Stop
from unisono.tasks.run_inputs import RunInputs
from unisono.tracking.events import Event, Notice, Observer, RunEnded, StepDone

CPU = torch.device("cpu")
Forked = Callable[[int, Callable[[Exchange], Any]], list[Any]]
DEADLINE_SECONDS = 240
"""Ends a world that hangs, on a busy machine too; no result depends on it."""


class Heard:
    """Hears a run: every loss and norm to the bit, and the warnings; leaves summary.json as the ledger does."""

    def __init__(self, folder: Path) -> None:
        self.losses: list[str] = []
        self.warnings: list[str] = []
        self._folder = folder

    def observe(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self.losses.append(f"{event.loss.hex()} {event.gradient_norm.hex()}")
        elif isinstance(event, Notice) and event.warning:
            self.warnings.append(event.message)
        elif isinstance(event, RunEnded):
            (self._folder / "summary.json").write_text(json.dumps(dict(event.summary)), encoding="utf-8")

    def close(self) -> None:
        pass


def train_alone(
    job: Job,
    inputs: RunInputs,
    exchange: Exchange,
    observers: Sequence[Observer],
    request: Callable[[], int] = lambda: RUNNING,
) -> None:
    """One worker's part in a run that nobody watches over."""
    client = UnsupervisedClient(observers, request)
    try:
        assert execute(job, make_ready(job, inputs, CPU), exchange, client)
    finally:
        client.close()


def fork(workers: int, function: Callable[[Exchange], Any], folder: Path) -> list[Any]:
    """Call `function(exchange)` in each worker; return their (JSON) results in order of rank."""

    def act(assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop) -> None:
        faulthandler.dump_traceback_later(DEADLINE_SECONDS - 5, file=sys.__stderr__)  # where does it hang?
        (folder / f"{assignment.rank}.json").write_text(json.dumps(function(exchange)), encoding="utf-8")

    with _deadline(DEADLINE_SECONDS):
        launch(workers, act, threads=1, device="cpu")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(workers)]


@contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    """Make a hanging world fail instead of hanging the tests."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the forked workers have not ended after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
