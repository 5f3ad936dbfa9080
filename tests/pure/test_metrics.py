"""Scores are what the plain formulas give."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.tasks.metrics import confusion, mean, per_class, summarise

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=80)


@given(pairs=PAIRS)
def test_per_class_scores_are_the_plain_formulas(pairs: list[tuple[int, int]]) -> None:
    label, predicted = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    table = confusion(label, predicted, 6)
    assert table.shape == (6, 6) and table.sum() == len(pairs)
    f1s = []
    for number, scores in enumerate(per_class(table, ["a", "b"])):
        right = sum(a == b == number for a, b in pairs)
        said, true = sum(b == number for _, b in pairs), sum(a == number for a, _ in pairs)
        assert scores.label == (["a", "b"][number] if number < 2 else str(number))
        assert scores.samples == true
        assert scores.precision == (right / said if said else 0)
        assert scores.recall == (right / true if true else 0)
        both = scores.precision + scores.recall
        assert math.isclose(scores.f1, 2 * scores.precision * scores.recall / both if both else 0, abs_tol=1e-12)
        f1s += [scores.f1] if true or said else []
    summary = summarise({"label": label, "predicted": predicted, "loss": np.ones(len(pairs))})
    assert summary["accuracy"] == sum(a == b for a, b in pairs) / len(pairs)
    assert math.isclose(summary["macro_f1"], sum(f1s) / len(f1s))
    assert summary["loss"] == 1 and summary["samples"] == len(pairs)


@given(values=st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=60), scale=st.integers(-30, 30))
def test_the_mean_is_exact_and_has_no_order(values: list[int], scale: int) -> None:
    numbers = np.array(values, np.float64) * 2.0**scale
    assert mean(numbers) == mean(numbers[::-1]) == sum(values) / 1 * 2.0**scale / len(values)


def test_rows_are_true_classes() -> None:
    assert confusion(np.array([0, 0, 1]), np.array([1, 1, 1])).tolist() == [[0, 2], [0, 1]]


def test_without_classes_only_means() -> None:
    summary = summarise({"loss": np.array([1.0, 2.0]), "right": np.array([1, 0]), "label": np.array([3, 4])})
    assert summary == {"loss": 1.5, "right": 0.5, "label": 3.5, "samples": 2}


def test_nan_is_not_hidden() -> None:
    assert math.isnan(summarise({"loss": np.array([1.0, np.nan])})["loss"])


@pytest.mark.parametrize("classes", [0, 3])
def test_no_samples_of_a_class(classes: int) -> None:
    table = confusion(np.array([2, 2]), np.array([2, 2]), classes)
    assert [scores.f1 for scores in per_class(table)] == [0.0, 0.0, 1.0]
    assert summarise({"label": np.array([2, 2]), "predicted": np.array([2, 2])})["macro_f1"] == 1.0
