"""Seconds from finished gradients to new weights everywhere, for 22 million float32 parameters.

    python benchmarks/exchange.py

unisono: nodes to their owners, the tree's last additions, the gradient's norm, AdamW on the own shard, the commit to
the snapshot that outlives workers, where everybody reads the new weights. The peer: an all-reduce of
DistributedDataParallel's buckets of 25 MiB, all at once and without copies into them, then fused AdamW on all weights,
no norm and nothing kept. Neither hides anything behind a backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from record import Cell, Spread, record
from torch import Tensor, nn
from world import WORKERS, in_plain, in_unisono

from unisono.backends.torch_backend import TorchBackend
from unisono.config.sections import Train
from unisono.data.order import Step
from unisono.engine.contribution import Contribution
from unisono.engine.optimizer import Optimizer, array_names
from unisono.engine.reduction import Reduction
from unisono.engine.replica import Replica
from unisono.engine.snapshot import SnapshotArrays
from unisono.engine.state import TrainState
from unisono.exchange.protocol import Exchange
from unisono.tasks.task import Microbatch, Task

MATRICES, WIDTH = 84, 512  # 84 × 512 × 512 = 22.0 million
BUCKET = 25 * 2**20 // 4
ROUNDS = 12
REPEATS = 5


def unisono_round(exchange: Exchange, memory: int) -> float:
    """Median seconds of one worker's rounds through unisono's engine."""
    train = Train()
    replica = Replica(TorchBackend(_Matrices(), _module()), rank=exchange.rank, workers=exchange.workers)
    arrays = SnapshotArrays(memory, array_names(train), replica, exchange, most_workers=WORKERS, extra={}, direct=True)
    optimizer, reduction = Optimizer(replica, exchange, train, arrays), Reduction(replica, exchange)
    state = TrainState(step=0, replica=replica, optimizer=optimizer, exchange=exchange)
    state.begin()
    one = np.zeros(1, np.int64)
    step = Step(number=0, epoch=0, microbatches=tuple(one for _ in range(exchange.workers)))
    contribution = Contribution(
        loss=torch.tensor(1.0, dtype=torch.float64),
        terms=1,
        parts=list(_gradients(exchange.rank)),
        integers=torch.empty(0, dtype=torch.int64),
    )

    def prepare() -> None:
        for number in reduction.begin(step):
            reduction.add(number, contribution)
        exchange.wait_for_all()

    def act() -> None:
        gradient, totals = reduction.finish()
        norm = optimizer.update(gradient, totals, step=state.step, rate=1e-3)
        state.commit(state.step + 1, totals, {"loss": totals.loss, "norm": norm, "rate": 1e-3})

    return _time(prepare, act)


def plain_round(rank: int, workers: int) -> float:
    """Median seconds of one process's rounds of all-reduce and AdamW."""
    parameters = list(_module().parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)
    values = torch.cat([gradient.reshape(-1) for gradient in _gradients(rank)])
    bucket = values.clone()
    for parameter, view in zip(parameters, bucket.split(WIDTH * WIDTH), strict=True):
        parameter.grad = view.view(WIDTH, WIDTH)

    def prepare() -> None:
        bucket.copy_(values)
        dist.barrier()

    def act() -> None:
        bucket.div_(workers)
        for work in [dist.all_reduce(part, async_op=True) for part in bucket.split(BUCKET)]:
            work.wait()
        optimizer.step()

    return _time(prepare, act)


class _Matrices(Task):
    """Nothing to learn: gradients are made up."""

    def build(self) -> nn.Module:
        return _module()

    def loss(self, module: nn.Module, microbatch: Microbatch) -> tuple[Tensor, int]:
        raise NotImplementedError

    def measure(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        raise NotImplementedError


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(MATRICES))


def _gradients(rank: int) -> list[Tensor]:
    torch.manual_seed(1 + rank)
    return [torch.randn(WIDTH, WIDTH) for _ in range(MATRICES)]


def _time(prepare: Callable[[], None], act: Callable[[], None]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        prepare()
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return median(seconds[2:])


def main() -> None:
    """Alternate the two sides, and record both."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(REPEATS):
        ours.append(in_unisono(unisono_round) * 1e3)
        theirs.append(in_plain(plain_round) * 1e3)
    row: dict[str, Cell] = {
        "parameters": f"{MATRICES * WIDTH**2:,}",
        "unisono, ms": Spread(values=tuple(ours)),
        "all-reduce and AdamW, ms": Spread(values=tuple(theirs)),
        "peer / unisono": round(median(b / a for a, b in zip(ours, theirs, strict=True)), 3),
    }
    record("exchange", f"Reduce and update, {WORKERS} workers, {REPEATS} alternating repeats", [row])


if __name__ == "__main__":
    main()
