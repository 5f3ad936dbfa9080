"""Metrics: from the results of every sample to a figure, the same bits on any number of workers.

Owns the interface `Metric`, the formulas, and which metrics a task has. Results are complete and in sample order, so no
assignment of work can change a figure. A metric has a direction: whether more is better.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unisono.errors import ContractError

Results = Mapping[str, np.ndarray]
"""Name → [samples] or [samples, k], float64 or int64, in sample order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric(ABC):
    """One figure of a set of samples.

    name: under which it is reported. higher_is_better: its direction. inputs: names of the results that it needs.
    """

    name: str
    higher_is_better: bool
    inputs: tuple[str, ...]

    @abstractmethod
    def compute(self, results: Results) -> float:
        """Return the figure; NaN where it is not defined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedMean(Metric):
    """The sum of per-sample sums, divided by the sum of per-sample counts (tokens, say): inputs (sums, counts)."""

    def compute(self, results: Results) -> float:
        sums, counts = (results[name] for name in self.inputs)
        total = math.fsum(counts.astype(np.float64).tolist())
        return math.fsum(sums.astype(np.float64).tolist()) / total if total else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity(WeightedMean):
    """exp of the loss per token: inputs are per-sample sums of the negative log-likelihood, and numbers of tokens."""

    name: str = "perplexity"
    higher_is_better: bool = False
    inputs: tuple[str, ...] = ("loss", "tokens")

    def compute(self, results: Results) -> float:
        mean_loss = WeightedMean.compute(self, results)
        return math.exp(mean_loss) if mean_loss < 700 else math.inf if mean_loss == mean_loss else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchMetric(Metric):
    """A metric of torchmetrics, for figures that are no sums. make: returns a new one. It is updated once, with all
    results.

    `TorchMetric(name="auroc", higher_is_better=True, inputs=("score", "label"), make=BinaryAUROC)`
    """

    make: Callable[[], Any]

    def compute(self, results: Results) -> float:
        import torch

        metric = self.make()
        metric.update(*(torch.from_numpy(np.ascontiguousarray(results[name])) for name in self.inputs))
        return float(metric.compute())


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """One class: precision, recall and F1 (0 where undefined, as in scikit-learn), and how many samples have it."""

    label: str
    precision: float
    recall: float
    f1: float
    samples: int


HIGHER_IS_BETTER: Mapping[str, bool] = {"loss": False, "accuracy": True, "macro_f1": True}
"""Directions of the metrics that are always computed."""


def directions(metrics: Sequence[Metric]) -> dict[str, bool]:
    """Whether more is better, for each figure whose direction is known."""
    return {**HIGHER_IS_BETTER, **{metric.name: metric.higher_is_better for metric in metrics}}


def summarise(results: Results, metrics: Sequence[Metric] = ()) -> dict[str, float]:
    """Means of all numbers per sample, except class numbers and what a metric uses; accuracy and macro-F1 where there
    are `predicted` and `label`; the metrics; samples. Results of shape [samples, 1] count as [samples].

    Raises:
        ContractError: a metric needs a result that `measure` does not return.
    """
    results = {name: flat(values) for name, values in results.items()}
    used = {name for metric in metrics for name in metric.inputs} - {"loss"}
    classified = "predicted" in results and "label" in results
    used |= {"predicted", "label"} if classified else set()
    summary = {name: mean(values) for name, values in results.items() if name not in used}
    if classified:
        for name in ("predicted", "label"):
            _check_classes(name, results[name])
        summary["accuracy"], summary["macro_f1"] = _score_classes(results["label"], results["predicted"])
    for metric in metrics:
        if missing := [name for name in metric.inputs if name not in results]:
            raise ContractError(
                f"the metric {metric.name!r} needs {missing[0]!r}, which the task's `measure` does not return. It "
                f"returns {', '.join(map(repr, results))}. Return it, or leave the metric out."
            )
        summary[metric.name] = float(metric.compute(results))
    return {**summary, "samples": len(next(iter(results.values())))}


def _check_classes(name: str, values: np.ndarray) -> None:
    """Refuse what are no class numbers, before they are counted."""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ContractError(
            f"measure gave {name!r} as {values.dtype} of shape {values.shape}; allowed are class numbers, int64 "
            "[samples]. Of one score per class, return .argmax(1)."
        )
    if values.size and values.min() < 0:
        raise ContractError(
            f"measure gave {name!r} the value {int(values.min())}; allowed are class numbers from 0. Leave out samples "
            "without a class, or call the results by other names."
        )


def _score_classes(label: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Accuracy, and the mean F1 of the classes that occur, however large their numbers."""
    seen, numbers = np.unique(np.concatenate([label, predicted]), return_inverse=True)
    labels, guesses = numbers[: len(label)], numbers[len(label) :]
    right = np.bincount(labels[labels == guesses], minlength=len(seen))
    both = np.bincount(numbers, minlength=len(seen))
    accuracy = int(right.sum()) / len(label)
    return accuracy, mean(np.array([2 * float(one) / float(all_) for one, all_ in zip(right, both, strict=True)]))


def flat(values: np.ndarray) -> np.ndarray:
    """[samples, 1] as [samples]: beside [samples] NumPy would make [samples, samples] of it. Others as they are."""
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


def mean(values: np.ndarray) -> float:
    """The mean, from an exactly rounded sum; of rows, over all their numbers."""
    return math.fsum(values.astype(np.float64).ravel().tolist()) / values.size


def confusion(label: np.ndarray, predicted: np.ndarray, classes: int = 0) -> np.ndarray:
    """int64 [classes, classes]: the number of samples of class (row) that were predicted as class (column)."""
    classes = max(classes, int(label.max(initial=-1)) + 1, int(predicted.max(initial=-1)) + 1)
    return np.bincount(label * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def per_class(table: np.ndarray, labels: Sequence[str] = ()) -> list[ClassScores]:
    """Scores of each class, from a confusion matrix."""
    rows, columns, right = table.sum(1), table.sum(0), np.diag(table)
    scores = []
    for number in range(len(table)):
        precision = float(right[number] / columns[number]) if columns[number] else 0.0
        recall = float(right[number] / rows[number]) if rows[number] else 0.0
        f1 = 2 * float(right[number]) / float(rows[number] + columns[number]) if rows[number] + columns[number] else 0.0
        label = labels[number] if number < len(labels) else str(number)
        scores.append(ClassScores(label=label, precision=precision, recall=recall, f1=f1, samples=int(rows[number])))
    return scores
