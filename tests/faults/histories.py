"""What is left of a run that something has happened to, and what it is to be compared with.

Owns what is trained, the ledger's reading, and the comparison with a run that nothing has happened to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OFTEN = ("checkpoint.every_steps=3", "checkpoint.keep=9", "evaluate.samples_per_microbatch=8")
"""18 steps, a checkpoint after every third, an evaluation after steps 6 and 12 and a test, each in four parts."""


@dataclass(frozen=True)
class Quiet:
    """The toy, and a run of it to which nothing has happened."""

    recipe: Path
    run: Path


HASHES = ("weights_sha256", "optimizer_sha256", "steps", "best_step", "epochs")
NUMBERS = ("step", "epoch", "loss", "gradient_norm", "learning_rate", "samples", "tokens")


def read_ledger(run: Path, event: str = "") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, or those of one event."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event in ("", line["event"])]


def read_warnings(run: Path) -> list[str]:
    """What was told as a warning."""
    return [line["message"] for line in read_ledger(run, "Notice") if line["warning"]]


def read_summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def read_checkpoints(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    folder = run / "checkpoints"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_history(run: Path, expected: Path, *, without: tuple[int, ...] = ()) -> None:
    """The run is as if nothing had happened to it: results, every step once and in order, evaluations, the model, and
    all checkpoints but those of the steps `without`."""
    mine, theirs = read_summary(run), read_summary(expected)
    assert {name: mine[name] for name in HASHES} == {name: theirs[name] for name in HASHES}
    assert mine["test"] == theirs["test"] and mine["train"] == theirs["train"]
    steps = [
        [{name: line[name] for name in NUMBERS} for line in read_ledger(one, "StepDone")] for one in (run, expected)
    ]
    assert [line["step"] for line in steps[0]] == list(range(1, theirs["steps"] + 1))
    assert steps[0] == steps[1]
    scores = [
        [(line["step"], line["split"], line["scores"], line["best"]) for line in read_ledger(one, "Evaluated")]
        for one in (run, expected)
    ]
    assert scores[0] == scores[1]
    model = "model/model.safetensors"
    assert (run / model).read_bytes() == (expected / model).read_bytes()
    gone = tuple(f"step-{step:08d}/" for step in without)
    kept = {name: value for name, value in read_checkpoints(expected).items() if not name.startswith(gone)}
    found = read_checkpoints(run)
    assert found.keys() == kept.keys()
    assert [name for name in kept if found[name] != kept[name]] == []
