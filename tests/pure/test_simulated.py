"""Simulated workers give the bits of a single one, even a thousand of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from unisono.config.sections import Train
from unisono.data.columns import Columns
from unisono.data.feed import Feed
from unisono.data.order import Order
from unisono.determinism.nodes import fold, nodes
from unisono.determinism.tree import fold_nodes
from unisono.engine.assignment import shares
from unisono.engine.contribution import Contributor
from unisono.engine.loop import steps
from unisono.engine.optimizer import Optimizer
from unisono.engine.replica import tensors_sha256
from unisono.engine.state import TrainState
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import Simulated, play
from unisono.exchange.solo import Solo

pytestmark = pytest.mark.usefixtures("settled")


def train(exchange: Exchange, *, microbatches: int, total_steps: int) -> tuple[str, float]:
    """Train a linear layer; return the hash of its weights and the last loss."""
    task = zoo.Classified(lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(9, zoo.CLASSES)))
    source = Columns({name: torch.from_numpy(column) for name, column in floats(microbatches).items()})
    source.prefetchable = False  # a thousand threads more would only cost time
    settings = Train(optimizer="adamw", learning_rate=0.05, microbatches=microbatches, clip_norm=0.1)
    torch.manual_seed(0)
    replica = zoo.replicate(task, exchange.rank, exchange.workers)
    order = Order(
        lengths=source.lengths, padded=True, samples_per_step=microbatches, microbatches=microbatches, seed=1,
        total_steps=total_steps,
    )  # fmt: skip
    state = TrainState(step=0, replica=replica, optimizer=Optimizer(replica, exchange, settings), exchange=exchange)
    contributor = Contributor(replica=replica, seed=2)
    feed = Feed(source, order, torch.device("cpu"))
    losses = [done.totals.loss for done in steps(state, order, feed, contributor, settings)]
    return tensors_sha256(replica.all_tensors()), losses[-1]


def floats(samples: int) -> dict[str, np.ndarray]:
    columns = zoo.words(samples)
    return {**columns, "x": columns["x"].astype(np.float32) / zoo.WORDS}


@pytest.mark.parametrize(("workers", "total_steps"), [(2, 3), (64, 2), pytest.param(150, 1, marks=pytest.mark.slow)])
def test_many_workers_give_the_bits_of_one(workers: int, total_steps: int) -> None:
    microbatches = max(64, workers)
    expected = train(Solo(), microbatches=microbatches, total_steps=total_steps)
    found = play(workers, lambda exchange: train(exchange, microbatches=microbatches, total_steps=total_steps))
    assert set(found) == {expected}
    assert expected != train(Solo(), microbatches=microbatches, total_steps=total_steps + 1)


@pytest.mark.slow
def test_a_thousand_workers_reduce_to_the_bits_of_one() -> None:
    """Each owns one element of the gradient, and has one microbatch."""
    workers, microbatches = 1000, 1000
    values = torch.randn(microbatches, workers, generator=torch.Generator().manual_seed(0))
    cuts = {count: [nodes(share) for share in shares(microbatches, count)] for count in (1, workers)}

    def act(exchange: Exchange) -> Tensor:
        cut = cuts[exchange.workers]
        sums = [fold(list(values[n.index << n.level : (n.index + 1) << n.level])) for n in cut[exchange.rank]]
        received = exchange.to_owners(
            sums, [[0] * len(own) for own in cut], shard_size=workers // exchange.workers, dtype=values.dtype
        )
        mine = fold_nodes(list(zip((node for own in cut for node in own), received, strict=True)))
        whole = torch.zeros(workers)
        exchange.gather_shards(mine, whole)
        return whole

    expected = act(Solo())
    assert all(torch.equal(found, expected) for found in play(workers, act))
    assert torch.equal(expected, fold(list(values))) and not torch.equal(expected, values.sum(0))


def test_results_come_in_order_of_rank() -> None:
    assert play(5, lambda exchange: [*exchange.gather_bytes(bytes([exchange.rank])), exchange.rank]) == [
        [b"\0", b"\1", b"\2", b"\3", b"\4", rank] for rank in range(5)
    ]


@pytest.mark.parametrize("failing", [0, 1, 3])
@pytest.mark.parametrize("exchanges_before", [0, 1, 2])
def test_an_error_in_one_worker_ends_all_and_surfaces(failing: int, exchanges_before: int) -> None:
    def act(exchange: Simulated) -> None:
        for number in range(4):
            if exchange.rank == failing and number == exchanges_before:
                raise ZeroDivisionError("planted")
            exchange.wait_for_all()

    with pytest.raises(ZeroDivisionError, match="planted"):
        play(4, act)


def test_workers_take_turns() -> None:
    """Between two exchanges a worker has the process to itself: global generators are its own."""
    running: list[int] = []

    def act(exchange: Simulated) -> list[Tensor]:
        drawn = []
        for number in range(3):
            running.append(exchange.rank)
            torch.manual_seed(10 * exchange.rank + number)
            drawn.append(torch.rand(3))
            assert running.pop() == exchange.rank and not running
            exchange.wait_for_all()
        return drawn

    for rank, drawn in enumerate(play(6, act)):
        for number, value in enumerate(drawn):
            torch.manual_seed(10 * rank + number)
            assert torch.equal(value, torch.rand(3))
