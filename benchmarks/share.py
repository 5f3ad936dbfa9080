"""Which share of the processor's matrix products a step of training reaches.

    python benchmarks/share.py

Steps and bare matrix products take turns in the same workers, so that a processor whose speed changes from second to
second is compared with itself: each step with the products before and after it. All workers multiply at once, as they
train. Counted are the operations that a step computes, from the tensors that it multiplies: what a model leaves out
counts for nothing, what it computes twice would count twice.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice, pairwise
from statistics import median
from typing import Any

import torch
from record import Cell, Spread, record
from step import training
from torch import Tensor
from workloads import WORKLOADS, Workload
from world import WORKERS, in_unisono

from unisono.backends.torch_footprint import count_flop
from unisono.engine.contribution import Contributes, Contribution, Contributor
from unisono.exchange.protocol import Exchange
from unisono.kernels.linear import multiplies_bf16

ROWS = (
    ("minilm-news", "float32", 2),
    ("minilm-news", "bf16", 2),
    ("minilm-news", "float32", 8),
    ("minilm-news", "bf16", 8),
)
SIZES = (1024, 2048)
"""Rows and columns of the square matrices; the better of the two counts."""
PAUSE_SECONDS = 0.5


class Kept:
    """Takes a contributor's place, and keeps what it was given: (step, number) → microbatch."""

    def __init__(self) -> None:
        self.given: dict[tuple[int, int], dict[str, Tensor]] = {}

    def mark(self, inner: Contributor) -> Contributes:
        """Stand before this one."""
        self._inner = inner
        return self

    def contribute(self, step: int, number: int, microbatch: dict[str, Tensor]) -> Contribution:
        """As the inner one does."""
        self.given[step, number] = microbatch
        return self._inner.contribute(step, number, microbatch)

    def again(self, step: int, number: int) -> Contribution:
        """Compute one once more."""
        return self._inner.contribute(step, number, self.given[step, number])


def multiply(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP per second of torch.mm for a while: of the better size in the median, and at best."""
    rates: dict[int, list[float]] = {}
    for size in SIZES:
        left = torch.ones(size, size, dtype=dtype)
        product = torch.mm(left, left)
        stop = time.perf_counter() + PAUSE_SECONDS / len(SIZES)
        while (began := time.perf_counter()) < stop:
            torch.mm(left, left, out=product)
            rates.setdefault(size, []).append(2 * size**3 / (time.perf_counter() - began))
    return max(map(median, rates.values())), max(map(max, rates.values()))


def take_turns(workload: Workload, exchange: Exchange, memory: int) -> dict[str, Any]:
    """Steps and products in turns on one worker: FLOP per second of each."""
    dtype = torch.bfloat16 if workload.recipe.train.precision == "bf16" and multiplies_bf16() else torch.float32
    kept = Kept()
    with training(workload, exchange, memory, kept.mark) as done:
        for _ in islice(done, workload.warm_up):
            pass
        kept.given.clear()
        products, seconds = [multiply(dtype)], []
        for _ in range(workload.steps):
            exchange.wait_for_all()
            started = time.perf_counter()
            next(done)
            exchange.wait_for_all()
            seconds.append(time.perf_counter() - started)
            products.append(multiply(dtype))
        flop: Counter[int] = Counter()
        for step, number in kept.given:
            flop[step] += count_flop(partial(kept.again, step, number))
    return {"steps": [flop[step] / b for step, b in zip(sorted(flop), seconds, strict=True)], "products": products}


def judge(workload: Workload, found: dict[str, Any]) -> dict[str, Cell]:
    """One row of the table."""
    steps, (usual, best) = found["steps"], zip(*found["products"], strict=True)
    beside = [(before + after) / 2 for before, after in pairwise(usual)]

    def billions(values: Sequence[float]) -> Spread:
        return Spread(values=tuple(value / 1e9 for value in values))

    share = Spread(values=tuple(100 * step / product for step, product in zip(steps, beside, strict=True)))
    print(workload.name, workload.recipe.train.microbatches, share, file=sys.stderr, flush=True)
    return {
        "workload": workload.name,
        "microbatches": workload.recipe.train.microbatches,
        "steps, GFLOP/s a worker": billions(steps),
        "products, GFLOP/s": billions(usual),
        "at best": round(max(best) / 1e9, 1),
        "share, %": share,
        "share of the best, %": round(100 * median(steps) / max(best), 1),
    }


def main() -> None:
    """Measure all rows."""
    rows = []
    for name, precision, microbatches in ROWS:
        workload = WORKLOADS[name](precision, microbatches)
        rows.append(judge(workload, in_unisono(lambda exchange, memory: take_turns(workload, exchange, memory))))  # noqa: B023
    products = "bfloat16" if multiplies_bf16() else "float32 (no instructions for bfloat16 here)"
    record("share", f"Steps beside matrix products, {WORKERS} workers with 1 thread each; bf16 beside {products}", rows)


if __name__ == "__main__":
    main()
