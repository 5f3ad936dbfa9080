"""Peer: Lightning's Trainer under torchrun, with the DDP settings that its documentation calls optimizations."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from task import Journal, Samples, Task, build, finish, group, pad, settle
from torch import Tensor
from torch.utils.data import DataLoader


class Module(LightningModule):
    """transformers' model; its loss is reported at the end, as Lightning averages it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.module = build(task)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Return the mean loss of this worker's samples."""
        loss = self.module(**batch).loss
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The same optimiser as everybody's."""
        return torch.optim.AdamW(group(self.task, self.module), lr=self.task.learning_rate)


class Notes(Callback):
    """Notes finished steps in the journal."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._journal: Journal | None = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """The optimiser has made its step."""
        self._journal = self._journal or Journal(self._task, trainer.global_rank)
        self._journal.add(trainer.global_step)


def main() -> None:
    """Train the task's steps in this worker."""
    task = Task.read()
    settle()
    seed_everything(task.seed, verbose=False)
    module = Module(task)
    loader = DataLoader(
        Samples(task.tokens), task.samples_per_worker, shuffle=True, collate_fn=pad, drop_last=True
    )  # the Trainer puts a DistributedSampler in
    trainer = Trainer(
        accelerator="cpu",
        devices=task.workers,
        strategy=DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True, static_graph=True),
        precision="bf16-mixed" if task.precision == "bf16" else "32-true",
        max_steps=task.steps,
        callbacks=[Notes(task)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=task.scratch,
    )
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        finish(task, module.module, float(trainer.callback_metrics["loss"]))


if __name__ == "__main__":
    main()
