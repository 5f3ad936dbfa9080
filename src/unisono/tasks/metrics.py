"""What results mean: means, accuracy, macro-F1, the per-class table and the confusion matrix.

Owns the formulas. They are computed from per-sample results in sample order, so no sharing out can touch them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScores:
    """One class: precision, recall and F1 (0 where undefined, as in scikit-learn), and how many samples have it."""

    label: str
    precision: float
    recall: float
    f1: float
    samples: int


def summarise(results: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means of all per-sample numbers but class numbers; accuracy and macro-F1 where there are `predicted` and `label`;
    samples."""
    classified = "predicted" in results and "label" in results
    summary = {
        name: mean(values) for name, values in results.items() if not (classified and name in ("predicted", "label"))
    }
    if classified:
        table = confusion(results["label"], results["predicted"])
        summary["accuracy"] = int(np.trace(table)) / int(table.sum())
        summary["macro_f1"] = mean(
            np.array(
                [scores.f1 for scores, seen in zip(per_class(table), table.sum(0) + table.sum(1), strict=True) if seen]
            )
        )
    return {**summary, "samples": len(next(iter(results.values())))}


def mean(values: np.ndarray) -> float:
    """The mean, from an exactly rounded sum."""
    return math.fsum(values.astype(np.float64).tolist()) / len(values)


def confusion(label: np.ndarray, predicted: np.ndarray, classes: int = 0) -> np.ndarray:
    """int64 [classes, classes]: how many samples of class (row) were taken for class (column)."""
    classes = max(classes, int(label.max(initial=-1)) + 1, int(predicted.max(initial=-1)) + 1)
    return np.bincount(label * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def per_class(table: np.ndarray, labels: Sequence[str] = ()) -> list[ClassScores]:
    """Scores of each class of a confusion matrix."""
    rows, columns, right = table.sum(1), table.sum(0), np.diag(table)
    scores = []
    for number in range(len(table)):
        precision = float(right[number] / columns[number]) if columns[number] else 0.0
        recall = float(right[number] / rows[number]) if rows[number] else 0.0
        f1 = 2 * float(right[number]) / float(rows[number] + columns[number]) if rows[number] + columns[number] else 0.0
        label = labels[number] if number < len(labels) else str(number)
        scores.append(ClassScores(label=label, precision=precision, recall=recall, f1=f1, samples=int(rows[number])))
    return scores
