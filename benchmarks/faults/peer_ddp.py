"""Peer: a plain DistributedDataParallel loop under torchrun that writes a checkpoint and resumes from it.

Owns that loop and its checkpoint. What recovers is torchrun: when a process dies it stops the others and starts all of
them anew, and each goes on from the last complete checkpoint.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from peer_work import Journal, Work, build, load, make_optimizer, settle, workload
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Train until all steps are done, from the checkpoint if there is one."""
    work = Work.parse()
    settle()
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    task = workload(work.samples_per_step, work.tokens)
    module = build(task)
    optimizer = make_optimizer(task, module)
    checkpoint = work.folder / "checkpoint.pt"
    done = restore(checkpoint, module, optimizer) if checkpoint.exists() else 0
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, static_graph=True)
    model.train()
    journal, team = Journal(work.journal, rank), os.environ["TORCHELASTIC_RESTART_COUNT"]
    while done < work.steps:
        loss, terms = task.task.loss(model, load(task, done, rank, workers))
        (loss / terms).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        journal.add(done, team=team, workers=workers)
        if rank == 0 and done % work.checkpoint_every == 0:
            save(checkpoint, module, optimizer, done)
    dist.destroy_process_group()


def save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> None:
    """Write a checkpoint that is whole or absent, also after a loss of power."""
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "done": done}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint; return how many steps were done."""
    state = torch.load(path, weights_only=True, mmap=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    return state["done"]


if __name__ == "__main__":
    main()
