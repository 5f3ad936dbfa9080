"""A slow worker among fast ones: how much of what their speeds allow together a step reaches.

    python benchmarks/faults/straggler.py --repeats 3

Asleep: 4 workers, a step of 64 microbatches that each sleep for a fixed time, twice as long on one worker, so that
cores do not matter. Busy: 2 workers, each held on a core of its own, and on one of the cores another process that
computes, so that half of it is left. Both are compared with even shares, and with the sum of the speeds. The bits are
those of a run in which nobody is slow. Owns the slowness; how work is shared out is the engine's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py and workloads.py
import torch
from marks import Mark, Notebook, step_seconds, train_supervised
from record import Cell, Spread, record
from torch import Tensor, nn
from workloads import transformer

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.tasks.own_inputs import open_own
from unisono.tasks.task import Task

SLOW = 1  # the rank that is slow
FACTOR = 2
ASLEEP_WORKERS, ASLEEP_MICROBATCHES, SLEEP_SECONDS = 4, 64, 0.012
BUSY_WORKERS, BUSY_MICROBATCHES = 2, 32
SETTLED = 40  # steps, after which shares have followed the speeds
ASLEEP_STEPS, BUSY_STEPS = 80, 100

Prepare = Callable[[int], None]


class Sleepy(Task):
    """A small model whose microbatches take their time: `seconds` on most workers, twice that on the slow one."""

    def __init__(self) -> None:
        self.seconds = 0.0  # told to each worker when it joins

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))

    def loss(self, module: nn.Module, microbatch: Any) -> tuple[Tensor, int]:
        time.sleep(self.seconds)
        logits = module(microbatch["input"])
        return nn.functional.cross_entropy(logits, microbatch["label"], reduction="sum"), len(logits)

    def measure(self, module: nn.Module, microbatch: Any) -> dict[str, Tensor]:
        logits = module(microbatch["input"])
        return {"predicted": logits.argmax(1), "label": microbatch["label"]}


def train(recipe: Recipe, task: Task, samples: Any, workers: int, prepare: Prepare) -> tuple[float, str]:
    """Train; return the median seconds of settled steps, and the SHA-256 of weights and optimizer together.

    prepare: what each worker does when it has joined; it is given its rank.
    """
    with tempfile.TemporaryDirectory() as place:
        notebook = Notebook(Path(place) / "marks")

        def note(mark: Mark) -> None:
            if mark.phase == "join":
                prepare(mark.rank)
            if mark.phase == "begin":
                notebook.note(mark)

        open_inputs = lambda number, notify: open_own(recipe, task, samples)  # noqa: E731
        train_supervised(recipe, open_inputs, Path(place) / "run", note, workers=workers)
        summary = json.loads((Path(place) / "run" / "summary.json").read_text(encoding="utf-8"))
        found = step_seconds(notebook.read())
    seconds = median(value for step, value in found.items() if step > SETTLED)
    return seconds, summary["weights_sha256"] + summary["optimizer_sha256"]


def measure_asleep(repeats: int) -> dict[str, Cell]:
    """One of 4 workers sleeps twice as long."""
    task = Sleepy()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, 8, generator=generator)
    samples = {"input": inputs, "label": inputs.argmax(1) % 3}
    recipe = _recipe(ASLEEP_MICROBATCHES, ASLEEP_STEPS, samples_per_step=128)

    def sleep(slow: int) -> Prepare:
        def prepare(rank: int) -> None:
            task.seconds = SLEEP_SECONDS * (FACTOR if rank == slow else 1)

        return prepare

    def nobody(rank: int) -> None:
        task.seconds = 0.0

    _, expected = train(recipe, task, samples, 2, nobody)
    slowed: list[float] = []
    equal: list[float] = []
    for _ in range(repeats):
        seconds, equal_bits = train(recipe, task, samples, ASLEEP_WORKERS, sleep(SLOW))
        _check(equal_bits, expected)
        slowed.append(seconds)
        seconds, equal_bits = train(recipe, task, samples, ASLEEP_WORKERS, sleep(-1))
        _check(equal_bits, expected)
        equal.append(seconds)
    allowed, even = [], []
    for seconds in equal:  # what a microbatch costs beside its sleep is the same on all workers
        usual = seconds * ASLEEP_WORKERS / ASLEEP_MICROBATCHES
        slow = usual + SLEEP_SECONDS * (FACTOR - 1)
        allowed.append(ASLEEP_MICROBATCHES / ((ASLEEP_WORKERS - 1) / usual + 1 / slow))
        even.append(slow * ASLEEP_MICROBATCHES / ASLEEP_WORKERS)
    return _row("1 of 4 workers sleeps twice as long", slowed, equal, allowed, even)


def measure_busy(repeats: int) -> dict[str, Cell] | None:
    """Another process computes on the core of one of 2 workers; None where there are no 2 cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < BUSY_WORKERS:
        print("busy: skipped, there is only one core", file=sys.stderr)
        return None
    made = transformer("float32", BUSY_MICROBATCHES)
    recipe = made.recipe.model_copy(
        update={
            "train": made.recipe.train.model_copy(
                update={"epochs": 1e6, "max_steps": BUSY_STEPS, "samples_per_step": 64}
            )
        }
    )

    def hold(rank: int) -> None:
        os.sched_setaffinity(0, {cores[rank % BUSY_WORKERS]})

    slowed: list[float] = []
    equal: list[float] = []
    expected = ""
    for _ in range(repeats):
        seconds, bits = train(recipe, made.task, made.samples, BUSY_WORKERS, hold)
        expected = expected or bits
        _check(bits, expected)
        equal.append(seconds)
        with _burner(cores[SLOW]):
            seconds, bits = train(recipe, made.task, made.samples, BUSY_WORKERS, hold)
        _check(bits, expected)
        slowed.append(seconds)
    allowed = [seconds * BUSY_WORKERS / (BUSY_WORKERS - 1 + 1 / FACTOR) for seconds in equal]
    even = [seconds * FACTOR for seconds in equal]
    return _row("another process computes on one of 2 cores", slowed, equal, allowed, even)


def _recipe(microbatches: int, steps: int, samples_per_step: int) -> Recipe:
    train = {"epochs": 1e6, "max_steps": steps, "microbatches": microbatches, "samples_per_step": samples_per_step}
    return recipes.check({"train": {"device": "cpu", **train}})


@contextmanager
def _burner(core: int) -> Iterator[None]:
    """A process that computes on a core, and on no other."""

    def burn() -> None:
        os.sched_setaffinity(0, {core})
        while True:
            pass

    process = multiprocessing.get_context("fork").Process(target=burn, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _check(bits: str, expected: str) -> None:
    if bits != expected:
        sys.exit(f"the bits differ: {bits} instead of {expected}")


def _row(
    name: str, slowed: list[float], equal: list[float], allowed: list[float], even: list[float]
) -> dict[str, Cell]:
    """A row of the table, in percent of the throughput that the sum of the speeds allows; neighbours are compared."""
    return {
        "slow": name,
        "ms a step": _spread([1000 * seconds for seconds in slowed]),
        "if nobody is slow": _spread([1000 * seconds for seconds in equal]),
        "the sum of speeds allows": _spread([1000 * seconds for seconds in allowed]),
        "% of that throughput": _spread([100 * best / seconds for best, seconds in zip(allowed, slowed, strict=True)]),
        "even shares, %": _spread([100 * best / seconds for best, seconds in zip(allowed, even, strict=True)]),
        "bits": "equal",
    }


def _spread(values: list[float]) -> Spread:
    return Spread(values=tuple(values))


def main() -> None:
    """Measure both rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", "--times", type=int, default=2)
    given = parser.parse_args()
    rows = [row for row in (measure_asleep(given.repeats), measure_busy(given.repeats)) if row]
    record(
        "faults_straggler", f"A worker at half speed, steps after the first {SETTLED}, {given.repeats} repeats", rows
    )


if __name__ == "__main__":
    main()
