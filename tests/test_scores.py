"""What a task measures, and what is chosen by it: shapes, classes, NaN, directions; and a trial that fails on one worker."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisono
from unisono.tasks.metrics import summarise

pytestmark = pytest.mark.usefixtures("warm")

DATA = {"input": torch.arange(240.0).view(40, 6).sin(), "label": torch.arange(40) % 3}
Change = Callable[[dict[str, Tensor]], Any]


class Scored(unisono.Task):
    """Three classes; `change` makes of the usual results those that are measured."""

    def __init__(self, change: Change = dict) -> None:
        self._change = change

    def build(self) -> nn.Module:
        return nn.Linear(6, 3)

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        scores = module(microbatch["input"])
        return F.cross_entropy(scores, microbatch["label"], reduction="sum"), len(scores)

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> Any:
        scores, label = module(microbatch["input"]), microbatch["label"]
        losses = F.cross_entropy(scores, label, reduction="none")
        return self._change({"loss": losses, "predicted": scores.argmax(1), "label": label})


def train(task: unisono.Task, run: Path, **settings: Any) -> Any:
    usual = {"workers": 1, "epochs": 2, "samples_per_step": 8, "microbatches": 4, "quiet": True}
    return unisono.train(task, DATA, validation=DATA, run=run, **{**usual, **settings})


def read_events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: [found["loss"]], "the task's measure returned list; allowed is a mapping"),
        (lambda found: None, "the task's measure returned NoneType"),
        (lambda found: {"wide": found["loss"][:, None].expand(-1, 0)}, r"gave 'wide' the shape \(3, 0\)"),
        (lambda found: {**found, "label": found["label"].float()}, "gave 'label' as float64.*class numbers"),
    ],
)
def test_results_of_another_form_are_named_before_the_first_step(tmp_path: Path, change: Change, said: str) -> None:
    with pytest.raises(unisono.ContractError, match=said):
        train(Scored(change), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_one_column_counts_as_one_number_for_every_metric(tmp_path: Path) -> None:
    """Beside a result of shape [samples], NumPy would make a table of [samples, samples] of it."""

    class Distance(unisono.Metric):
        def compute(self, results: Mapping[str, np.ndarray]) -> float:
            return float(np.abs(results["predicted"] - results["label"]).mean())

    given = {"loss": np.ones((4, 1)), "predicted": np.array([[0], [1], [2], [0]]), "label": np.array([0, 1, 1, 2])}
    metric = Distance(name="distance", higher_is_better=False, inputs=("predicted", "label"))
    found = summarise(given, (metric,))
    assert (found["distance"], found["accuracy"], found["loss"]) == (0.75, 0.5, 1.0)


class Named(Scored):
    """Class numbers as a hash would give them."""

    def __init__(self, first: int = 200_000) -> None:
        self.first = first
        super().__init__(lambda found: {**found, "label": found["label"] + first, "predicted": found["label"] + first})

    def encode(self, table: Any) -> Mapping[str, Any]:
        return DATA


def test_large_class_numbers_are_scored_without_a_table_of_them(tmp_path: Path) -> None:
    task = Named()
    trained = unisono.train(
        task, DATA, validation=DATA, test=DATA, run=tmp_path / "run", workers=1, quiet=True, max_steps=2
    )
    assert trained.summary["test"]["accuracy"] == trained.summary["test"]["macro_f1"] == 1.0
    model = unisono.load(tmp_path / "run", task=Named)
    results = {"label": np.arange(4) + 200_000, "predicted": np.arange(4) + 200_000}
    report = model.report(results)
    assert report["accuracy"] == 1.0 and "confusion" not in report
    assert "confusion" in model.report({"label": np.arange(4), "predicted": np.arange(4)[:, None]})


def test_scores_that_are_all_nan_are_said_and_choose_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task = Scored(lambda found: {"loss": found["loss"] * math.nan})
    trained = train(task, tmp_path / "run", evaluate={"metric": "loss", "keep_best": True})
    assert "'loss' was NaN in all 2 evaluations, so none was the best" in capfd.readouterr().err
    assert trained.summary["best_step"] is None
    plain = train(Scored(), tmp_path / "plain")
    assert trained.weights_sha256 == plain.weights_sha256, "the weights of the last step"


def test_nothing_is_the_best_where_the_direction_is_not_known(tmp_path: Path) -> None:
    """It is not used here, so it need not be known; but a largest error is not the best one."""
    task = Scored(lambda found: {"error": found["loss"]})
    trained = train(task, tmp_path / "run", evaluate={"metric": "error"})
    assert trained.summary["best_step"] is None
    assert not any(event["best"] for event in read_events(tmp_path / "run", "Evaluated"))
    known = train(task, tmp_path / "known", evaluate={"metric": "error", "mode": "min"})
    assert known.summary["best_step"]


def test_a_metric_that_is_used_and_vanishes_ends_the_run(tmp_path: Path) -> None:
    calls: list[int] = []

    def once(found: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        return {"loss": found["loss"], **({"error": found["loss"]} if len(calls) == 1 else {})}

    with pytest.raises(unisono.RecipeError, match=r"'evaluate\.metric' = 'error': measured are loss"):
        train(Scored(once), tmp_path / "run", evaluate={"metric": "error", "mode": "min", "patience": 3})


class Unwritten(Scored):
    """Its export fails, on worker 0 alone."""

    def export(self, folder: Path) -> None:
        raise OSError("no room for the words")


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exporter_that_fails_ends_the_run_on_every_worker(tmp_path: Path, workers: int) -> None:
    """It is no loss of a worker, after which the others would go on, without a trial, to a run without a model."""
    with pytest.raises(unisono.ContractError, match=r"Unwritten\.export fails.*OSError: no room for the words"):
        train(Unwritten(), tmp_path / "run", workers=workers)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_list_of_layers_that_is_no_part_of_the_module_is_explained(tmp_path: Path) -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1)
            self.layers = [nn.Linear(6, 3)]

        def forward(self, values: Tensor) -> Tensor:
            found: Tensor = self.layers[0](values)
            return found

    class Lists(Scored):
        def build(self) -> nn.Module:
            return Listed()

    with pytest.raises(unisono.ContractError, match=r"depends on no trainable parameter.*nn\.ModuleList"):
        train(Lists(), tmp_path / "run")
