"""Shares are contiguous, even, and start large nodes of the tree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.engine.assignment import shares
from unisono.engine.tree import nodes


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
