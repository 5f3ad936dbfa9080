"""Randomness depends on its key alone, and keys do not collide."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from unisono.determinism import keys

NUMBERS = st.lists(st.integers(0, 2**40), max_size=4)


@given(one=st.tuples(st.integers(0, 2**63 - 1), NUMBERS), other=st.tuples(st.integers(0, 2**63 - 1), NUMBERS))
def test_keys_are_equal_only_for_equal_arguments(one: tuple[int, list[int]], other: tuple[int, list[int]]) -> None:
    left, right = (keys.key(seed, "sample", *numbers) for seed, numbers in (one, other))
    assert (left == right) == (one == other)
    assert 0 <= left < 2**63


def test_neighbouring_keys_differ() -> None:
    found = {
        keys.key(seed, purpose, a, b)
        for seed in range(3)
        for purpose in ("x", "y")
        for a in range(30)
        for b in range(30)
    }
    assert len(found) == 3 * 2 * 30 * 30
    assert keys.key(1, "x", 23) != keys.key(1, "x", 2, 3) != keys.key(12, "x", 3)


def draw() -> list[float]:
    return [
        torch.rand(()).item(),
        torch.nn.functional.dropout(torch.ones(64)).sum().item(),
        np.random.random(),
        random.random(),
    ]


def test_seeding_reaches_every_global_generator() -> None:
    keys.seed_all(7)
    first, following = draw(), draw()
    keys.seed_all(8)
    other = draw()
    keys.seed_all(7)
    assert draw() == first
    assert all(a != b for a, b in zip(first[::2] + first[3:], other[::2] + other[3:], strict=True))
    assert first != following


def test_keys_are_what_they_were() -> None:
    """Another key would give old runs new weights."""
    assert keys.key(0, "contribution", 1, 2) == 1_662_322_368_683_901_555
