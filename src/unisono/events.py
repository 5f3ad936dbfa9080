"""What happened in a run: typed records, written everywhere, read by whoever shows or keeps them.

Owns the records' fields. `report/` shows and keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """Who does what. Sizes are counts; `fingerprint` is the short form."""

    name: str
    folder: str
    workers: int
    device: str
    threads: int
    microbatches_each: list[int]
    samples_per_step: int
    train_samples: int
    steps: int
    steps_per_epoch: int
    start_step: int
    parameters: int
    fingerprint: str
    pure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One committed step, numbered from 1. `tokens` is the sum of its samples' lengths; `seconds` since the step
    before."""

    step: int
    epoch: float
    loss: float
    gradient_norm: float
    learning_rate: float
    samples: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Scores on a split after `step` steps."""

    step: int
    epoch: float
    split: str
    scores: Mapping[str, float]
    best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWritten:
    """The whole state after `step` steps is on disk, at `path`."""

    step: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that the user should know."""

    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The run is complete, in `folder`; `summary` is what summary.json holds."""

    folder: str
    summary: Mapping[str, Any]


Event = RunStarted | StepDone | Evaluated | CheckpointWritten | Notice | RunEnded


class Observer(Protocol):
    """Reads events; never changes what happens."""

    def observe(self, event: Event) -> None: ...

    def close(self) -> None: ...
