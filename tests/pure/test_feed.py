"""The feed yields what the source holds, whatever it loads ahead, and holds no more of it than it says."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unisono.data.feed import TOGETHER, TOGETHER_BYTES, Feed
from unisono.data.order import Order

MICROBATCHES = 6
STEPS = 5


class Counted:
    """A source whose samples are their own numbers, and which knows who asks for them."""

    padded = False
    prefetchable = True
    sha256 = ""

    def __init__(self, bytes_each: int, samples: int = 40) -> None:
        self.lengths = np.ones(samples, np.int32)
        self.takes = 0
        self.threads: set[str] = set()
        self._bytes_each = bytes_each

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, samples: np.ndarray, epoch: int = 0) -> dict[str, Tensor]:
        self.takes += 1
        self.threads.add(threading.current_thread().name)
        numbers = torch.from_numpy(samples + 1000 * epoch)
        return {"number": numbers, "rest": torch.zeros(self._bytes_each, dtype=torch.uint8)}


def order_of(source: Counted) -> Order:
    return Order(
        lengths=source.lengths, padded=False, samples_per_step=12, microbatches=MICROBATCHES, seed=3, total_steps=STEPS
    )


shares = st.tuples(st.integers(0, MICROBATCHES), st.integers(0, MICROBATCHES)).map(lambda ends: range(*sorted(ends)))


@given(st.lists(shares, min_size=STEPS, max_size=STEPS), st.sampled_from([1, 10_000, TOGETHER_BYTES // 3]), st.data())
def test_microbatches_are_those_of_the_order_however_shares_move(
    mine: list[range], size: int, data: st.DataObject
) -> None:
    """The last step of an epoch is smaller, which the fourth is."""
    source = Counted(size)
    order = order_of(source)
    feed = Feed(source, order, torch.device("cpu"))
    for step, drawn in zip(order.steps(), mine, strict=True):
        share = range(drawn.start, min(drawn.stop, len(step.microbatches)))
        stop = data.draw(st.integers(0, len(share)))  # a step may be left half way, when a peer is lost
        found = feed.load(step, share)
        for number in share[:stop]:
            told, microbatch = next(found)
            assert told == number
            assert microbatch["number"].tolist() == (step.microbatches[number] + 1000 * step.epoch).tolist()
        if stop:  # what was loaded in vain is let go
            assert {number for number, _ in feed._coming} <= {step.number, step.number + 1}
    feed.close()


@pytest.mark.parametrize(
    ("size", "ahead"), [(1, 2 * MICROBATCHES), (TOGETHER_BYTES, 2 * TOGETHER), (TOGETHER_BYTES // 3 - 99, 2 * 3)]
)
def test_small_microbatches_are_loaded_a_step_ahead_and_large_ones_in_pairs(size: int, ahead: int) -> None:
    source = Counted(size, samples=12 * STEPS)
    order = order_of(source)
    feed = Feed(source, order, torch.device("cpu"))
    everything = range(MICROBATCHES)
    used, most = 0, 0
    for step in order.steps():
        for _ in feed.load(step, everything):
            feed._thread.submit(int).result()  # type: ignore[union-attr]  # all that was asked for is there
            most = max(most, source.takes - used)
            used += 1
    feed.close()
    assert most == ahead
    assert source.takes == used == MICROBATCHES * STEPS
    assert source.threads == {"unisono-feed_0"}
