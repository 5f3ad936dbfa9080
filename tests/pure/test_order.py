"""The order is a pure function that visits every sample exactly once an epoch, in pieces of even cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.data.order import Order, _place, count_steps, cut, outside_in, permute

KEYS = st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10_000))


def order(lengths: list[int] | np.ndarray, *, per_step: int, pieces: int, seed: int = 0, padded: bool = True) -> Order:
    lengths = np.asarray(lengths, np.int32)
    return Order(
        lengths=lengths, padded=padded, samples_per_step=per_step, microbatches=pieces, seed=seed,
        total_steps=count_steps(len(lengths), per_step, 3),
    )  # fmt: skip


@given(size=st.integers(1, 3000), key=KEYS)
def test_permutation_is_a_bijection(size: int, key: tuple[int, int]) -> None:
    permuted = permute(np.arange(size, dtype=np.uint64), size=size, key=key)
    assert np.array_equal(np.sort(permuted), np.arange(size))


@given(size=st.integers(2**20, 2**45), key=KEYS, positions=st.sets(st.integers(0, 2**20 - 1), min_size=1, max_size=50))
def test_permutation_of_a_huge_set_needs_no_other_position(
    size: int, key: tuple[int, int], positions: set[int]
) -> None:
    together = permute(np.array(sorted(positions), np.uint64), size=size, key=key)
    alone = [int(permute(np.array([position], np.uint64), size=size, key=key)[0]) for position in sorted(positions)]
    assert together.tolist() == alone
    assert len(set(alone)) == len(positions) and all(0 <= sample < size for sample in alone)


def test_permutation_shuffles() -> None:
    size = 10_000
    positions = np.arange(size, dtype=np.uint64)
    one, other = (permute(positions, size=size, key=key).astype(float) for key in ((0, 0), (0, 1)))
    for left, right in ((positions.astype(float), one), (one, other), (one[:-1], one[1:])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.05
    assert (permute(positions, size=size, key=(1, 0)) != one).any()


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=80),
    per_step=st.integers(1, 90),
    pieces=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
    padded=st.booleans(),
)
def test_every_sample_once_an_epoch_in_no_empty_piece(
    lengths: list[int], per_step: int, pieces: int, seed: int, padded: bool
) -> None:
    plan = order(lengths, per_step=per_step, pieces=pieces, seed=seed, padded=padded)
    for epoch, steps in itertools.groupby(plan.steps(), key=lambda step: step.epoch):
        samples: list[int] = []
        sizes = []
        for step in steps:
            assert len(step.microbatches) == min(pieces, step.samples)
            assert all(len(piece) for piece in step.microbatches)
            sizes.append(step.samples)
            samples += np.concatenate(step.microbatches).tolist()
        assert sorted(samples) == list(range(len(lengths))), epoch
        assert all(size == per_step for size in sizes[:-1]) and sizes[-1] <= per_step


def test_epochs_differ_and_any_step_can_be_the_first() -> None:
    plan = order(range(1, 31), per_step=8, pieces=4)
    whole = list(plan.steps())
    assert [step.samples for step in whole[:4]] == [8, 8, 8, 6]
    assert set(np.concatenate(whole[0].microbatches)) != set(np.concatenate(whole[4].microbatches))
    for start in range(len(whole)):
        for expected, found in zip(whole[start:], plan.steps(start), strict=True):
            assert (expected.number, expected.epoch) == (found.number, found.epoch)
            assert all(np.array_equal(a, b) for a, b in zip(expected.microbatches, found.microbatches, strict=True))


def test_fewer_samples_than_microbatches() -> None:
    step = order([1] * 3, per_step=16, pieces=8).step(0)
    assert [len(piece) for piece in step.microbatches] == [1, 1, 1]


def test_padded_pieces_hold_samples_of_like_length() -> None:
    step = order(range(1, 65), per_step=64, pieces=8).step(0)
    falling = sorted(step.microbatches, key=lambda piece: -int(piece.max()))
    assert all(above.min() > below.max() for above, below in itertools.pairwise(falling))


@pytest.mark.parametrize("pieces", range(1, 18))
def test_neighbouring_pieces_make_up_for_each_other(pieces: int) -> None:
    ranks = outside_in(pieces)
    assert sorted(ranks) == list(range(pieces))
    assert {a + b for a, b in zip(ranks[::2], ranks[1::2], strict=False)} <= {pieces - 1}


def test_a_long_sample_does_not_go_with_many_short_ones() -> None:
    """The last bound jumps over the second 132 as the cost rises: seven samples padded to it would cost 924."""
    falling = np.array([461, 396, 239, 223, 180, 180, 180, 132, 132, 1, 1, 1, 1, 1, 1], np.int32)
    costs = [int(falling[part[0]]) * len(part) for part in cut(falling, 9, padded=True)]
    assert max(costs) == _least_padded_cost(falling.tolist(), 9) == 461


@pytest.mark.parametrize("padded", [True, False])
@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=60), data=st.data())
def test_the_costliest_piece_costs_little_more_than_an_even_share(
    padded: bool, lengths: list[int], data: st.DataObject
) -> None:
    falling = np.array(sorted(lengths, reverse=True), np.int32)
    pieces = data.draw(st.integers(1, len(lengths)))
    places = cut(falling, pieces, padded=padded)
    assert np.array_equal(np.sort(np.concatenate(places)), np.arange(len(lengths)))
    assert all(len(part) and (np.diff(part) > 0).all() for part in places)
    parts = [falling[part].astype(np.int64) for part in places]
    costs = [int(part[0]) * len(part) if padded else int(part.sum()) for part in parts]
    if padded:
        assert max(costs) <= 2 * _least_padded_cost(falling.tolist(), pieces)
    else:
        assert max(costs) <= falling.sum() / pieces + falling[0]


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_ragged_pieces_cost_the_same_where_long_samples_cost_more_a_token(pieces: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        falling = np.sort(random.integers(5, 70, 64))[::-1]
        costs = [
            float((part + part**2 / 500).sum()) for part in (falling[p] for p in cut(falling, pieces, padded=False))
        ]
        shares = np.cumsum(costs) / sum(costs) - np.arange(1, pieces + 1) / pieces
        assert np.abs(shares).max() < 0.01  # cut in the order of their lengths, 0.02 and more


def _least_padded_cost(falling: list[int], pieces: int) -> int:
    """The smallest possible cost of the costliest of `pieces` rectangles, by trying each."""
    candidates = sorted({falling[a] * n for a in range(len(falling)) for n in range(1, len(falling) - a + 1)})
    for cost in candidates:
        position, used = 0, 0
        while position < len(falling) and used < pieces and falling[position] <= cost:
            position += cost // falling[position]
            used += 1
        if position >= len(falling):
            return cost
    raise AssertionError


@pytest.mark.parametrize(
    ("samples", "per_step", "epochs", "most", "steps"),
    [
        (100, 10, 1, 0, 10),
        (101, 10, 1, 0, 11),
        (100, 10, 0.25, 0, 3),
        (100, 10, 2.5, 0, 25),
        (100, 10, 3, 7, 7),
        (3, 64, 2, 0, 2),
    ],
)
def test_count_steps(samples: int, per_step: int, epochs: float, most: int, steps: int) -> None:
    assert count_steps(samples, per_step, epochs, most) == steps


@settings(max_examples=60)
@given(
    st.integers(1, 200), st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.booleans(), st.booleans(), KEYS
)
def test_no_microbatch_has_less_than_the_least_and_no_sample_is_lost(
    samples: int, per_step: int, pieces: int, least: int, even: bool, drop_last: bool, key: tuple[int, int]
) -> None:
    """For any sizes, such as 16 samples a step in 8 microbatches, and 65 to 79 samples."""
    lengths = np.ones(samples, np.int32) if even else np.random.default_rng(key).integers(1, 500, samples, np.int32)
    kinds = {"min_samples": least, "drop_last": drop_last}
    total = count_steps(samples, per_step, 1, **kinds)
    if not total:
        assert drop_last and samples < per_step
        return
    made = Order(
        lengths=lengths, padded=True, samples_per_step=per_step, microbatches=pieces, seed=key[0], total_steps=total,
        **kinds,
    )  # fmt: skip
    assert made.steps_per_epoch == total
    steps = list(made.steps())
    seen = sorted(number for step in steps for piece in step.microbatches for number in piece.tolist())
    lost = samples % per_step if drop_last else 0
    assert len(seen) == len(set(seen)) == samples - lost
    for step in steps:
        assert step.samples == per_step or (step is steps[-1] and step.samples < per_step + least)
        assert 1 <= len(step.microbatches) <= pieces
        if step.samples >= least:
            assert min(map(len, step.microbatches)) >= least
    if least == 1 and not drop_last:  # as without these keys
        plain = order(lengths, per_step=per_step, pieces=pieces, seed=key[0])
        for one, other in zip(steps, plain.steps(), strict=False):
            assert all(map(np.array_equal, one.microbatches, other.microbatches))
    if drop_last:
        assert {step.samples for step in steps} == {per_step}


def test_only_steps_with_too_small_microbatches_are_cut_otherwise() -> None:
    plain, least = (
        Order(
            lengths=np.ones(70, np.int32), padded=True, samples_per_step=16, microbatches=8, seed=1, total_steps=5,
            min_samples=min_samples,
        )
        for min_samples in (1, 2)
    )  # fmt: skip
    for one, other in zip(list(plain.steps())[:4], list(least.steps())[:4], strict=True):
        assert all(map(np.array_equal, one.microbatches, other.microbatches))
    assert [len(piece) for piece in plain.step(4).microbatches] == [1] * 6
    assert [len(piece) for piece in least.step(4).microbatches] == [2] * 3


def test_stream_order_is_that_of_the_samples() -> None:
    made = Order(
        lengths=np.broadcast_to(np.int32(1), 20), padded=True, samples_per_step=8, microbatches=3, seed=1,
        total_steps=2, shuffled=False,
    )  # fmt: skip
    for step in made.steps():
        assert sorted(np.concatenate(step.microbatches)) == list(range(step.number * 8, step.number * 8 + 8))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.floats(0, 1))
def test_a_place_is_that_of_numpys_interpolation(lengths: list[int], part: float) -> None:
    total = [0, *np.cumsum(lengths).tolist()]
    for value in (part * total[-1], *map(float, total), total[-1] + 1.0):
        expected = np.interp(value, total, range(len(total)))  # on some processors multiplied and added in one rounding
        assert _place(total, value) == pytest.approx(expected, rel=1e-12, abs=1e-12)
