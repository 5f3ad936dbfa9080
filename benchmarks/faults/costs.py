"""What surviving costs while nothing happens: how long steps wait for a checkpoint, for snapshot and supervisor.

    python benchmarks/faults/costs.py --repeats 5
    python benchmarks/faults/costs.py checkpoints        one of the two tables

Checkpoints: MiniLM with AdamW, 272 MB each, begun every few steps. Waiting is all from the end of a step's report to
the beginning of the next step, on the worker that asks; the event tells what of it the supervisor knows of. The steps
that follow share memory bandwidth, cores and disk with the writer, which is told apart.

Supervision: the same steps under a supervisor, with a snapshot and a mark on the board before every verb, and with the
same engine in workers that nobody watches over, which update their weights in place; both keep a ledger. Runs
alternate, and the ratio is the median of the ratios of neighbours, each of them of median steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py and workloads.py
from marks import Heard, Mark, Notebook, step_seconds, train_alone, train_supervised
from peer_work import workload
from record import Cell, Spread, record
from workloads import Workload, transformer

from unisono.config.recipe import Recipe
from unisono.config.run_sections import Checkpoint
from unisono.tasks.own_inputs import open_own
from unisono.tracking.events import CheckpointWritten

WORKERS = 2
WARM_UP = 2
AFTER = 3  # steps that follow a checkpoint's beginning and are looked at
STEPS = {"MiniLM, 32 × 128 tokens": 8, "MiniLM, 8 × 64 tokens": 16, "small transformer, 32 × 32 tokens": 200}


def make_workloads() -> dict[str, Workload]:
    """What is trained, by name."""
    made = (workload(32, 128), workload(8, 64), transformer("float32", 8))
    return dict(zip(STEPS, made, strict=True))


def shorten(made: Workload, steps: int, every_steps: int = 0) -> Recipe:
    """The workload's recipe for so many steps."""
    train = made.recipe.train.model_copy(update={"epochs": 1e6, "max_steps": steps})
    saving = Checkpoint.model_validate({"every_steps": every_steps})
    return made.recipe.model_copy(update={"train": train, "checkpoint": saving})


def take_marks(made: Workload, recipe: Recipe, train: Callable, **options: object) -> list[Mark]:
    """Train, and return what the workers noted."""
    with tempfile.TemporaryDirectory() as place:
        notebook = Notebook(Path(place) / "marks")
        train(
            recipe,
            lambda workers, notify: open_own(recipe, made.task, made.samples),
            Path(place) / "run",
            notebook.note,
            workers=WORKERS,
            **options,
        )
        return notebook.read()


def measure_checkpoints(made: Workload, steps: int, every_steps: int) -> list[dict[str, Cell]]:
    """How long steps wait for checkpoints, and how long those after take."""
    heard = Heard()
    recipe = shorten(made, steps, every_steps)
    marks = take_marks(made, recipe, train_supervised, heard=heard)
    asking = [mark for mark in marks if mark.rank == 0]
    waits: list[float] = []
    saved: list[int] = []
    computing: dict[int, float] = {}
    begun: dict[int, float] = {}
    for mark, following in pairwise(asking):
        if mark.phase == "save" and following.phase == "begin":
            waits.append(following.time - mark.time)
            saved.append(following.step)
        if mark.phase == "begin":
            begun[mark.step] = mark.time
        if mark.phase == "report" and mark.step in begun:
            computing[mark.step] = mark.time - begun[mark.step]
    near = {step + after: after for step in saved for after in range(AFTER)}
    other = [seconds for step, seconds in computing.items() if step > WARM_UP and step not in near]
    written = [event for event in heard.events if isinstance(event, CheckpointWritten)]
    told = [event.waited_seconds for event in written if event.step < steps]
    writing = [event.seconds for event in written if event.step < steps]
    rows: list[dict[str, Cell]] = [
        {"what": "a step waits, as the worker sees it, ms", "figure": _ms(waits)},
        {"what": "as the event tells, ms", "figure": _ms(told)},
        {"what": "writing in the background, s", "figure": Spread(values=tuple(writing))},
        {"what": "a step while nothing is written, ms", "figure": _ms(other)},
    ]
    for after in range(AFTER):
        then = [computing[step] for step, place in near.items() if place == after and step in computing]
        name = f"step {after + 1} after a checkpoint has begun, ms"
        if then:
            rows.append({"what": name, "figure": _ms(then)})
    return rows


def compare(name: str, made: Workload, repeats: int) -> dict[str, Cell]:
    """Alternate the two sides; one row of the table."""
    recipe = shorten(made, STEPS[name] + WARM_UP)
    ours: list[float] = []
    alone: list[float] = []
    for number in range(repeats):
        sides = [(ours, train_supervised), (alone, train_alone)]
        for seconds, train in sides if number % 2 == 0 else reversed(sides):
            found = step_seconds(take_marks(made, recipe, train))
            seconds.append(median(value for step, value in found.items() if step > WARM_UP))
        print(f"{name}: {ours[-1]:.4f} s, alone {alone[-1]:.4f} s", file=sys.stderr, flush=True)
    ratios = [a / b for a, b in zip(ours, alone, strict=True)]
    return {
        "workload": name,
        "supervised, ms a step": _ms(ours),
        "alone, ms a step": _ms(alone),
        "cost, %": Spread(values=tuple((ratio - 1) * 100 for ratio in ratios)),
    }


def _ms(seconds: Sequence[float]) -> Spread:
    return Spread(values=tuple(1000 * value for value in seconds) or (float("nan"),))


def main() -> None:
    """Measure both tables, or the named one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=["checkpoints", "supervision", []], default=[])
    parser.add_argument("--repeats", "--times", type=int, default=3, help="of the supervised and the lone run")
    parser.add_argument("--checkpoints", type=int, default=6, help="that are written")
    parser.add_argument("--every", type=int, default=5, help="steps between them")
    parser.add_argument("--workloads", nargs="+", choices=list(STEPS), default=list(STEPS))
    given = parser.parse_args()
    tables = given.tables or ["checkpoints", "supervision"]
    made = make_workloads()
    if "checkpoints" in tables:
        name = "MiniLM, 8 × 64 tokens"
        steps = WARM_UP + given.every * (given.checkpoints + 1)
        rows = measure_checkpoints(made[name], steps, given.every)
        title = f"Checkpoints while training goes on: {name}, {given.checkpoints} of them, every {given.every} steps"
        record("faults_checkpoints", title, rows)
    if "supervision" in tables:
        rows = [compare(name, made[name], given.repeats) for name in given.workloads]
        title = f"Snapshot and supervision without faults: {WORKERS} workers, {given.repeats} alternating repeats"
        record("faults_costs", title, rows)


if __name__ == "__main__":
    main()
