"""The trial before the first step: each fault of a task, of a metric or of the run folder ends a run before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisono
from learned import Dropped, make_columns
from unisono.engine import trial
from unisono.errors import ContractError, RecipeError, RunFolderError
from unisono.tasks.metrics import TorchMetric, WeightedMean, summarise

SETTINGS: dict[str, Any] = {"samples_per_step": 12, "microbatches": 4, "epochs": 1, "quiet": True}


class Given(Dropped):
    """Computes its loss and its results as a test says, from scores and classes."""

    def __init__(self, loss: Callable[..., Any] | None = None, measure: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.given_loss, self.given_measure = loss, measure
        self.steps = 0

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> Any:
        if self.given_loss is None:
            return super().loss(module, microbatch)
        return self.given_loss(module, module(microbatch["x"]), microbatch["y"])

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.given_measure is None:
            return super().measure(module, microbatch)
        found: dict[str, Tensor] = self.given_measure(module(microbatch["x"]), microbatch["y"])
        return found


class Watch:
    """Counts steps."""

    def __init__(self) -> None:
        self.steps = 0

    def observe(self, event: object) -> None:
        self.steps += isinstance(event, unisono.events.StepDone)

    def close(self) -> None:
        pass


def train(task: unisono.Task, run: Path, **settings: Any) -> Any:
    return unisono.train(
        task, make_columns(), run=run, **{"workers": 1, "validation": make_columns(12), **SETTINGS, **settings}
    )


def sum_of(scores: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(scores, y, reduction="sum")


def without_gradients(module: nn.Module, scores: Tensor, y: Tensor) -> tuple[Tensor, int]:
    with torch.no_grad():
        return sum_of(module[4](scores.detach().repeat(1, 6)[:, :16]), y), len(y)  # type: ignore[index]


LOST: dict[str, Callable[..., Any]] = {
    "detached": lambda module, scores, y: (sum_of(scores, y).detach(), len(y)),
    "item": lambda module, scores, y: (torch.tensor(sum_of(scores, y).item(), requires_grad=True), len(y)),
    "no-grad": without_gradients,
    "another-module": lambda module, scores, y: (nn.Linear(3, 1)(scores.detach()).sum(), len(y)),
}


@pytest.mark.parametrize("way", LOST)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_depends_on_no_parameter(tmp_path: Path, way: str, workers: int) -> None:
    watch = Watch()
    with pytest.raises(ContractError, match="depends on no trainable parameter"):
        train(Given(loss=LOST[way]), tmp_path / "run", workers=workers, observers=[watch])
    assert watch.steps == 0


def test_parameters_without_a_part_in_the_loss_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Spare(Dropped):
        def build(self) -> nn.Module:
            module = super().build()
            module.register_parameter("spare", nn.Parameter(torch.zeros(3)))
            return module

    train(Spare(), tmp_path / "run")
    assert "1 of 7 trainable parameters have no part in the loss" in " ".join(capfd.readouterr().err.split())
    train(Dropped(), tmp_path / "other")
    assert "no part" not in capfd.readouterr().err


def test_a_gradient_of_zero_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(Given(loss=lambda module, scores, y: (sum_of(scores, y) * 0, len(y))), tmp_path / "run")
    assert "is 0 for every parameter" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda module, scores, y: (F.cross_entropy(scores, y), len(y)), True),
        (lambda module, scores, y: (F.cross_entropy(scores, y), 1), False),  # the mean of means, on purpose
        (None, False),
    ],
    ids=["mean-and-count", "mean-and-one", "sum-and-count"],
)
def test_a_mean_that_is_given_as_a_sum_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], loss: Callable[..., Any] | None, said: bool
) -> None:
    train(Given(loss=loss), tmp_path / "run")
    assert ("seems to be a mean" in capfd.readouterr().err) == said


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "logits": (lambda s, y: {"predicted": s, "label": y}, r"'predicted' as float64 of shape \(3, 3\).*argmax"),
    "ignored": (lambda s, y: {"predicted": s.argmax(1), "label": y - 100}, "'label' the value -100"),
    "a-list": (lambda s, y: {"loss": y.tolist()}, "'loss' as list"),
    "an-array": (lambda s, y: {"loss": y.numpy()}, "'loss' as ndarray"),
    "a-mean": (lambda s, y: {"loss": F.cross_entropy(s, y)}, r"the shape \(\)"),
    "too-few": (lambda s, y: {"loss": y[:1].float()}, r"the shape \(1,\)"),
    "a-cube": (lambda s, y: {"loss": s[:, :, None]}, r"the shape \(3, 3, 1\)"),
    "nothing": (lambda s, y: {}, "returned nothing"),
}


@pytest.mark.parametrize("way", BAD)
def test_results_that_cannot_be_used(tmp_path: Path, way: str) -> None:
    watch = Watch()
    measure, said = BAD[way]
    with pytest.raises(ContractError, match=said):
        train(Given(measure=measure), tmp_path / "run", observers=[watch])
    assert watch.steps == 0


def test_a_column_is_a_number_per_sample(tmp_path: Path) -> None:
    column = train(
        Given(measure=lambda s, y: {"loss": F.cross_entropy(s, y, reduction="none")[:, None]}),
        tmp_path / "a",
        test=make_columns(),
    )
    plain = train(Given(), tmp_path / "b", test=make_columns())
    assert column.summary["test"] == plain.summary["test"]


def test_class_numbers_may_be_large() -> None:
    """As many numbers as a vocabulary has. A table of all pairs would not fit into memory."""
    label, predicted = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])
    small, large = (summarise({"label": label + far, "predicted": predicted + far}) for far in (0, 200_000_000))
    assert small == large
    assert small["accuracy"] == 0.75
    assert small["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


class Scored(Dropped):
    """Measures something that is not called loss, with metrics of its own."""

    def __init__(self, *metrics: Any) -> None:
        super().__init__()
        self.given = metrics

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"off": super().measure(module, microbatch)["loss"], "ones": torch.ones(len(microbatch["y"]))}

    def metrics(self) -> Any:
        return self.given


MEAN = WeightedMean(name="far", higher_is_better=False, inputs=("off", "ones"))


def test_a_metric_is_looked_up_only_where_it_is_used(tmp_path: Path) -> None:
    assert "loss" not in train(Scored(), tmp_path / "a").summary
    train(Scored(MEAN), tmp_path / "b", evaluate={"metric": "far", "patience": 3})


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ({"patience": 3}, "measured are samples, far"),
        ({"keep_best": True, "metric": "off", "mode": "min"}, "measured are samples, far"),  # an input of a metric
        ({"metric": "fare"}, "measured are samples, far"),
    ],
)
def test_unknown_metrics_end_a_run_before_it_begins(tmp_path: Path, evaluate: dict[str, Any], said: str) -> None:
    watch = Watch()
    with pytest.raises(RecipeError, match=said):
        train(Scored(MEAN), tmp_path / "run", evaluate=evaluate, observers=[watch])
    assert watch.steps == 0


def test_a_metric_that_fails_on_few_samples_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Fragile:
        def update(self, values: Tensor) -> None:
            self.count = len(values)

        def compute(self) -> float:
            if self.count < 10:
                raise ValueError("too few")
            return 1.0

    metric = TorchMetric(name="fragile", higher_is_better=True, inputs=("off",), make=Fragile)
    train(Scored(metric), tmp_path / "run")
    assert "'fragile' fails on the first 3 samples: ValueError: too few" in " ".join(capfd.readouterr().err.split())


def test_a_prediction_that_fails_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Predicts(Dropped):
        targets = ("y",)

        def predict(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"right": module(microbatch["x"]).argmax(1) == microbatch["y"]}

    train(Predicts(), tmp_path / "run")
    assert "Predicts.predict fails on the first samples" in " ".join(capfd.readouterr().err.split())


def test_an_export_that_fails_ends_a_run_before_it_begins(tmp_path: Path) -> None:
    class Exports(Dropped):
        def export(self, folder: Path) -> None:
            raise LookupError("no vocabulary")

    watch = Watch()
    with pytest.raises(ContractError, match=r"Exports\.export fails.*no vocabulary"):
        train(Exports(), tmp_path / "run", observers=[watch])
    assert watch.steps == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_folder_that_cannot_be_written(tmp_path: Path, workers: int) -> None:
    (tmp_path / "file").write_text("")
    watch = Watch()
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(RunFolderError, match=r"cannot be (written|made)"):
            train(Dropped(), place, workers=workers, observers=[watch])
    assert watch.steps == 0


def test_a_disk_without_room(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="and the model needs"):
        trial.check_folder(tmp_path, model_bytes=2**60, checkpoint_bytes=0)
    assert "a checkpoint with the model needs" in trial.check_folder(tmp_path, model_bytes=1, checkpoint_bytes=2**60)[0]
    assert trial.check_folder(tmp_path, model_bytes=1, checkpoint_bytes=1) == []


def test_the_trial_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with dropout and running statistics. Fails if the trial leaves something behind."""
    tried = train(Dropped(), tmp_path / "a").weights_sha256
    monkeypatch.setattr("unisono.runtime.setup._try_out", lambda run: [])
    assert train(Dropped(), tmp_path / "b").weights_sha256 == tried
