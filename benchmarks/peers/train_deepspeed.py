"""Peer: DeepSpeed with ZeRO stage 1 on CPUs, under torchrun: its engine, its AdamW, its loader.

Its first start compiles the CPU kernels that it uses (AdamW, shared-memory collectives).
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from task import Journal, Samples, Task, build, finish, group, pad, settle


def configure(task: Task) -> dict[str, object]:
    """DeepSpeed's own configuration."""
    return {
        "train_batch_size": task.samples_per_step,
        "train_micro_batch_size_per_gpu": task.samples_per_worker,
        "zero_optimization": {"stage": 1},
        "torch_autocast": {"enabled": task.precision == "bf16", "dtype": "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": task.learning_rate, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": task.weight_decay},
        },
        "dataloader_drop_last": True,
        "steps_per_print": 1_000_000,
    }


def main() -> None:
    """Train the task's steps in this worker."""
    task = Task.read()
    settle()
    deepspeed.init_distributed(dist_backend="gloo")
    rank = dist.get_rank()
    torch.manual_seed(task.seed + rank)
    module = build(task)
    engine, _, loader, _ = deepspeed.initialize(
        model=module,
        model_parameters=group(task, module),
        training_data=Samples(task.tokens),
        collate_fn=pad,
        config=configure(task),
    )
    journal = Journal(task, rank)
    step, losses = 0, torch.zeros(())
    while step < task.steps:
        for batch in loader:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses += loss.detach()
            step += 1
            journal.add(step)
            if step == task.steps:
                break
    if rank == 0:
        finish(task, module, float(losses) / step)
    dist.barrier()  # without it, gloo's last work sometimes waits for Python's lock while its group is torn down
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
