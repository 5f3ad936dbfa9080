"""Peer: a DistributedDataParallel loop under torchrun, as most people write it; and as its own advice tunes it.

Tuned: gradients live in the buckets (`gradient_as_bucket_view`), the graph is declared static, AdamW is fused, a global
batch holds samples of like length. What the allocator keeps is set by environment variables, see `sides.py`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from task import Journal, LikeLengths, Samples, Task, build, finish, group, pad, settle
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler


def main() -> None:
    """Train the task's steps in this worker."""
    task = Task.read()
    settle()
    dist.init_process_group("gloo")
    rank, tuned = dist.get_rank(), task.variant == "tuned"
    torch.manual_seed(task.seed + rank)
    samples = Samples(task.tokens)
    sampler = None
    if tuned:
        loader = DataLoader(samples, batch_sampler=LikeLengths(task, samples, rank), collate_fn=pad)
    else:
        sampler = DistributedSampler(samples, seed=task.seed)
        loader = DataLoader(samples, task.samples_per_worker, sampler=sampler, collate_fn=pad, drop_last=True)
    module = build(task)
    model = DistributedDataParallel(module, gradient_as_bucket_view=tuned, static_graph=tuned)
    optimizer = torch.optim.AdamW(group(task, module), lr=task.learning_rate, fused=tuned or None)
    journal = Journal(task, rank)
    step, epoch, losses = 0, 0, torch.zeros(())
    while step < task.steps:
        if sampler is not None:
            sampler.set_epoch(epoch)
        for batch in loader:
            with task.autocast():
                loss = model(**batch).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses += loss.detach()
            step += 1
            journal.add(step)
            if step == task.steps:
                break
        epoch += 1
    if rank == 0:
        finish(task, module, float(losses) / step)
    dist.barrier()  # without it, gloo's last work sometimes waits for Python's lock while its group is torn down
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
