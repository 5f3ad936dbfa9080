"""The ledger of a run: `metrics.jsonl`, every step exactly once, and `curves.svg`, drawn from it.

Owns both files. A resumed run first forgets the lines after the step that it goes on from.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import IO, Any

from unisono import events
from unisono.files import write_text


class Ledger:
    """Keeps steps, evaluations and what else happened, one JSON line each, {"event": name, …}."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._file: IO[str] | None = None

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            forget_after(self._path, event.start_step)
            self._file = self._path.open("a", buffering=1, encoding="utf-8")  # a line is there before its checkpoint
        if self._file is None:
            return
        if isinstance(event, events.RunEnded):
            draw_curves(read_ledger(self._path), self._folder / "curves.svg")
        else:
            self._file.write(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The ledger's lines; one that was cut off by a crash is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def forget_after(path: Path, step: int) -> None:
    """Remove the records of steps after `step`: they are about to be trained again, to the same bits."""
    if path.exists():
        kept = [line for line in read_ledger(path) if line.get("step", 0) <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the training loss of each step, and the loss and accuracy of each evaluation, against epochs."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    done = [line for line in lines if line["event"] == "StepDone"]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axis.plot(
        [line["epoch"] for line in done],
        [line["loss"] for line in done],
        color="#9ab",
        linewidth=0.8,
        label="training loss, each step",
    )
    axis.set(xlabel="epoch", ylabel="loss")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    right = None
    for split, color in (("validation", "#d60"), ("test", "#06a")):
        scored = [line for line in lines if line["event"] == "Evaluated" and line["split"] == split]
        epochs = [line["epoch"] for line in scored]
        if scored and "loss" in scored[0]["scores"]:
            axis.plot(
                epochs,
                [line["scores"]["loss"] for line in scored],
                "o-",
                color=color,
                markersize=4,
                label=f"{split} loss",
            )
        if scored and "accuracy" in scored[0]["scores"]:
            right = right or axis.twinx()
            right.set(ylabel="accuracy", ylim=(0, 1))
            right.plot(
                epochs,
                [line["scores"]["accuracy"] for line in scored],
                "s--",
                color=color,
                markersize=4,
                label=f"{split} accuracy",
            )
    handles = [handle for part in (axis, right) if part for handle in part.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, loc="center right", fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)
