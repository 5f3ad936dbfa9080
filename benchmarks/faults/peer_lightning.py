"""Peer: Lightning's Trainer under torchrun, with its own checkpoints and its own way to resume.

Owns what Lightning asks of a user: a module, a stateful loader, the Trainer's arguments. What recovers is torchrun,
as in `peer_ddp.py`; Lightning finds the last checkpoint by itself (`ckpt_path="last"`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from peer_work import Journal, Work, build, load, make_optimizer, settle, workload
from torch import Tensor
from workloads import Workload


class Module(LightningModule):
    """The task's module and loss."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload
        self.module = build(workload)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Return the mean loss of this worker's samples."""
        loss, terms = self.workload.task.loss(self.module, batch)
        return loss / terms

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same optimiser as everybody's."""
        return make_optimizer(self.workload, self.module)


class Batches:
    """This worker's samples of each step; where it stands is part of Lightning's checkpoint."""

    def __init__(self, workload: Workload, steps: int, rank: int, workers: int) -> None:
        self._workload, self._steps, self._rank, self._workers = workload, steps, rank, workers
        self._done = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self._done < self._steps:
            self._done += 1
            yield load(self._workload, self._done - 1, self._rank, self._workers)

    def __len__(self) -> int:
        return (
            self._steps
        )  # a known length spares Lightning from fetching one batch ahead, which would be saved as done

    def state_dict(self) -> dict[str, int]:
        """What Lightning saves."""
        return {"done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """What Lightning gives back."""
        self._done = state["done"]


class Notes(Callback):
    """Notes finished steps in the journal; runs before ModelCheckpoint, which Lightning moves to the end."""

    def __init__(self, journal: Journal, team: str) -> None:
        self._journal, self._team = journal, team

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """The optimiser has made its step."""
        self._journal.add(trainer.global_step, team=self._team, workers=trainer.world_size)


def main() -> None:
    """Train until all steps are done, from the last checkpoint if there is one."""
    work = Work.parse()
    settle()
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    task = workload(work.samples_per_step, work.tokens)
    notes = Notes(Journal(work.journal, rank), os.environ["TORCHELASTIC_RESTART_COUNT"])
    checkpoints = ModelCheckpoint(
        dirpath=work.folder,
        every_n_train_steps=work.checkpoint_every,
        save_last=True,
        save_top_k=0,  # only the last one, so that each step writes one file
        enable_version_counter=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=workers,
        strategy=DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True, static_graph=True),
        precision="32-true",
        max_steps=work.steps,
        callbacks=[notes, checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(task), Batches(task, work.steps, rank, workers), ckpt_path="last")


if __name__ == "__main__":
    main()
