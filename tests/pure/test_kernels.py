"""The compiled walks give the bits of torch's operations, whatever the sizes, settings and values, and write nothing
else; without them everything is the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisono.config.sections import Train
from unisono.determinism.nodes import nodes
from unisono.determinism.space import BLOCK, GRID
from unisono.determinism.tree import additions, fold_nodes
from unisono.kernels import update as kernels
from unisono.kernels.update import AdamWalk, Gradient, block_squares, find_adam, mean
from unisono.kernels.update_rules import UpdateSlice, update_adam

pytestmark = pytest.mark.usefixtures("settled")

FLAT = torch.zeros(1)
WORKERS = {
    1: [range(8)],
    2: [range(4), range(4, 8)],
    3: [range(3), range(3, 5), range(5, 8)],
    5: [range(7), range(7, 8)],
}
SHARES = [*WORKERS.values(), [range(number, number + 1) for number in range(13)]]


def values_of_all_sizes(count: int, seed: int) -> Tensor:
    """From denormals to large numbers, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator) * torch.exp2(
        torch.randint(-140, 20, (count,), generator=generator)
    )
    values[torch.rand(count, generator=generator) < 0.1] = 0.0
    values[torch.rand(count, generator=generator) < 0.05] = -0.0
    return values


def same_bits(one: Tensor, other: Tensor) -> bool:
    integers = torch.int32 if one.dtype == torch.float32 else torch.int64
    return torch.equal(one.view(integers), other.view(integers))


def with_torch(
    train: Train, gradient: Tensor, old: Sequence[Tensor], setting: tuple[float, float, float]
) -> list[Tensor]:
    """What torch's kernel makes of one piece."""
    found = [value.clone() for value in old]
    count, rate, decay = setting
    pieces = UpdateSlice(
        weights=found[:1], gradients=[gradient], slots=(found[1:2], found[2:]), counts=[torch.tensor(count)]
    )
    update_adam(train, pieces, rate, decay)
    return found


def test_the_kernels_are_there() -> None:
    """Where the tests run there is a C compiler: else they would pass without the walks."""
    assert find_adam(Train(optimizer="adamw"), FLAT) is not None


@settings(max_examples=60, deadline=None)
@given(
    shares=st.sampled_from(SHARES),
    blocks=st.integers(0, 5),
    weight=st.integers(1, 2**40),
    seed=st.integers(0, 2**32 - 1),
    in_place=st.booleans(),
)
def test_a_mean_is_that_of_torch(shares: list[range], blocks: int, weight: int, seed: int, in_place: bool) -> None:
    pending = [node for share in shares for node in nodes(share)]
    values = [values_of_all_sizes(blocks * BLOCK, seed % 2**31 + number) for number in range(len(pending))]
    expected = torch.div(
        fold_nodes([(node, value.clone()) for node, value in zip(pending, values, strict=True)]), weight
    )
    squares = torch.full((blocks,), -1.0, dtype=torch.float64)
    others = [value.clone() for value in values[1:]]
    target = values[0] if in_place else torch.empty_like(values[0])
    found = mean(values, additions(pending), weight, target, squares)
    assert found is target and same_bits(found, expected)
    assert same_bits(squares, block_squares(expected))
    assert all(map(same_bits, values[1:], others))


@settings(max_examples=100, deadline=None)
@given(
    optimizer=st.sampled_from(["adam", "adamw"]),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    skipped=st.sets(st.integers(0, 5)),
    shares=st.sampled_from(SHARES),
    beta1=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    decay=st.sampled_from([0.0, 0.1]),
    epsilon=st.sampled_from([1e-8, 1e-3]),
    factor=st.sampled_from([1.0, 0.37]),
    past_caches=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_walk_gives_the_bits_of_torch_and_writes_nothing_else(
    optimizer: Any, sizes: list[int], skipped: set[int], shares: list[range], beta1: float, decay: float, epsilon: float,
    factor: float, past_caches: bool, seed: int,
) -> None:  # fmt: skip
    train = Train(optimizer=optimizer, beta1=beta1, epsilon=epsilon)
    stops = [GRID * sum(sizes[: place + 1]) for place in range(len(sizes))]
    length = stops[-1] + GRID  # the last cells belong to no piece
    pending = [node for share in shares for node in nodes(share)]
    gradients = [values_of_all_sizes(length, seed + number) for number in range(len(pending))]
    old = [values_of_all_sizes(length, seed + 100 + number) for number in range(3)]
    old[2].abs_()
    untouched = [value.clone() for value in (*gradients, *old)]
    new = [torch.full((length,), 7.0) for _ in range(3)]
    whole = torch.div(fold_nodes([(n, g.clone()) for n, g in zip(pending, gradients, strict=True)]), 24)
    whole = whole.mul_(factor) if factor != 1.0 else whole
    expected = [value.clone() for value in new]
    pieces: list[tuple[int, tuple[float, float, float] | None]] = []
    for number, (size, stop) in enumerate(zip(sizes, stops, strict=True)):
        place = slice(stop - GRID * size, stop)
        setting = (float(number % 2 + 1), 0.01 * (number % 3 + 1), decay)
        before = [value[place] for value in old]
        after = before if number in skipped else with_torch(train, whole[place], before, setting)
        for target, value in zip(expected, after, strict=True):
            target[place] = value
        pieces.append((stop, None if number in skipped else setting))
    gradient = Gradient(values=gradients, additions=additions(pending), terms=24, factor=factor)
    AdamWalk(train).update(gradient, pieces, old, new, past_caches=past_caches)
    assert all(map(same_bits, new, expected))
    assert all(map(same_bits, (*gradients, *old), untouched))


def test_squares_are_those_of_the_gradient_before_it_is_clipped() -> None:
    gradient, squares = values_of_all_sizes(2 * BLOCK, 1), torch.zeros(2, dtype=torch.float64)
    old, new = ([torch.ones(2 * BLOCK) for _ in range(3)] for _ in range(2))
    walk = AdamWalk(Train(optimizer="adam"))
    asked = Gradient(values=[gradient], terms=3, factor=0.5, squares=squares)
    walk.update(asked, [(2 * BLOCK, (1.0, 0.1, 0.0))], old, new, past_caches=False)
    assert same_bits(squares, block_squares(gradient / 3))


@pytest.mark.parametrize(
    "change",
    [
        {"pieces": [(100, (1.0, 0.1, 0.0))]},  # off the grid
        {"pieces": [(4 * BLOCK, (1.0, 0.1, 0.0))]},  # beyond the end
        {"pieces": [(128, (1.0, 0.1, 0.0)), (64, None)]},  # backwards
        {"additions": (1,)},  # of one node
        {"values": [torch.ones(BLOCK)] * 2, "additions": (0, 0)},  # two roots
        {"length": BLOCK - GRID, "squares": torch.zeros(1, dtype=torch.float64)},  # no whole block
        {"length": 100},
    ],
)  # fmt: skip
def test_what_would_leave_the_arrays_is_refused(change: dict[str, Any]) -> None:
    length = change.pop("length", BLOCK)
    pieces = change.pop("pieces", [(64, (1.0, 0.1, 0.0))])
    old, new = ([torch.ones(length) for _ in range(3)] for _ in range(2))
    with pytest.raises(ValueError):
        AdamWalk(Train(optimizer="adam")).update(
            Gradient(**{"values": [torch.ones(length)], **change}), pieces, old, new, past_caches=False
        )
    assert all((value == 1).all() for value in new)


@pytest.mark.parametrize("optimizer", ["sgd", "lion"])
def test_other_rules_are_not_walked(optimizer: Any) -> None:
    assert find_adam(Train(optimizer=optimizer), FLAT) is None


def test_other_dtypes_are_not_walked() -> None:
    assert find_adam(Train(optimizer="adamw"), FLAT.double()) is None
    values = [torch.randn(BLOCK, dtype=torch.float64) for _ in range(2)]
    expected = (values[0] + values[1]) / 3
    squares = torch.zeros(1, dtype=torch.float64)
    assert torch.equal(mean(values, [0, 1], 3, values[0], squares), expected)
    assert torch.equal(squares, block_squares(expected))


def test_a_processor_on_which_torch_gives_other_bits_keeps_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_adam(Train(optimizer="adam"), FLAT) is not None
    kernels._is_torchs_adam.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "update_adam", lambda *given, rule=update_adam: (rule(*given), _nudge(given[1])))
        assert find_adam(Train(optimizer="adam"), FLAT) is None
    kernels._is_torchs_adam.cache_clear()


def _nudge(pieces: UpdateSlice) -> None:
    """Change the last bit of one weight."""
    pieces.weights[0].view(torch.int32)[77] ^= 1
