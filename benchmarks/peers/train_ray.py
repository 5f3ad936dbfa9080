"""Peer: Ray Train's TorchTrainer on CPUs: the plain loop, with model and loader prepared by Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ray
import torch
from ray import train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, prepare_data_loader, prepare_model
from task import Journal, Samples, Task, build, finish, group, pad, settle
from torch.utils.data import DataLoader, DistributedSampler


def work(settings: dict[str, object]) -> None:
    """Train the task's steps in this worker."""
    task = Task(**settings)
    settle()
    rank = train.get_context().get_world_rank()
    torch.manual_seed(task.seed + rank)
    loader = DataLoader(Samples(task.tokens), task.samples_per_worker, shuffle=True, collate_fn=pad, drop_last=True)
    loader = prepare_data_loader(loader)
    module = build(task)
    model = prepare_model(module)
    optimizer = torch.optim.AdamW(group(task, module), lr=task.learning_rate)
    journal = Journal(task, rank)
    step, epoch, losses = 0, 0, torch.zeros(())
    while step < task.steps:
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            with task.autocast():
                loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += loss.detach()
            step += 1
            journal.add(step)
            if step == task.steps:
                break
        epoch += 1
    train.report({"loss": float(losses) / step})
    if rank == 0:
        finish(task, module, float(losses) / step)


def main() -> None:
    """Start Ray on this host, and train."""
    task = Task.read()
    ray.init(
        num_cpus=task.workers,
        _temp_dir=str(Path(task.scratch) / "ray"),
        log_to_driver=False,
    )
    TorchTrainer(
        work,
        train_loop_config=json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")),
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=task.workers, use_gpu=False),
        run_config=RunConfig(storage_path=task.scratch),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main()
