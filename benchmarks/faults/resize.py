"""1 → 4 → 2 → 3 workers in one run at work: how long each change takes, and how long training stands still for it.

    python benchmarks/faults/resize.py --repeats 3

Asked for as `unisono resize` asks. Newcomers get ready while the others train, so from the request to the first step of
the new group is longer than the standstill, which the `Resized` event tells. The run's SHA-256 and ledger are those of
the run that nobody asked anything of.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py and workloads.py
from peer_work import workload
from record import Cell, Spread, record
from subject import Begun, Subject, choose, find_faults, fork, read_ledger, warm
from workloads import Workload, transformer

from unisono.errors import UnisonoError
from unisono.storage.run_lock import ask_for_workers

FIRST, SIZES = 1, (4, 2, 3)
PAUSE_STEPS = 4  # that each group does before the next request
ASK_SECONDS, ASKING_SECONDS = 0.02, 60.0
STEPS = {"small transformer, 32 × 32 tokens": 120, "MiniLM, 8 × 64 tokens": 50}


def make_workloads() -> dict[str, Workload]:
    """What is trained, by name."""
    return dict(zip(STEPS, (transformer("float32", 8), workload(8, 64)), strict=True))


def begin_run(made: Workload, steps: int, workers: int, folder: Path) -> Begun:
    """Begin to train in `folder`/run, in a forked process."""

    def main() -> None:
        import unisono

        train = made.recipe.train.model_copy(update={"epochs": 1e6, "max_steps": steps})
        given = train.model_dump(exclude={"label_smoothing", "class_weights", "gradient_checkpointing"})
        unisono.train(made.task, made.samples, workers=workers, run="run", quiet=True, **given)

    return fork(main, folder, made.recipe.train.microbatches)


def train_undisturbed(made: Workload, steps: int) -> Subject:
    """The run that nobody asks anything of."""
    with tempfile.TemporaryDirectory() as place:
        run = begin_run(made, steps, 2, Path(place))
        if (code := run.end(600.0)) != "0":
            sys.exit(f"the undisturbed run ended with {code}:\n{run.output}")
        summary = json.loads((Path(place) / "run" / "summary.json").read_text(encoding="utf-8"))
        ledger, _ = read_ledger(Path(place) / "run")
    return Subject(recipe=Path(), steps=choose(ledger, "StepDone"), summary=summary)


def resize_run(made: Workload, steps: int, subject: Subject) -> list[dict[str, Any]]:
    """Train once, asking for every size in turn; return what each change took."""
    with tempfile.TemporaryDirectory() as place:
        run = begin_run(made, steps, FIRST, Path(place))
        found, before = [], FIRST
        for size in SIZES:
            _wait_for_steps(run, PAUSE_STEPS)
            asked = _ask(run, size)
            run.wait(lambda size=size, asked=asked: _find_first(run, size, asked), step=0.02)
            told, first = _find_first(run, size, asked) or sys.exit(f"no change to {size} workers:\n{run.output}")
            found.append(
                {
                    "change": f"{before} → {size}",
                    "to the first step": first["when"] - asked,
                    "that step": first["seconds"],
                    "standstill": told["seconds"],
                }
            )
            before = size
        code = run.end(600.0)
        faults = [*find_faults(run.folder / "run", subject), *run.find_left()]
        if code != "0" or faults:
            sys.exit(f"the run ended with {code}: {faults}\n{run.output}")
    return found


def _wait_for_steps(run: Begun, number: int) -> None:
    """Wait until so many more steps are in the ledger."""

    def count() -> int:
        return len(choose(read_ledger(run.folder / "run")[0], "StepDone"))

    wanted = count() + number
    if not run.wait(lambda: count() >= wanted, step=0.02):
        sys.exit(f"the run has ended, or stands still:\n{run.output}")


def _ask(run: Begun, workers: int) -> float:
    """Ask for so many workers; return when, in unix seconds."""
    deadline = time.time() + ASKING_SECONDS
    while True:
        asked = time.time()
        try:
            ask_for_workers(run.folder / "run", workers)
            return asked
        except UnisonoError:
            if asked > deadline:
                raise
            time.sleep(ASK_SECONDS)


def _find_first(run: Begun, workers: int, asked: float) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The change to so many workers, and the first step after it; None: not yet."""
    ledger = [line for line in read_ledger(run.folder / "run")[0] if line["when"] > asked]
    told = next((line for line in choose(ledger, "Resized") if line["workers"] == workers), None)
    if told is None:
        return None
    first = next((line for line in choose(ledger, "StepDone") if line["step"] > told["step"]), None)
    return (told, first) if first else None


def main() -> None:
    """Measure every workload's changes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", "--times", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", choices=list(STEPS), default=list(STEPS))
    given = parser.parse_args()
    warm()
    rows: list[dict[str, Cell]] = []
    for name, made in make_workloads().items():
        if name not in given.workloads:
            continue
        subject = train_undisturbed(made, STEPS[name])
        runs = [resize_run(made, STEPS[name], subject) for _ in range(given.repeats)]
        for changes in zip(*runs, strict=True):
            row: dict[str, Cell] = {"workload": name, "workers": changes[0]["change"]}
            for figure in ("standstill", "to the first step", "that step"):
                row[f"{figure}, s"] = Spread(values=tuple(change[figure] for change in changes))
            rows.append(row | {"bits and ledger": "equal"})
            print(rows[-1], file=sys.stderr, flush=True)
    record("faults_resize", f"`unisono resize` while training, {given.repeats} repeats", rows)


if __name__ == "__main__":
    main()
