"""The peer: a plain PyTorch DistributedDataParallel loop, tuned as its own documentation advises.

Owns that loop and nothing of unisono's engine. Gradients live in the buckets (`gradient_as_bucket_view`), the graph is
declared static, AdamW is fused, no step waits for a number to print, the next samples are loaded ahead in a thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from workloads import Workload

LAPS = 65_536


def train(workload: Workload, rank: int, workers: int) -> float:
    """Train the workload's steps on one of `workers` processes; return the seconds that they took."""
    recipe = workload.recipe.train
    torch.manual_seed(recipe.seed)
    module = workload.task.build()
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.sparse = False  # torch's AdamW takes no sparse gradients, and there is no fused one that does
    model = DistributedDataParallel(module, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.AdamW(
        _groups(module, recipe.weight_decay), lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True
    )
    model.train()
    microbatches = _load(workload, rank, workers)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            loss, terms = workload.task.loss(model, next(microbatches))
        (loss / terms).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(workload.warm_up):
        step()
    dist.barrier()
    started = time.perf_counter()
    for _ in range(workload.steps):
        step()
    dist.barrier()
    return time.perf_counter() - started


def _groups(module: nn.Module, decay: float) -> list[dict[str, object]]:
    """Biases and norms are spared weight decay, as unisono does."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _load(workload: Workload, rank: int, workers: int) -> Iterator[dict[str, Tensor]]:
    """This worker's share of each step's samples, as DistributedSampler deals them out; the next is loaded ahead."""
    order = np.random.default_rng(workload.recipe.train.seed).permutation(len(workload.samples))
    size = workload.recipe.train.samples_per_step
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for number in range(LAPS):
            first = number * size % (len(order) - size + 1)
            ready, coming = coming, thread.submit(workload.samples.take, order[first : first + size][rank::workers])
            if ready is not None:
                yield ready.result()
