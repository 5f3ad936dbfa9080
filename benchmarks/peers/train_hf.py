"""Peer: transformers' Trainer under torchrun, as its documentation sets it up for CPUs.

Variants: "grouped" groups samples by length (`train_sampling_strategy`); "as it comes" leaves
`average_tokens_across_devices` at its default, with which loss and gradient are multiplied by the number of workers.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from task import Journal, Samples, Task, build, finish, pad, settle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Notes(TrainerCallback):
    """Notes finished steps in the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimiser has made its step."""
        self._journal.add(state.global_step)


def main() -> None:
    """Train the task's steps in this worker."""
    task = Task.read()
    settle()
    arguments = TrainingArguments(
        output_dir=task.scratch,
        use_cpu=True,
        ddp_backend="gloo",
        bf16=task.precision == "bf16",
        max_steps=task.steps,
        per_device_train_batch_size=task.samples_per_worker,
        dataloader_drop_last=True,
        train_sampling_strategy="group_by_length" if task.variant == "grouped" else "random",
        average_tokens_across_devices=task.variant == "as it comes",
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=task.weight_decay,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=task.seed,
    )
    module = build(task)
    journal = Journal(task, arguments.process_index)
    samples = Samples(task.tokens)
    trainer = Trainer(
        model=module, args=arguments, train_dataset=samples, data_collator=pad, callbacks=[Notes(journal)]
    )
    loss = trainer.train().training_loss
    if arguments.process_index == 0:
        finish(task, module, loss)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
