"""Ranges of shared memory: nobody's twice, and whole again when all are given back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from unisono.parallel.arena import ALIGNMENT_BYTES, Arena

SIZE = 64 * ALIGNMENT_BYTES


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 900)), max_size=60))
def test_ranges_never_overlap_and_come_back_whole(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(SIZE)
    taken: list[tuple[int, int]] = []
    for take, number in steps:
        if take or not taken:
            offset = arena.take(number)
            if offset < 0:
                continue
            assert offset % ALIGNMENT_BYTES == 0 and offset + number <= SIZE
            assert all(offset + number <= other or other + size <= offset for other, size in taken)
            taken.append((offset, number))
        else:
            arena.give_back(*taken.pop(number % len(taken)))
    for offset, size in taken:
        arena.give_back(offset, size)
    assert arena._free == [(0, SIZE)]  # neighbours are joined: otherwise it would fall to pieces


def test_what_does_not_fit_is_refused_and_what_just_fits_is_not() -> None:
    arena = Arena(SIZE)
    assert arena.take(SIZE + 1) == -1
    assert arena.take(SIZE) == 0
    assert arena.take(1) == -1
    arena.give_back(0, SIZE)
    assert arena.take(1) == 0
    assert arena.take(SIZE) == -1


def test_both_views_are_of_the_same_memory() -> None:
    arena = Arena(SIZE)
    arena.view[3:6] = b"abc"
    assert arena.memory[3:6] == b"abc"
