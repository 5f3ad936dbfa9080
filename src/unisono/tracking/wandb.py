"""Weights & Biases: one W&B run per run folder, online or offline.

W&B's own settings apply (WANDB_MODE, WANDB_API_KEY, WANDB_ENTITY, …). Without a key and without WANDB_MODE it records
offline, since it could not prompt a user for a key. Owns the form of a run in W&B.
"""

from __future__ import annotations

import os
import uuid
from typing import Any, Literal

from unisono.tracking import events
from unisono.tracking.logger import LoggerContext, describe, flatten, measure

ID = "run_id"


class WandbLogger:
    """A run in W&B. A resumed run folder keeps its id: online the run continues on the server; offline in a further
    folder, which `wandb sync` joins to the first. Steps have unisono's numbers, and W&B refuses a step that it has."""

    def __init__(self, context: LoggerContext) -> None:
        import wandb

        context.folder.mkdir(parents=True, exist_ok=True)
        mode: Literal["offline"] | None = None if os.environ.get("WANDB_MODE") or wandb.api.api_key else "offline"
        is_offline = (mode or os.environ.get("WANDB_MODE")) == "offline"
        identity = context.memory.setdefault(ID, uuid.uuid4().hex[:12])
        self._run: Any = wandb.init(
            project=context.project,
            id=identity,
            name=context.run_folder.name,
            resume=None if is_offline else "allow",
            dir=context.folder,
            mode=mode,
            config=dict(context.recipe),
            settings=wandb.Settings(silent=True, console="off"),
        )
        if self._run.resumed:  # the server has the exact step
            context.cursor.reach("train", self._run.starting_step - 1)
        self._has_ended = False

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RunEnded):
            self._has_ended = True
            self._run.summary.update(flatten(event.summary))
        elif told := describe(event):
            kind, sentence, step = told
            self._run.summary[f"{kind} at step {step}"] = sentence  # a key each: a resumed run keeps the earlier ones
            if kind != "checkpoint":
                self._run.tags = (*(self._run.tags or ()), kind)
        elif numbers := measure(event):
            self._run.log(numbers, step=event.step)  # type: ignore[union-attr]

    def flush(self) -> None:
        return  # W&B's own process has it, and offers no call that waits

    def close(self) -> None:
        self._run.finish(exit_code=0 if self._has_ended else 1)


def open_logger(context: LoggerContext) -> WandbLogger:
    """Begin or continue the run's log."""
    return WandbLogger(context)
