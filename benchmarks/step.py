"""Samples per second of training: unisono against a plain DistributedDataParallel loop (`peer.py`).

    python benchmarks/step.py               all rows
    python benchmarks/step.py minilm bag    the rows of these workloads

The same model, precision, samples and workers; unisono commits every step to its snapshot. Runs alternate, A B A B, so
that what else the machine does falls on both; the ratio is the median of the ratios of neighbours.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median

import peer
import torch
from record import Cell, Spread, record
from workloads import WORKLOADS, Workload
from world import WORKERS, in_plain, in_unisono

from unisono.data.feed import Feed
from unisono.engine.contribution import Contributes, Contributor
from unisono.engine.loop import steps
from unisono.exchange.protocol import Exchange
from unisono.processes.progress_table import RUNNING
from unisono.runtime.setup import Job, join, make_ready
from unisono.runtime.supervisor_client import UnsupervisedClient
from unisono.tasks.own_inputs import open_own

REPEATS = 3
ROWS = (
    ("minilm", "float32", 8),
    ("minilm", "bf16", 8),
    ("minilm", "bf16", 2),
    ("minilm-real", "bf16", 8),
    ("transformer", "float32", 8),
    ("transformer", "float32", 2),
    ("bag", "float32", 8),
    ("bag", "float32", 2),
)
"""Workload, precision, unisono's microbatches a step. DDP takes one pass per worker and step, as 2 microbatches do."""


class SupervisedClient(UnsupervisedClient):
    """The link of a worker that leaves its state in a snapshot, though nobody watches over it."""

    def __init__(self, memory: int) -> None:
        super().__init__((), lambda: RUNNING)
        self.memory = memory


@contextmanager
def training(
    workload: Workload, exchange: Exchange, memory: int, mark: Callable[[Contributor], Contributes] | None = None
) -> Iterator[Iterator[object]]:
    """One worker of unisono, ready to train; each step that is taken from the iterator has been committed. `mark`
    replaces the contributor."""
    recipe = workload.recipe
    train = recipe.train
    recipe = recipe.model_copy(update={"train": train.model_copy(update={"epochs": 10_000.0})})
    with tempfile.TemporaryDirectory() as folder:
        inputs = open_own(recipe, workload.task, workload.samples)
        job = Job(recipe=recipe, folder=Path(folder))
        ready = make_ready(job, inputs, torch.device("cpu"))
        run = join(job, ready, exchange, SupervisedClient(memory))
        feed = Feed(inputs.train, run.order, ready.device)
        contributor = run.contributor if mark is None else mark(run.contributor)
        yield steps(run.state, run.order, feed, contributor, train)
        feed.close()


def train(workload: Workload, exchange: Exchange, memory: int) -> float:
    """Train the workload's steps on one worker of unisono; return the seconds that they took."""
    with training(workload, exchange, memory) as done:
        for _ in islice(done, workload.warm_up):
            pass
        exchange.wait_for_all()
        started = time.perf_counter()
        for _ in islice(done, workload.steps):
            pass
        exchange.wait_for_all()
        return time.perf_counter() - started


def compare(workload: Workload) -> dict[str, Cell]:
    """Alternate the two sides; one row of the table."""
    samples = workload.steps * workload.recipe.train.samples_per_step
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(REPEATS):
        ours.append(samples / in_unisono(lambda exchange, memory: train(workload, exchange, memory)))
        theirs.append(samples / in_plain(lambda rank, workers: peer.train(workload, rank, workers)))
    return {
        "workload": workload.name,
        "microbatches": workload.recipe.train.microbatches,
        "unisono, samples/s": Spread(values=tuple(ours)),
        "DDP, samples/s": Spread(values=tuple(theirs)),
        "unisono / DDP": round(median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
    }


def main(names: list[str]) -> None:
    """Measure the rows of the named workloads, or all."""
    rows = []
    for name, precision, microbatches in ROWS:
        if not names or name in names:
            rows.append(compare(WORKLOADS[name](precision, microbatches)))
            print(
                rows[-1]["workload"], rows[-1]["microbatches"], rows[-1]["unisono / DDP"], file=sys.stderr, flush=True
            )
    record("step", f"A step of training, {WORKERS} workers with 1 thread each, {REPEATS} alternating repeats", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
