"""Workers that note when they pass their phases, under unisono's supervisor and without one.

Owns the notes: a file in which every worker adds a line per phase, each line one write, so that a SIGKILL leaves no
half of one. What is trained is handed in, and nothing of it is changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unisono.config.recipe import Recipe
from unisono.exchange.protocol import Exchange
from unisono.runtime.launchers.fork import launch
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.runner import OpenInputs, Runner
from unisono.runtime.setup import Job
from unisono.runtime.supervisor import Supervisor
from unisono.runtime.supervisor_client import SupervisorClient, UnsupervisedClient
from unisono.runtime.worker import Stop
from unisono.tracking import events
from unisono.tracking.reporter import Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A worker is about to do something. step: from 1; 0 for none. team: changes when the group of workers does."""

    rank: int
    workers: int
    team: int
    phase: str
    step: int
    time: float


Note = Callable[[Mark], None]


class MarkedTrainee(Runner):
    """A worker's part in a run, of which `note` hears in that worker's process; before all else, that it joins."""

    def __init__(self, job: Job, open_inputs: OpenInputs, note: Note) -> None:
        super().__init__(job, open_inputs)
        self._note = note

    def train(self, exchange: Exchange, device: torch.device, client: SupervisorClient, **place: Any) -> bool:
        before = client.progress
        client.progress = marked = _Marked(before, self._note, exchange)  # type: ignore[misc]
        marked.at("join")
        try:
            return super().train(exchange, device, client, **place)
        finally:
            client.progress = before  # type: ignore[misc]


class _Marked:
    """A `Progress` that says everything twice."""

    def __init__(self, progress: Any, note: Note, exchange: Exchange) -> None:
        self._progress, self._note, self._exchange = progress, note, exchange

    def __getattr__(self, name: str) -> Any:
        return getattr(self._progress, name)

    def at(self, phase: str, step: int = -1, microbatch: int = -1) -> None:
        self._progress.at(phase, step, microbatch)
        if phase != "contribute" and phase != "load":
            self._note(
                Mark(
                    rank=self._exchange.rank,
                    workers=self._exchange.workers,
                    team=getattr(self._progress, "generation", 0),
                    phase=phase,
                    step=step + 1,
                    time=time.time(),
                )
            )


class Notebook:
    """The file with all workers' marks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def note(self, mark: Mark) -> None:
        """Add a mark."""
        line = f"{mark.rank} {mark.workers} {mark.team} {mark.phase} {mark.step} {mark.time:.6f}\n"
        os.write(self._file, line.encode())

    def read(self) -> list[Mark]:
        """All marks so far."""
        return [_parse(line) for line in self._path.read_text(encoding="utf-8").splitlines()]


class Heard:
    """An observer that keeps all events."""

    def __init__(self) -> None:
        self.events: list[events.Event] = []

    def observe(self, event: events.Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        return


class _Both:
    """Several observers as one."""

    def __init__(self, observers: Sequence[events.Observer]) -> None:
        self._observers = observers

    def observe(self, event: events.Event) -> None:
        for observer in self._observers:
            observer.observe(event)

    def close(self) -> None:
        for observer in self._observers:
            observer.close()


def train_supervised(
    recipe: Recipe,
    open_inputs: OpenInputs,
    folder: Path,
    note: Note,
    *,
    workers: int,
    heard: Heard | None = None,
) -> None:
    """Train as every user does: a supervisor, its snapshot, a ledger."""
    job = Job(recipe=recipe, folder=folder)
    observer = _Both([Reporter(folder, quiet=True, as_json=False), *([heard] if heard else [])])
    runner = MarkedTrainee(job, open_inputs, note)
    try:
        Supervisor(runner, recipe=recipe, folder=folder, observer=observer, workers=workers).run()
    finally:
        observer.close()


def train_alone(recipe: Recipe, open_inputs: OpenInputs, folder: Path, note: Note, *, workers: int) -> None:
    """Train with the same engine and ledger, but with nobody watching and no snapshot: weights are updated in place."""
    runner = MarkedTrainee(Job(recipe=recipe, folder=folder), open_inputs, note)

    def act(assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop) -> None:
        observers = [Reporter(folder, quiet=True, as_json=False)] if assignment.rank == 0 else []
        client = UnsupervisedClient(observers, stop)
        place = {"local_rank": assignment.local_rank, "local_workers": assignment.local_workers, "again": False}
        runner.train(exchange, device, client, **place)
        client.close()

    launch(workers, act, threads=recipe.train.threads, device="cpu")


def step_seconds(marks: Sequence[Mark], rank: int = 0) -> dict[int, float]:
    """Step → seconds from its beginning to the next one's, on one worker of one group."""
    begun = {mark.step: mark.time for mark in marks if mark.rank == rank and mark.phase == "begin"}
    return {step: begun[step + 1] - time for step, time in begun.items() if step + 1 in begun}


def _parse(line: str) -> Mark:
    rank, workers, team, phase, step, when = line.split()
    return Mark(rank=int(rank), workers=int(workers), team=int(team), phase=phase, step=int(step), time=float(when))
