"""Samplers: the weighted one gives what its weights say, and any other is held to its word."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import unisono
from unisono.data.order import Order
from unisono.data.samplers import EpochSamples, count_repeats
from unisono.errors import DataError

weights = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 17.0]), min_size=1, max_size=40).filter(any)


@given(weights, st.integers(1, 200), st.integers(0, 2**62), st.integers(0, 50))
def test_weighted_counts_are_the_expected_ones_rounded(given: list[float], count: int, seed: int, epoch: int) -> None:
    """Systematic sampling, held against its definition: every sample ⌊n·w/Σw⌋ or ⌈n·w/Σw⌉ times."""
    expected = np.array(given) / sum(given) * count
    found = np.bincount(unisono.weighted(given, count)(seed, epoch), minlength=len(given))
    assert found.sum() == count
    assert (found >= np.floor(expected - 1e-9)).all() and (found <= np.ceil(expected + 1e-9)).all()


def test_weighted_means_are_exact_and_epochs_differ() -> None:
    """Over many epochs the mean is the weight, as of NumPy's multinomial draw; a third of its spread at most."""
    given, count, epochs = np.array([0.0, 1.0, 2.0, 3.5]), 5, 2000
    sampler = unisono.weighted(given, count)
    drawn = np.array([np.bincount(sampler(1, epoch), minlength=4) for epoch in range(epochs)])
    expected = given / given.sum() * count
    reference = np.random.default_rng(0).multinomial(count, given / given.sum(), epochs)
    spread = np.sqrt(expected * (1 - expected / count))
    assert (np.abs(drawn.mean(0) - expected) <= 4 * spread / np.sqrt(epochs)).all()
    assert (np.abs(reference.mean(0) - expected) <= 4 * spread / np.sqrt(epochs)).all()
    assert (drawn.std(0) <= reference.std(0)).all()
    orders = np.array([sampler(1, epoch) for epoch in range(200)])
    for place in range(count):  # no place of an epoch is one sample's
        assert set(orders[:, place]) == {1, 2, 3}


def test_order_takes_its_samples_and_counts_repeats() -> None:
    sampler = unisono.weighted([1.0, 5.0, 0.0, 2.0], 16)
    sampled = EpochSamples(sampler, 4, seed=3)
    order = Order(
        lengths=np.ones(4, np.int32), padded=True, samples_per_step=6, microbatches=3, seed=3, total_steps=6,
        sampled=sampled,
    )  # fmt: skip
    assert (sampled.per_epoch, order.steps_per_epoch) == (16, 3)
    for epoch in range(2):
        steps = [order.step(number) for number in range(epoch * 3, epoch * 3 + 3)]
        taken = np.concatenate([piece for step in steps for piece in step.microbatches])
        assert sorted(taken) == sorted(sampler(3, epoch))
        pairs = {
            (sample, repeat)
            for step in steps
            for piece, again in zip(step.microbatches, step.repeats or (), strict=True)
            for sample, repeat in zip(piece.tolist(), again.tolist(), strict=True)
        }
        assert len(pairs) == 16, "each time that a sample is given has a number of its own"


@given(st.lists(st.integers(0, 5), max_size=30))
def test_repeats_are_counted(samples: list[int]) -> None:
    expected = [samples[:place].count(sample) for place, sample in enumerate(samples)]
    found = count_repeats(np.array(samples, np.int64)) if samples else None
    assert (found is None) == (not any(expected)) and (found is None or found.tolist() == expected)


def test_sampler_may_draw_from_the_global_generators() -> None:
    """They are seeded from (seed, epoch), so every worker draws the same."""

    def draw(seed: int, epoch: int) -> np.ndarray:
        return np.r_[torch.randperm(9)[:3].numpy(), np.random.randint(9), random.randrange(9)]

    one, other = (EpochSamples(draw, 9, seed=4) for _ in range(2))
    assert one.sha256 == other.sha256
    assert one.of(5).tolist() == other.of(5).tolist() != one.of(6).tolist()


def shrinking(seed: int, epoch: int) -> np.ndarray:
    return np.arange(5 - epoch)


def remembering() -> Callable[[int, int], np.ndarray]:
    generator = np.random.default_rng(0)
    return lambda seed, epoch: generator.permutation(9)


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        (5, r"sampler is int; allowed is unisono.weighted\(weights\), or a function \(seed, epoch\)"),
        (torch.utils.data.RandomSampler(range(9)), "sampler is RandomSampler; allowed"),  # type: ignore[arg-type]
        (lambda epoch: [1], r"cannot be called with \(seed, epoch\)"),
        (lambda seed, epoch: [1.5], r"float64 numbers of shape \(1,\)"),
        (lambda seed, epoch: np.empty(0, int), "not empty"),
        (lambda seed, epoch: [[1, 2]], r"shape \(1, 2\)"),
        (lambda seed, epoch: [0, 9], "sample 9 at place 1 of epoch 0; allowed are 0 to 8"),
        (lambda seed, epoch: [0, -1], "sample -1 at place 1 of epoch 0"),
        (lambda seed, epoch: [0, 8 + epoch], "sample 9 at place 1 of epoch 1"),
        (shrinking, "gave 4 samples for epoch 1 and 5 for epoch 0"),
        (remembering(), "asked twice for epoch 0, it gave other samples the second time"),
        (unisono.weighted([1.0, 2.0]), "weighted has 2 weights, and the data 9 samples"),
    ],
)
def test_wrong_sampler_is_refused(sampler: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        EpochSamples(sampler, 9, seed=0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([],), r"weights of shape \(0,\)"),
        (([[1.0]],), r"shape \(1, 1\)"),
        (([1.0, -2.0],), "the weight of sample 1 is -2.0"),
        (([float("nan")],), "the weight of sample 0 is nan"),
        (([0.0, 0.0],), "all weights are 0"),
        (([1.0], 0), "samples_per_epoch = 0; allowed are whole numbers from 1"),
        (([1.0], 2.0), r"samples_per_epoch = 2\.0"),
    ],
)
def test_wrong_weights_are_refused(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(DataError, match=told):
        unisono.weighted(*arguments)
