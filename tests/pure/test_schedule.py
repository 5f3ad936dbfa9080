"""The rate warms up, then does what its name says; it depends on the step's number alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.config.sections import Train
from unisono.engine.schedule import rate


def rates(steps: int = 10, **settings: object) -> list[float]:
    train = Train.model_validate({"learning_rate": 1.0, **settings})
    return [rate(train, step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "warmup": 0.0}, [1.0] * 10),
        ({"schedule": "constant", "warmup": 0.4}, [0.25, 0.5, 0.75] + [1.0] * 7),
        ({"schedule": "constant", "warmup": 2.0}, [0.5] + [1.0] * 9),
        ({"schedule": "linear", "warmup": 0.0}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"schedule": "linear", "warmup": 5.0}, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_rates(settings: dict[str, object], expected: list[float]) -> None:
    assert rates(**settings) == pytest.approx(expected)


def test_cosine_falls_by_half_at_half_time() -> None:
    found = rates(steps=100, schedule="cosine", warmup=0.0)
    assert found[0] == 1.0 and found[50] == pytest.approx(0.5) and 0 < found[99] < 0.001
    assert found == sorted(found, reverse=True)


@given(
    steps=st.integers(1, 200),
    warmup=st.one_of(st.floats(0, 0.99), st.floats(1, 500)),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_every_step_has_a_rate_between_zero_and_the_peak(steps: int, warmup: float, schedule: str) -> None:
    found = rates(steps=steps, warmup=warmup, schedule=schedule)
    assert all(0 < one <= 1 for one in found)
