"""Where the time goes: spans add up, waiting is told from exchanging, and what is counted is what is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import unisono.engine.profile
import zoo
from unisono.backends.torch_backend import TorchBackend
from unisono.backends.torch_footprint import count_flop
from unisono.engine.footprint import estimate_flop, measure_activations
from unisono.engine.profile import MOST_STEPS, PHASES, Profile, Recorded, storage_bytes
from unisono.exchange.solo import Solo
from unisono.processes.progress_table import UNWATCHED
from unisono.tracking.profile_report import merge, summarise, tell, trace, whole_steps

CPU = torch.device("cpu")
FACTS = {"name": "toy", "device": "cpu", "threads": 1}
SECOND = 10**9
Step = dict[str, Any]


def lived(rank: int, *spans: tuple[str, float], workers: int = 2, first: bool = False, since: float = 0.0) -> Step:
    """A worker's part of a step: (phase, seconds) one after another."""
    now, found = round(since * SECOND), []
    for phase, seconds in spans:
        found.append([phase, -1, now, now + round(seconds * SECOND)])
        now += round(seconds * SECOND)
    return {"rank": rank, "workers": workers, "first": first, "spans": found}


def report(steps: dict[int, Step], host: str = "here", **facts: Any) -> dict[str, Any]:
    """What a worker tells, through JSON as in life."""
    empty: dict[str, Any] = {"flop": {}, "peak": {}, "memory": {"parameters": 8}, "problems": []}
    return json.loads(json.dumps({"host": host, "steps": steps, **empty, **facts}))  # type: ignore[no-any-return]


def phases_of(spans: list[tuple[str, int, int, int]]) -> list[tuple[str, float]]:
    return [(phase, (end - start) / SECOND) for phase, _, start, end in spans]


EARLY = (("forward", 1.0), ("add_integers", 3.5), ("optimiser", 0.5))
LATE = (("forward", 4.0), ("add_integers", 0.5), ("optimiser", 0.5))


def test_who_comes_first_waits_and_then_both_exchange() -> None:
    steps = merge([report({3: lived(0, *EARLY)}), report({3: lived(1, *LATE)})])
    assert [phases_of(part.spans) for part in steps[3]] == [
        [("forward", 1.0), ("wait", 3.0), ("exchange", 0.5), ("optimiser", 0.5)],
        [("forward", 4.0), ("exchange", 0.5), ("optimiser", 0.5)],
    ]


def test_the_clock_of_another_host_is_set_by_the_ends_of_calls() -> None:
    """An hour ahead: what is found is what one clock would have shown."""
    here = report({3: lived(0, *EARLY), 4: lived(0, *EARLY, since=9)})
    there = report({3: lived(1, *LATE, since=3600), 4: lived(1, *LATE, since=3609)}, host="there")
    one_clock = report({3: lived(1, *LATE), 4: lived(1, *LATE, since=9)})
    parts = [[part.spans for step in merge([here, other]).values() for part in step] for other in (there, one_clock)]
    assert parts[0] == parts[1]


def test_calls_of_a_worker_whose_peer_is_lost_are_all_exchange() -> None:
    steps = merge([report({3: lived(0, *EARLY)}), report({})])
    assert phases_of(steps[3][0].spans)[1:] == [("exchange", 3.5), ("optimiser", 0.5)]


def test_shares_add_up_to_the_steps() -> None:
    outside = ("evaluate", 100.0)
    reports = [
        report({step: lived(0, ("data", 0.25), *EARLY, ("other", 0.5), outside) for step in range(4)}),
        report({step: lived(1, ("data", 0.25), *LATE, ("other", 0.5)) for step in range(4)}),
    ]
    found = summarise(reports, FACTS)
    assert found["step_seconds"] == 5.75
    assert sum(phase["share"] for phase in found["phases"].values()) == pytest.approx(1.0, abs=1e-12)
    assert list(found["phases"]) == list(PHASES)
    wait, forward = found["phases"]["wait"], found["phases"]["forward"]
    assert (wait["seconds"], wait["lowest"], wait["highest"], wait["share"]) == (1.5, 0.0, 3.0, 1.5 / 5.75)
    assert (forward["seconds"], forward["lowest"], forward["highest"]) == (2.5, 1.0, 4.0)
    assert "| forward   |     2.5000 |         1.0000 to 4.0000 |   43.5% |" in tell(found)


def test_figures_are_of_steps_that_all_tell_and_of_no_first_one() -> None:
    survivor = report({step: lived(0, ("forward", 1.0), first=step in (0, 5)) for step in range(8)})
    newcomer = report({step: lived(1, ("forward", 1.0), first=step == 5) for step in range(5, 8)})
    assert list(whole_steps(merge([survivor, newcomer]))) == [6, 7]
    assert summarise([survivor, newcomer], FACTS)["steps"] == [7, 8]  # as steps are told: from 1
    alone = report({0: lived(0, ("forward", 1.0), first=True)})
    assert list(whole_steps(merge([alone, report({})]))) == [0]
    nothing = summarise([report({}), report({})], FACTS)
    assert (nothing["steps"], nothing["problems"]) == ([], ["no step was recorded"])
    assert "no step was recorded" in tell(nothing)


def test_model_speed_is_held_against_the_better_product() -> None:
    peak = {"float32": 8e9, "bfloat16": 2e9}
    reports = [
        report({4: lived(rank, ("forward", 1.0), ("backward", 1.0), ("other", 2.0))}, flop={"4": 8 * SECOND}, peak=peak)
        for rank in (0, 1)
    ]
    model = summarise(reports, FACTS)["model"]
    assert (model["flop_per_step"], model["flop_per_second"], model["flop_per_second_computing"]) == (16e9, 2e9, 4e9)
    assert (model["peak_taken"], model["utilisation"]) == ("float32", 0.25)


def test_trace_has_a_row_per_worker_and_complete_events() -> None:
    step = lived(0, ("forward", 1.0), ("backward", 2.0), since=50)
    step["spans"][0][1] = 7
    found = json.loads(trace([report({3: step}), report({3: lived(1, ("forward", 1.0), since=50.5)})]))
    names = [one["args"]["name"] for one in found["traceEvents"] if one["ph"] == "M"]
    events = [one for one in found["traceEvents"] if one["ph"] == "X"]
    assert names == ["worker 0", "worker 1"]
    assert [(one["tid"], one["name"], one["ts"], one["dur"], one["args"]) for one in events] == [
        (0, "forward", 0.0, 1e6, {"step": 4, "microbatch": 7}),
        (0, "backward", 1e6, 2e6, {"step": 4}),
        (1, "forward", 0.5e6, 1e6, {"step": 4}),
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A clock that says 1, 2, 3, …"""
    ticks: list[int] = []

    def tick() -> int:
        ticks.append(len(ticks) + 1)
        return ticks[-1]

    monkeypatch.setattr(unisono.engine.profile.time, "monotonic_ns", tick)
    return ticks


def take_step(
    profile: Profile, step: int, verbs: str = "begin load contribute audit reduce update commit report"
) -> None:
    for verb in verbs.split():
        profile.at(verb, step, 0 if verb in ("load", "contribute") else -1)


def test_marks_make_spans_that_touch(clock: list[int]) -> None:
    profile = Profile()
    exchange = profile.join(Solo(CPU), UNWATCHED, CPU)
    for verb in ("begin", "load", "contribute"):
        profile.at(verb, 0, 2)
    profile.turn("tree", 2)
    profile.at("reduce", 0)
    exchange.add_integers(torch.zeros(1, dtype=torch.int64))
    profile.at("commit", 0)
    profile.at("report", 0)
    exchange.wait_for_all()  # of what follows a step, calls are not told apart
    profile.at("evaluate")
    profile.at("evaluate")
    profile.at("begin", 1)
    spans = profile.steps[0].spans
    assert [span[0] for span in spans] == [
        "other", "data", "forward", "tree", "tree", "add_integers", "tree", "exchange", "report", "evaluate"
    ]  # fmt: skip
    assert [after[2] - before[3] for before, after in pairwise(spans)] == [0] * (len(spans) - 1)
    assert [span[1] for span in spans[:4]] == [2, 2, 2, 2]
    assert list(profile.steps) == [0]


class Lent(Solo):
    """An exchange in which each call computes two ticks for others."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.offload: Any = SimpleNamespace(given_seconds=0.0)

    def add_integers(self, values: Tensor) -> Tensor:
        self.offload.given_seconds += 2e-9
        return values


def test_what_was_computed_for_others_is_no_part_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 1000, 5))
    monkeypatch.setattr(unisono.engine.profile.time, "monotonic_ns", lambda: next(ticks))
    profile = Profile()
    exchange = profile.join(Lent(), UNWATCHED, CPU)
    profile.at("begin", 0)
    exchange.add_integers(torch.zeros(1, dtype=torch.int64))
    profile.at("report", 0)
    assert profile.steps[0].spans == [
        ("other", -1, 0, 5), ("assist", -1, 5, 7), ("add_integers", -1, 7, 10), ("other", -1, 10, 15)
    ]  # fmt: skip


def test_dissolved_steps_are_forgotten_and_the_newest_kept(clock: list[int]) -> None:
    profile = Profile()
    profile.join(Solo(CPU), UNWATCHED, CPU)
    take_step(profile, 0)
    take_step(profile, 1, "begin load contribute")  # another worker is lost
    profile.join(Solo(CPU), UNWATCHED, CPU)
    assert list(profile.steps) == [0]
    take_step(profile, 0)  # computed again, and told once
    take_step(profile, 1)
    assert (list(profile.steps), profile.steps[0].first, profile.steps[1].first) == ([0, 1], True, False)
    for step in range(2, MOST_STEPS + 5):
        take_step(profile, step)
    assert list(profile.steps) == list(range(5, MOST_STEPS + 5))


class Product(torch.autograd.Function):
    """A linear layer that computes its gradients by itself, one of them in place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, weight)
        return F.linear(values, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, weight = ctx.saved_tensors
        return torch.matmul(gradient, weight), torch.zeros_like(weight).addmm_(gradient.t(), values)


def leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def attention() -> Tensor:
    query, key = leaf(2, 3, 5, 4), leaf(2, 3, 7, 4)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, key)


SCORES = 2 * 2 * 3 * 5 * 7 * 4
COUNTED: dict[str, tuple[Callable[[], Tensor], int]] = {
    "linear": (lambda: F.linear(leaf(5, 6), leaf(7, 6), leaf(7)), 3 * 2 * 5 * 6 * 7),
    "custom function": (lambda: Product.apply(leaf(5, 6), leaf(7, 6)), 3 * 2 * 5 * 6 * 7),
    "batched": (lambda: leaf(4, 5, 6) @ leaf(4, 6, 7), 3 * 4 * 2 * 5 * 6 * 7),
    "attention": (attention, 2 * SCORES + 5 * SCORES),  # backward computes the scores once more
    "convolution": (lambda: F.conv2d(leaf(1, 2, 5, 5), leaf(3, 2, 3, 3)), 3 * 2 * 9 * 2 * 3 * 9),
    "elementwise": (lambda: leaf(5).exp(), 0),
}


@pytest.mark.parametrize(("compute", "expected"), COUNTED.values(), ids=COUNTED)
def test_what_is_counted_is_what_is_computed(compute: Callable[[], Tensor], expected: int) -> None:
    assert count_flop(lambda: compute().sum().backward()) == expected


def test_other_shapes_count_as_the_nearest_in_proportion() -> None:
    counted = {((10, 2),): 100, ((40, 2),): 800}
    assert [estimate_flop(((rows, 2),), counted) for rows in (10, 12, 30)] == [100, 120, 600]


def test_activations_are_the_most_that_is_saved_at_a_time() -> None:
    """Of two layers and a sum of squares: input, and both layers' outputs; not the weights."""
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 32))
    profile = Profile()
    profile.steps[3] = Recorded(rank=0, workers=1, first=True, microbatches=[(0, ((1, 8),)), (1, ((5, 8),))])
    asked: list[tuple[int, int]] = []

    def again(step: int, number: int) -> None:
        asked.append((step, number))
        (module(torch.ones(5, 8)) ** 2).sum().backward()

    constants = [parameter.detach() for parameter in module.parameters()]
    assert measure_activations(again, TorchBackend(zoo.Bare(module), module), profile, constants) == 4 * 5 * (
        8 + 16 + 32
    )
    assert asked == [(3, 1)]


def test_memory_is_counted_once() -> None:
    whole = torch.zeros(100)
    rows = torch.sparse_coo_tensor([[0, 1]], torch.ones(2, 3), (9, 3), check_invariants=True)
    assert storage_bytes([whole, whole[:3], None, rows]) == 400 + 16 + 24
    assert storage_bytes([whole, rows], besides={whole.data_ptr()}) == 40
