"""Shares are contiguous, start large nodes of the tree, even at first, and follow the workers' speeds."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from unisono.determinism.nodes import nodes
from unisono.engine.assignment import Assignment, shares


@given(microbatches=st.integers(0, 300), workers=st.integers(1, 320))
def test_shares_are_contiguous_complete_and_even(microbatches: int, workers: int) -> None:
    found = shares(microbatches, workers)
    assert len(found) == workers
    assert [number for share in found for number in share] == list(range(microbatches))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@given(microbatches=st.integers(1, 300), workers=st.integers(1, 40))
def test_bounds_start_no_more_nodes_than_the_plain_cut(microbatches: int, workers: int) -> None:
    plain = [range(microbatches * w // workers, microbatches * (w + 1) // workers) for w in range(workers)]
    sent = sum(len(nodes(share)) for share in shares(microbatches, workers))
    assert sent <= sum(len(nodes(share)) for share in plain) + workers


@pytest.mark.parametrize(
    ("microbatches", "workers", "sent"),
    [(8, 1, 1), (8, 2, 2), (8, 3, 5), (8, 4, 4), (8, 8, 8), (64, 3, 11), (64, 16, 16)],
)
def test_few_nodes_travel(microbatches: int, workers: int, sent: int) -> None:
    assert sum(len(nodes(share)) for share in shares(microbatches, workers)) == sent


# Shares that follow speeds. A pace is a worker's microseconds per microbatch.

Paces = list[int]


def measure(found: list[range], paces: Paces, noise: random.Random | None = None, percent: int = 10) -> list[int]:
    factors = [1 + noise.uniform(-percent, percent) / 100 if noise else 1.0 for _ in paces]
    return [round(len(share) * pace * factor) for share, pace, factor in zip(found, paces, factors, strict=True)]


def follow(
    assignment: Assignment, paces: Paces, *, microbatches: int, steps: int, noise: random.Random | None = None
) -> list[list[range]]:
    """Run some steps; return the shares of each, and of the one after them."""
    cuts = [assignment.shares(microbatches)]
    for _ in range(steps):
        assignment.learn(measure(cuts[-1], paces, noise))
        cuts.append(assignment.shares(microbatches))
    return cuts


def predict(found: list[range], paces: Paces) -> int:
    return max(len(share) * pace for share, pace in zip(found, paces, strict=True))


def find_best(paces: Paces, microbatches: int) -> int:
    """The shortest predicted time of all cuts in which everybody has one: give each next microbatch to whom it delays least."""
    counts = [1] * len(paces)
    queue = [(2 * pace, worker) for worker, pace in enumerate(paces)]
    heapq.heapify(queue)
    for _ in range(microbatches - len(paces)):
        _, worker = queue[0]
        counts[worker] += 1
        heapq.heapreplace(queue, ((counts[worker] + 1) * paces[worker], worker))
    return max(count * pace for count, pace in zip(counts, paces, strict=True))


def reach(found: list[range], paces: Paces) -> float:
    """The share of the throughput that the sum of all speeds would allow."""
    return found[-1].stop / sum(1 / pace for pace in paces) / predict(found, paces)


def bounds(found: list[range]) -> list[int]:
    return [share.start for share in found]


@given(data=st.data(), workers=st.integers(1, 12), steps=st.integers(1, 40))
def test_following_shares_are_contiguous_complete_and_leave_nobody_idle(
    data: st.DataObject, workers: int, steps: int
) -> None:
    assignment, twin = Assignment(workers), Assignment(workers)
    usual = data.draw(st.integers(0, 200))
    times = data.draw(st.lists(st.integers(0, 10**12), min_size=workers, max_size=workers))
    for _ in range(steps):
        microbatches = data.draw(st.sampled_from([usual, usual, usual, usual // 2, usual // 10, usual + 3]))
        found = assignment.shares(microbatches)
        assert len(found) == workers
        assert [number for share in found for number in share] == list(range(microbatches))
        assert microbatches < workers or all(found)
        assert twin.shares(microbatches) == found
        assert twin.number == assignment.number
        assignment.learn(times)
        twin.learn(times)


@given(
    first=st.lists(st.integers(1, 5000), min_size=5, max_size=5),
    second=st.lists(st.integers(1, 5000), min_size=5, max_size=5),
)
def test_equal_food_makes_equal_cuts_and_numbers(first: Paces, second: Paces) -> None:
    one, same, other = Assignment(5), Assignment(5), Assignment(5)
    cuts: list[list[range]] = []
    other_cuts: list[list[range]] = []
    for _ in range(30):
        cuts.append(one.shares(64))
        other_cuts.append(other.shares(64))
        assert same.shares(64) == cuts[-1]
        assert same.number == one.number
        assert (other.number == one.number) == (other_cuts == cuts)
        one.learn(measure(cuts[-1], first))
        same.learn(measure(cuts[-1], first))
        other.learn(measure(other_cuts[-1], second))


def test_the_number_changes_exactly_with_the_cut_and_never_comes_back() -> None:
    assignment = Assignment(3)
    seen: list[tuple[int, list[int]]] = []
    for paces in ([100, 100, 300], [100, 100, 100], [100, 100, 300]):
        for _ in range(60):
            found = assignment.shares(48)
            seen.append((assignment.number, bounds(found)))
            assignment.learn(measure(found, paces))
    runs = [key for key, _ in itertools.groupby(seen)]
    assert len(runs) > 6
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.pairwise(runs))
    assert len({number for number, _ in runs}) == len(runs)  # though cuts come back
    assert len({tuple(cut) for _, cut in runs}) < len(runs)
    assert all(0 <= number < 2**48 for number, _ in runs)


def test_asking_again_changes_nothing() -> None:
    once, twice = Assignment(4), Assignment(4)
    for _ in range(30):
        found = once.shares(64)
        twice.shares(64)
        assert twice.shares(64) == found
        assert twice.number == once.number
        times = measure(found, [100, 250, 100, 100])
        once.learn(times)
        twice.learn(times)
    assert bounds(found) != bounds(shares(64, 4))


@pytest.mark.parametrize("microbatches", [32, 64])
@pytest.mark.parametrize("slow", range(4))
@pytest.mark.parametrize("noise", [None, 1, 2])
def test_half_speed_among_four_costs_little(microbatches: int, slow: int, noise: int | None) -> None:
    paces = [20_000 if worker == slow else 10_000 for worker in range(4)]
    rng = random.Random(noise) if noise else None
    cuts = follow(Assignment(4), paces, microbatches=microbatches, steps=200, noise=rng)
    assert all(reach(found, paces) >= 0.9 for found in cuts[16:])
    assert reach(cuts[0], paces) < 0.6
    moves = sum(a != b for a, b in itertools.pairwise(cuts))
    assert 1 <= moves <= (2 if rng is None else 5)


@given(
    paces=st.lists(st.integers(1_000, 10_000), min_size=1, max_size=10),
    microbatches=st.integers(10, 200),
)
def test_a_settled_cut_is_nearly_the_best(paces: Paces, microbatches: int) -> None:
    settled = follow(Assignment(len(paces)), paces, microbatches=microbatches, steps=45)[-1]
    best = find_best(paces, microbatches)
    lost = predict(settled, paces) - best
    assert lost <= max(max(paces), best // 24)  # a microbatch's time, or 4 % of the step's


@given(
    paces=st.lists(st.integers(100, 10_000), min_size=2, max_size=10),
    later=st.lists(st.integers(100, 10_000), min_size=10, max_size=10),
    microbatches=st.integers(1, 200),
)
def test_bounds_move_a_little_at_a_time(paces: Paces, later: Paces, microbatches: int) -> None:
    assignment = Assignment(len(paces))
    cuts = follow(assignment, paces, microbatches=microbatches, steps=25)
    cuts += follow(assignment, later[: len(paces)], microbatches=microbatches, steps=25)
    for before, after in itertools.pairwise(map(bounds, cuts)):
        assert all(abs(a - b) <= max(1, microbatches // 16) for a, b in zip(before, after, strict=True))


@given(paces=st.lists(st.integers(100, 10_000), min_size=2, max_size=10), microbatches=st.integers(10, 200))
def test_no_step_of_the_way_is_slower_than_before(paces: Paces, microbatches: int) -> None:
    cuts = follow(Assignment(len(paces)), paces, microbatches=microbatches, steps=45)
    settled = predict(cuts[-1], paces)
    for before, after in itertools.pairwise(cuts):
        assert predict(after, paces) <= max(predict(before, paces), settled)


@pytest.mark.parametrize(("microbatches", "workers"), [(8, 2), (64, 2), (64, 4), (64, 8)])
def test_noise_between_equal_workers_moves_nothing(microbatches: int, workers: int) -> None:
    for seed in range(5):
        assignment = Assignment(workers)
        cuts = follow(assignment, [10_000] * workers, microbatches=microbatches, steps=200, noise=random.Random(seed))
        assert all(found == shares(microbatches, workers) for found in cuts)


def test_a_pause_moves_nothing() -> None:
    """Single pauses, now and then two in a row, also at the very start (a first step compiles), and one of seven steps."""
    assignment, rng = Assignment(4), random.Random(3)
    for step in range(150):
        found = assignment.shares(64)
        assert found == shares(64, 4)
        times = measure(found, [10_000] * 4, rng)
        if step % 10 in (0, 1) or 105 <= step < 112:
            times[1] *= 100
        if step % 6 == 5:
            times[2] //= 100
        assignment.learn(times)


def test_frequent_pauses_hide_no_speed() -> None:
    assignment, paces = Assignment(4), [10_000, 20_000, 10_000, 10_000]
    for step in range(60):
        times = measure(assignment.shares(64), paces)
        times[step % 4] *= 20 if step % 3 == 0 else 1
        times[1] *= 20 if step % 5 == 0 else 1
        assignment.learn(times)
    assert reach(assignment.shares(64), paces) >= 0.9


@pytest.mark.parametrize("slowdown", [2, 10])
def test_a_lasting_change_moves_work_and_recovery_moves_it_back(slowdown: int) -> None:
    assignment, rng = Assignment(4), random.Random(5)
    equal, uneven = [10_000] * 4, [10_000, 10_000, 10_000 * slowdown, 10_000]
    follow(assignment, equal, microbatches=64, steps=60, noise=rng)
    slow = follow(assignment, uneven, microbatches=64, steps=60, noise=rng)
    assert slow[0] == shares(64, 4)
    assert all(reach(found, uneven) >= 0.9 for found in slow[24:])
    again = follow(assignment, equal, microbatches=64, steps=60, noise=rng)
    assert all(reach(found, equal) >= 0.94 for found in again[24:])


def test_a_slow_drift_is_followed() -> None:
    """No measurement ever jumps."""
    assignment = Assignment(2)
    for step in range(600):
        paces = [10_000, 10_000 + 20 * min(step, 500)]
        assignment.learn(measure(assignment.shares(64), paces))
    assert reach(assignment.shares(64), paces) >= 0.93


@given(last=st.integers(0, 63), workers=st.integers(2, 9))
def test_a_smaller_last_step_is_cut_in_proportion_and_changes_no_cut(last: int, workers: int) -> None:
    paces = [2_000] + [1_000] * (workers - 1)
    assignment = Assignment(workers)
    settled = follow(assignment, paces, microbatches=64, steps=40)[-1]
    number = assignment.number
    assert settled != shares(64, workers)
    found = assignment.shares(last)
    assert [number for share in found for number in share] == list(range(last))
    if last * min(map(len, settled)) >= 64:
        assert all(abs(64 * a.start - last * b.start) <= 32 for a, b in zip(found, settled, strict=True))
    assert last < workers or all(found)
    assert assignment.number == number
    assignment.learn(measure(found, paces))
    assert assignment.shares(64) == settled
    assert assignment.number == number


def test_a_smaller_first_step_does_not_bind() -> None:
    assignment = Assignment(4)
    assert assignment.shares(3) == shares(3, 4)
    assignment.learn([1, 1, 1, 0])
    assert assignment.shares(64) == shares(64, 4)
    assert (
        reach(follow(assignment, [2_000, 1_000, 1_000, 1_000], microbatches=64, steps=40)[-1], [2_000] + [1_000] * 3)
        > 0.9
    )


def test_a_larger_step_keeps_what_was_learned() -> None:
    assignment, paces = Assignment(4), [2_000, 1_000, 1_000, 1_000]
    follow(assignment, paces, microbatches=32, steps=40)
    number = assignment.number
    assert reach(assignment.shares(64), paces) > 0.9
    assert assignment.number != number


def test_nothing_moves_before_everybody_has_been_measured() -> None:
    assignment = Assignment(3)
    for _ in range(40):
        assignment.learn([0, 1_000 * len(assignment.shares(32)[1]), 90_000])
        assert assignment.shares(32) == shares(32, 3)


def test_a_missing_measurement_is_no_measurement() -> None:
    assignment, paces = Assignment(2), [1_000, 2_000]
    settled = follow(assignment, paces, microbatches=32, steps=40)[-1]
    assert settled != shares(32, 2)
    for step in range(40):
        times = measure(assignment.shares(32), paces)
        assignment.learn([times[0], 0] if step % 2 else [0, 0])
        assert assignment.shares(32) == settled


def test_more_workers_than_microbatches_stay_as_they_are() -> None:
    paces = [1_000 * (1 + worker) for worker in range(8)]
    assert all(found == shares(5, 8) for found in follow(Assignment(8), paces, microbatches=5, steps=40))


@given(paces=st.lists(st.integers(1_000, 3_000), min_size=2, max_size=8))
@example(paces=[1262, 1593, 1416, 1416, 1416, 1416, 1793, 1244])  # with 8 for the first, all others go askew
def test_a_settled_cut_sends_few_nodes(paces: Paces) -> None:
    """Not more than when everybody, from left to right, takes what it can do in the time that the cut needs."""
    settled = follow(Assignment(len(paces)), paces, microbatches=64, steps=45)[-1]
    assume(settled != shares(64, len(paces)))  # work has moved
    plain, start = [], 0
    for worker, pace in enumerate(paces):
        stop = min(start + predict(settled, paces) // pace, 64 - (len(paces) - 1 - worker))
        plain.append(range(start, stop))
        start = stop
    assert sum(len(nodes(share)) for share in settled) <= sum(len(nodes(share)) for share in plain)


@pytest.mark.parametrize(
    ("paces", "sent"),
    [((10, 20, 10, 10), 12), ((10, 10, 10, 20), 12), ((10, 30), 3), ((10, 10, 20), 9), ((10, 10, 10, 12), 11)],
)
def test_few_nodes_travel_from_a_settled_cut(paces: tuple[int, ...], sent: int) -> None:
    settled = follow(Assignment(len(paces)), [1_000 * pace for pace in paces], microbatches=64, steps=45)[-1]
    assert sum(len(nodes(share)) for share in settled) == sent
