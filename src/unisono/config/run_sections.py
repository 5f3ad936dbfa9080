"""The tables of a recipe about how a run goes on: none of their keys decides a bit.

Owns those keys; the others are in `sections.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unisono.config.sections import Names, Section


class Checkpoint(Section):
    """When the whole state is written to disk."""

    every_steps: int = Field(0, ge=0, description="0: only at the end and on an interrupt")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep")


class Tracking(Section):
    """Where a run is recorded beside its own folder: see docs/tracking.md. No key decides a bit."""

    loggers: Names = Field(
        (), description="tensorboard, wandb, mlflow, or what an installed package offers under unisono.loggers"
    )
    project: str = Field("unisono", min_length=1, description="the project (wandb) or experiment (mlflow) of the run")
    folder: str = Field(
        "", description="where loggers keep their files, shared by several runs; empty: inside the run folder"
    )
    every_steps: int = Field(1, ge=1, description="loggers get step 1 and every so many steps; the rest is in full")


class Recovery(Section):
    """What happens when workers are lost or hang, or when the run must leave the machine. No key decides a bit."""

    on_loss: Literal["replace", "shrink"] = Field(
        "replace", description="replace: start another worker; shrink: the others take its share"
    )
    restarts: int = Field(100, ge=0, description="losses that a run recovers from; 0: the first one ends it")
    attempts: int = Field(
        3,
        ge=1,
        description="losses in a row, no step finished in between, at which the run ends: the fault repeats",
    )
    backoff_seconds: float = Field(
        1.0, ge=0, description="wait before the second attempt at a step; doubled for each further one, up to a minute"
    )
    hang_factor: float = Field(
        20.0,
        ge=0,
        description="a worker that makes no progress for so many times the longest step (one second at least) is lost, "
        "and one that is not ready so many minutes after its start; 0: never",
    )
    grace_seconds: float = Field(
        30.0, gt=0, description="after SIGTERM, SIGUSR1 or Ctrl-C: time to finish the step and write a checkpoint"
    )
