"""Each rule does what torch does on whole tensors, and no cut into shards changes a bit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from unisono.config.sections import Train
from unisono.determinism.nodes import Node
from unisono.determinism.space import BLOCK
from unisono.engine.optimizer import Optimizer, array_names
from unisono.engine.reduction import Sum, Totals
from unisono.engine.replica import Replica, tensors_sha256
from unisono.engine.snapshot import SnapshotArrays, new_file
from unisono.errors import DivergedError
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.exchange.solo import Solo
from unisono.kernels import update as kernels
from unisono.kernels.update import block_squares
from unisono.processes.progress_table import RUNNING

pytestmark = pytest.mark.usefixtures("settled")

RULES: list[dict[str, Any]] = [
    {"optimizer": "sgd", "momentum": 0.0},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    {"optimizer": "adam"},
    {"optimizer": "adamw"},
    {"optimizer": "lion", "beta2": 0.99},
]
NAMES = ["sgd", "momentum", "nesterov", "adam", "adamw", "lion"]
RATES = [0.1, 0.05, 0.02, 0.01]
UNUSED = {1: {2}, 2: {0, 3}}
"""Step → numbers of the parameters that get no gradient."""


class Net(nn.Module):
    """Sizes off every grid, a norm, a bias, a large tensor that shards cut, and buffers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(97, 61)
        self.norm = nn.LayerNorm(61)
        self.head = nn.Linear(61, 7)
        self.register_buffer("mean", torch.linspace(0, 1, 33))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))


def net() -> nn.Module:
    torch.manual_seed(5)
    return Net()


def train(**settings: Any) -> Train:
    return Train.model_validate({"weight_decay": 0.1, **settings})


def gradient(replica: Replica, step: int) -> Tensor:
    """The whole sum of contributions of a step: on the segments only, padding being zero."""
    generator = torch.Generator().manual_seed(step)
    flat = torch.zeros_like(replica.flat)
    for index, segment in enumerate(replica.space.parameters):
        values = torch.randn(segment.shape, generator=generator, dtype=flat.dtype)
        if index not in UNUSED.get(step, ()):
            segment.view(flat).copy_(values)
    for segment in replica.space.buffers:
        if segment.name == "mean":
            segment.view(flat).fill_(0.25)
    return flat


def totals(replica: Replica, step: int, weight: int = 1) -> Totals:
    used = [index not in UNUSED.get(step, ()) for index in range(len(replica.parameters))]
    return Totals(loss=1.0, terms=weight, used=used, integers=replica.integer_values(), request=RUNNING)


def summed(slope: Tensor) -> Sum:
    """The sum of a step with a single contribution."""
    return Sum([(Node(0, 0), slope)])


def advance(optimizer: Optimizer, slope: Tensor, known: Totals, *, step: int, rate: float) -> float:
    """Work a step out and publish it; `slope` is my shard of the sum."""
    norm = optimizer.update(summed(slope), known, step=step, rate=rate)
    optimizer.publish(known.integers)
    return norm


def run(
    exchange: Exchange, settings: Train, make: Callable[[], nn.Module] = net, memory: int = -1, **options: Any
) -> tuple[Replica, Optimizer, list[float]]:
    """memory: file of a snapshot to keep the arrays in; −1: updated in place."""
    replica = zoo.replicate(zoo.Bare(make(), **options), exchange.rank, exchange.workers)
    arrays = None
    if memory >= 0:
        names = array_names(settings)
        arrays = SnapshotArrays(memory, names, replica, exchange, most_workers=exchange.workers, extra={}, direct=True)
    optimizer = Optimizer(replica, exchange, settings, arrays)
    if arrays:
        optimizer.publish(replica.integer_values())
    norms = []
    for step, rate in enumerate(RATES):
        mine = replica.shard.of(gradient(replica, step)).clone()
        norms.append(advance(optimizer, mine, totals(replica, step), step=step, rate=rate))
    return replica, optimizer, norms


def torch_optimizer(settings: Train, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, fused=True)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True)


@pytest.mark.parametrize("rule", RULES[:-1], ids=NAMES[:-1])
def test_torch_on_whole_tensors_gives_the_same_bits(rule: dict[str, Any]) -> None:
    settings = train(**rule)
    replica, optimizer, _ = run(Solo(), settings)
    start = zoo.replicate(zoo.Bare(net()))
    segments = start.space.parameters
    # each tensor with its padding, since vector bodies and scalar tails differ in the last bit
    whole = [nn.Parameter(start.flat[segment.start : segment.stop].clone()) for segment in segments]
    groups = [
        {"params": [weight], "lr": 1.0, "weight_decay": 0.1 if start.groups[segment.group].decays else 0.0}
        for weight, segment in zip(whole, segments, strict=True)
    ]
    reference = torch_optimizer(settings, groups)
    for step, rate in enumerate(RATES):
        flat = gradient(start, step)
        for index, (weight, segment) in enumerate(zip(whole, segments, strict=True)):
            weight.grad = None if index in UNUSED.get(step, ()) else flat[segment.start : segment.stop].clone()
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for index, (weight, segment) in enumerate(zip(whole, segments, strict=True)):
        assert torch.equal(weight.detach(), replica.flat[segment.start : segment.stop]), segment.name
        assert optimizer.counts[index] == sum(index not in UNUSED.get(step, ()) for step in range(len(RATES)))


def test_lion_is_program_1_of_its_paper() -> None:
    settings = train(optimizer="lion", beta1=0.9, beta2=0.99)
    replica, _, _ = run(Solo(), settings)
    start = zoo.replicate(zoo.Bare(net()))
    for index, segment in enumerate(start.space.parameters):
        weight, average = segment.view(start.flat).double(), torch.zeros(segment.shape, dtype=torch.float64)
        decay = 0.1 if start.groups[segment.group].decays else 0.0
        for step, rate in enumerate(RATES):
            if index in UNUSED.get(step, ()):
                continue
            slope = segment.view(gradient(start, step)).double()
            weight = weight - rate * ((0.9 * average + 0.1 * slope).sign() + decay * weight)
            average = 0.99 * average + 0.01 * slope
        torch.testing.assert_close(segment.view(replica.flat).double(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@pytest.mark.parametrize("clip_norm", [0.0, 3.0])
def test_no_cut_and_no_way_of_computing_changes_a_bit(
    rule: dict[str, Any], clip_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards and chunks; arrays that are updated in place, or copy by copy; compiled walks and torch's operations."""
    settings = train(**rule, clip_norm=clip_norm, ema_decay=0.9, pretrained_rate=0.5)
    found = set()
    compiled = kernels._compiled
    for workers, chunk, copies, walks in (
        (1, 2**20, False, False), (1, BLOCK, False, True), (1, BLOCK, True, True), (2, 2 * BLOCK, True, True),
        (3, BLOCK, True, False), (3, BLOCK, True, True), (5, 2**20, False, True), (7, BLOCK, True, True),
        (16, 2**20, False, False),
    ):  # fmt: skip
        monkeypatch.setattr("unisono.engine.optimizer.CHUNK", chunk)
        monkeypatch.setattr(kernels, "_compiled", compiled if walks else None)
        memory = new_file() if copies else -1

        def act(exchange: Exchange, memory: int = memory) -> str:
            replica, optimizer, norms = run(exchange, settings, memory=memory, pretrained=("encoder.",))
            everything = replica.all_tensors() | {"norms": torch.tensor(norms, dtype=torch.float64)}
            for name, shard in (*optimizer.slots.items(), ("average", optimizer.average)):
                flat = torch.zeros_like(replica.flat)
                exchange.gather_shards(shard, flat)
                for segment in replica.space.segments:
                    everything[f"{name}.{segment.name}"] = segment.view(flat)
                assert not flat[replica.space.blocks * BLOCK :].any(), "padding stays zero"
            return tensors_sha256(everything)

        found |= set(play(workers, act))
        if copies:
            os.close(memory)
    assert len(found) == 1


def test_the_norm_of_many_blocks_is_the_same_bits_on_any_number_of_workers() -> None:
    """Sums of each worker's own blocks would differ in the last bit."""
    generator = torch.Generator().manual_seed(0)
    slopes = [
        torch.randn(400, 400, generator=generator) * 10.0 ** torch.linspace(-3, 3, 400)[:, None] for _ in range(9)
    ]

    def act(exchange: Exchange) -> tuple[float, ...]:
        replica = zoo.replicate(zoo.Bare(nn.Linear(400, 400, bias=False)), exchange.rank, exchange.workers)
        optimizer = Optimizer(replica, exchange, train(optimizer="sgd"))
        norms = []
        for slope in slopes:
            flat = torch.zeros_like(replica.flat)
            replica.space.parameters[0].view(flat).copy_(slope)
            mine = replica.shard.of(flat).clone()
            norms.append(advance(optimizer, mine, totals(replica, 0), step=0, rate=0.0))
        return tuple(norms)

    found = {norms for workers in (1, 2, 3, 5, 7) for norms in play(workers, act)}
    assert len(found) == 1
    assert found.pop() == pytest.approx([float(slope.double().norm()) for slope in slopes], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_of_a_block_do_not_depend_on_other_blocks(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40 * BLOCK, generator=generator, dtype=dtype) * torch.logspace(-3, 3, 40 * BLOCK, dtype=dtype)
    expected = block_squares(values)
    torch.testing.assert_close(expected, values.double().view(-1, BLOCK).square().sum(1), rtol=1e-6, atol=0)
    for start, blocks in ((0, 1), (7, 1), (39, 1), (0, 2), (5, 3), (1, 17), (3, 37)):
        assert torch.equal(block_squares(values[start * BLOCK :][: blocks * BLOCK]), expected[start : start + blocks])


def test_biases_and_norms_do_not_decay() -> None:
    def still(replica: Replica) -> Tensor:
        return torch.zeros_like(replica.flat)

    replica = zoo.replicate(zoo.Bare(net()))
    before = {segment.name: segment.view(replica.flat).clone() for segment in replica.space.parameters}
    optimizer = Optimizer(replica, Solo(), train(optimizer="adamw", weight_decay=0.5))
    advance(optimizer, still(replica), totals(replica, 0), step=0, rate=0.1)
    for name, value in replica.backend.module.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if name in ("encoder.weight", "head.weight") else before[name]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_the_pretrained_part_learns_at_its_own_rate(factor: float) -> None:
    settings = train(optimizer="sgd", momentum=0.0, weight_decay=0.0, pretrained_rate=factor)
    replica = zoo.replicate(zoo.Bare(net(), pretrained=("encoder.", "norm.")))
    before = replica.flat.clone()
    slope = gradient(replica, 0)
    optimizer = Optimizer(replica, Solo(), settings)
    advance(optimizer, slope.clone(), totals(replica, 0), step=0, rate=0.1)
    for segment in replica.space.parameters:
        rate = 0.1 if segment.name.startswith("head.") else 0.1 * factor
        expected = segment.view(before) - rate * segment.view(slope)
        torch.testing.assert_close(segment.view(replica.flat), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_that_of_torch(limit: float) -> None:
    settings = train(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=limit)
    replica = zoo.replicate(zoo.Bare(net()))
    whole = [nn.Parameter(segment.view(replica.flat).clone()) for segment in replica.space.parameters]
    slope = gradient(replica, 0) * 4
    for weight, segment in zip(whole, replica.space.parameters, strict=True):
        weight.grad = segment.view(slope) / 4
    expected = torch.nn.utils.clip_grad_norm_(whole, limit)
    torch.optim.SGD(whole, lr=0.1).step()
    mean = dict(replica.backend.module.named_buffers())["mean"].clone()
    found = advance(Optimizer(replica, Solo(), settings), slope, totals(replica, 0, weight=4), step=0, rate=0.1)
    assert found == pytest.approx(float(expected), rel=1e-6)
    for weight, segment in zip(whole, replica.space.parameters, strict=True):
        torch.testing.assert_close(segment.view(replica.flat), weight.detach(), rtol=1e-5, atol=1e-6)
    now = dict(replica.backend.module.named_buffers())["mean"]
    torch.testing.assert_close(now, mean + 0.25, msg="a buffer's change is no gradient and is not clipped")


def test_average_of_the_weights() -> None:
    settings = train(optimizer="adamw", ema_decay=0.5)
    replica = zoo.replicate(zoo.Bare(net()))
    optimizer = Optimizer(replica, Solo(), settings)
    expected = replica.flat.double()
    for step, rate in enumerate(RATES):
        advance(optimizer, gradient(replica, step), totals(replica, step), step=step, rate=rate)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * replica.flat.double()
    assert optimizer.average is not None
    for segment in replica.space.segments:
        if segment.name != "mask":
            torch.testing.assert_close(
                segment.view(optimizer.average).double(), segment.view(expected), rtol=1e-5, atol=1e-6
            )


def test_an_untouched_mask_of_minus_infinity_stays() -> None:
    replica, optimizer, _ = run(Solo(), train(optimizer="adamw", ema_decay=0.5))
    expected = torch.full((3, 3), -torch.inf).triu(1)
    segment = next(segment for segment in replica.space.buffers if segment.name == "mask")
    assert optimizer.average is not None
    assert torch.equal(segment.view(replica.flat), expected)
    assert torch.equal(segment.view(optimizer.average), expected)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_float64_modules(rule: dict[str, Any]) -> None:
    replica, _, _ = run(Solo(), train(**rule), make=lambda: net().double())
    single, _, _ = run(Solo(), train(**rule))
    assert (
        replica.flat.dtype == torch.float64
        and torch.isfinite(replica.flat[: 1024 * replica.space.parameter_blocks]).all()
    )
    assert replica.flat.shape == single.flat.shape


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(workers: int, bad: float) -> None:
    def act(exchange: Exchange) -> None:
        replica = zoo.replicate(zoo.Bare(net()), exchange.rank, workers)
        optimizer = Optimizer(replica, exchange, train(optimizer="adamw", ema_decay=0.9))
        before = replica.flat.clone(), optimizer.weights.clone()
        flat = gradient(replica, 0)
        flat[replica.space.parameters[-1].start] = bad
        with pytest.raises(DivergedError, match="at step 1"):
            optimizer.update(summed(replica.shard.of(flat)), totals(replica, 0), step=0, rate=0.1)
        assert torch.equal(replica.flat, before[0]) and torch.equal(optimizer.weights, before[1])
        assert not any(slot.any() for slot in optimizer.slots.values()) and not optimizer.counts.any()
        assert optimizer.average is not None and torch.equal(optimizer.average, before[1])

    play(workers, act)
