"""The events of a run: typed records, and the interface of the observers that receive them.

Owns the records' fields, and how an observer requests the end. The terminal, the ledger, the loggers and a user's own
callbacks are all observers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """The run's workers, data and sizes. Sizes are counts; `fingerprint` is the short form."""

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
    """One committed step, numbered from 1. `tokens`: the sum of its samples' lengths. `seconds`: since the step before,
    or since the work between the two. `data_seconds`: the part of them in which worker 0 waited for data."""

    step: int
    epoch: float
    loss: float
    gradient_norm: float
    learning_rate: float
    samples: int
    tokens: int
    seconds: float
    data_seconds: float = 0.0


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
    """The whole state after `step` steps is on disk, at `path`. Writing took `seconds` in the background; training
    waited `waited_seconds` of them."""

    step: int
    path: str
    seconds: float = 0.0
    waited_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """Training goes on from committed step `step` after a loss, with `workers` workers.

    what: the loss in words, every lost worker named. wasted_seconds: work on a step that was not finished. seconds:
    from the notice of the loss until all workers had joined again. trace: where in the code a worker raised or crashed,
    the last lines of its traceback; "" where it did neither.
    """

    step: int
    what: str
    workers: int
    wasted_seconds: float
    seconds: float
    trace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """Training goes on from committed step `step` with `workers` workers instead of `before`; it was stopped for
    `seconds`."""

    step: int
    before: int
    workers: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrupted:
    """An audit found that two workers computed different bits for microbatch `microbatch` of step `step`.

    workers: the suspected ones. parameters: names of those that differ. The step was not committed.
    """

    step: int
    microbatch: int
    workers: list[int]
    parameters: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A message to the user."""

    message: str
    warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded:
    """The run is complete, in `folder`; `summary` is what summary.json holds."""

    folder: str
    summary: Mapping[str, Any]


Event = RunStarted | StepDone | Evaluated | CheckpointWritten | Recovered | Resized | Corrupted | Notice | RunEnded


STOP: Final = "stop"
"""`Observer.observe` returns it to end the run: the next step is the last; then the model is tested and exported."""


class Observer(Protocol):
    """Receives the events of a run, in order. It never changes what a step computes.

    `observe` runs in the supervisor's process (under torchrun in worker 0's), so it should be quick. After it returns
    STOP, the run ends normally once the next step is done. `close` is called once, however the run ends.
    """

    def observe(self, event: Event) -> Literal["stop"] | None: ...

    def close(self) -> None: ...
