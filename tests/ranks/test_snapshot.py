"""The snapshot: what it holds is the state, byte for byte; an update is committed by all or by none; any number of
workers goes on from it.

Simulated workers share one memory file, as real ones do, and join through `joining.join`.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import CPU, Forked

import zoo
from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.data.feed import Feed
from unisono.determinism.nodes import Node
from unisono.determinism.space import BLOCK
from unisono.engine.loop import steps
from unisono.engine.reduction import Sum, Totals
from unisono.engine.snapshot import COPIES, FACTS_BYTES, Description, Snapshot, SnapshotArrays, new_file
from unisono.errors import DivergedError, WorkerError
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.exchange.solo import Solo
from unisono.processes.progress_table import RUNNING, UNWATCHED, Progress
from unisono.runtime import setup as joining
from unisono.runtime.setup import Job, Run, join, make_ready, run_facts
from unisono.storage.checkpoints import Content
from unisono.tasks.own_inputs import open_own


class Mixed(nn.Module):
    """Everything that lies somewhere else: tied and frozen weights, of another dtype too, a bool mask, integer buffers
    that change, and buffers that the state_dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(zoo.WORDS, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.small = nn.Parameter(torch.randn(3, dtype=torch.bfloat16), requires_grad=False)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, zoo.WORDS, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("allowed", torch.arange(zoo.WORDS) < 50)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int32))
        self.register_buffer("seen", torch.zeros(8), persistent=False)
        self.register_buffer("turns", torch.zeros(2, 2, dtype=torch.uint8), persistent=False)
        self.register_buffer("nothing", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.frozen(self.embedding(x).mean(1)))
        if self.training:
            self.calls += 1
            self.turns += 2
            self.seen = 0.9 * self.seen + 0.1 * hidden.detach().mean(0)
        return self.out(hidden + 0.01 * self.seen).masked_fill(~self.allowed, -100.0)


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    data: Callable[..., Any] = zoo.words
    train: dict[str, Any] = field(default_factory=dict)


CASES = {
    "mixed": Case(Mixed, train={"ema_decay": 0.8}),
    "convolution": Case(zoo.convolution, zoo.images, {"clip_norm": 0.5, "optimizer": "sgd"}),
    "attention, bf16, averaged": Case(zoo.Attention, train={"precision": "bf16", "ema_decay": 0.5}),
    "tied, frozen, unused": Case(zoo.Odd),
    "counting": Case(zoo.Counting, train={"ema_decay": 0.9, "optimizer": "lion", "learning_rate": 1e-3}),
    "rows": Case(lambda: zoo.bag(sparse=True)),
    "lazy rows": Case(lambda: zoo.bag(sparse=True), train={"lazy_rows": True, "weight_decay": 0.1}),
    "float64": Case(lambda: zoo.bag().double()),
}


def recipe_of(case: Case) -> Recipe:
    train = {"samples_per_step": 20, "microbatches": 8, "epochs": 9.0, "learning_rate": 0.02, **case.train}
    return recipes.check({"train": train, "evaluate": {"keep_best": True, "samples_per_microbatch": 4}})


class Held:
    """The link of a worker whose run has a snapshot in this file."""

    progress: Progress = UNWATCHED
    prepared = False

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.told: list[Any] = []

    def request(self) -> int:
        return RUNNING

    def tell(self, event: Any) -> None:
        self.told.append(event)

    def save(self, state: Any, facts: Any, folder: Path, keep: int) -> None:
        state.optimizer.arrays.pin()

    def settle(self) -> bool:
        return True


@pytest.fixture
def memory() -> Iterator[int]:
    file = new_file()
    assert file >= 0
    yield file
    os.close(file)


def take_part(case: Case, exchange: Exchange, memory: int) -> Run:
    """Join, as a worker does: begin, or go on from what the memory holds (−1: from nothing)."""
    recipe = recipe_of(case)
    task = zoo.Classified(case.build)
    inputs = open_own(recipe, task, case.data(), validation=case.data(11, seed=8))
    job = Job(recipe=recipe, folder=Path(tempfile.gettempdir()) / "unisono-snapshots")
    return join(job, make_ready(job, inputs, CPU), exchange, Held(memory))


def advance(run: Run, count: int) -> None:
    feed = Feed(run.inputs.train, run.order, CPU)
    try:
        for _, _done in zip(
            range(count), steps(run.state, run.order, feed, run.contributor, run.recipe.train), strict=False
        ):
            pass
    finally:
        feed.close()


def judge(run: Run) -> None:
    """An evaluation that finds these weights the best so far."""
    assert run.state.judge(float(run.state.step), higher=True, keep=True)
    run.state.note_evaluation()


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(value.dtype), tuple(value.shape), value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, value in sorted(tensors.items())
    }


def told(content: Content) -> dict[str, Any]:
    """All of a content, so that it can be compared after what it looks at has changed."""
    return {part: bits(getattr(content, part)) for part in ("parameters", "buffers", "optimizer")} | {
        "facts": dict(content.facts)
    }


def gathered(run: Run) -> dict[str, Any]:
    """The same from the workers, as one without supervisor writes it."""
    found = told(run.state.content())
    found["facts"] |= run_facts(run.job, run.ready, run.order.total_steps)
    return found


def held(memory: int) -> dict[str, Any]:
    snapshot = Snapshot(memory)
    return told(snapshot.content(snapshot.facts()))


@pytest.fixture(params=[True, False], ids=["direct", "copied"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether updates are computed in the snapshot; else in memory of the worker's own, as on a GPU."""
    if not request.param:
        monkeypatch.setattr(
            joining, "SnapshotArrays", lambda *given, **more: SnapshotArrays(*given, **{**more, "direct": False})
        )
    return request.param


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("mixed", "convolution") else [pytest.mark.slow]) for name in CASES],
)
def test_content_is_the_state_s_byte_for_byte(name: str, direct: bool, memory: int) -> None:
    case = CASES[name]

    def act(exchange: Exchange) -> list[dict[str, Any]]:
        run = take_part(case, exchange, memory)
        assert run.state.optimizer.arrays._direct is direct  # type: ignore[attr-defined]
        found = []
        for act in (lambda: None, lambda: advance(run, 1), lambda: advance(run, 2), lambda: judge(run)):
            act()
            exchange.wait_for_all()  # worker 0 has flipped
            found.append((gathered(run), held(memory)))
            exchange.wait_for_all()
        advance(run, 1)
        exchange.wait_for_all()
        return [*found, (gathered(run), held(memory))]

    for number, (expected, found) in enumerate(play(3, act)[0]):
        assert found == expected, f"after part {number}"
        assert ("best_integers" in found["optimizer"]) == (number > 2)
    assert found["facts"]["step"] == 4 and found["facts"]["best_step"] == 3
    assert len(found["facts"]["last"]) == 3


def alone(case: Case, count: int) -> dict[str, Any]:
    """After so many steps of one worker without a snapshot, the best weights those after two."""
    run = take_part(case, Solo(), -1)
    advance(run, 2)
    judge(run)
    advance(run, count - 2)
    return gathered(run)


@pytest.mark.parametrize(
    "name",
    [
        "mixed",
        "convolution",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("attention, bf16, averaged", "lazy rows")),
    ],
)
def test_any_number_of_workers_goes_on_from_it(name: str, direct: bool, memory: int) -> None:
    case = CASES[name]

    def act(exchange: Exchange, count: int) -> int:
        run = take_part(case, exchange, memory)
        begun = run.state.step
        assert run.recovered == (begun > 0) and run.begun == begun
        if begun == 2:
            judge(run)
        advance(run, count)
        exchange.wait_for_all()
        assert held(memory) == gathered(run)
        exchange.wait_for_all()
        return begun

    begun = [
        play(workers, functools.partial(act, count=count))[0]
        for workers, count in ((3, 2), (2, 1), (8, 1), (1, 1), (5, 1))
    ]
    assert begun == [0, 2, 3, 4, 5]
    assert held(memory) == alone(case, 6)


def test_real_workers_go_on_from_it(memory: int, forked: Forked) -> None:
    case = CASES["mixed"]

    def act(exchange: Exchange, count: int) -> int:
        run = take_part(case, exchange, memory)
        begun = run.state.step
        if begun == 2:
            judge(run)
        advance(run, count)
        return begun

    begun = [forked(workers, functools.partial(act, count=count)) for workers, count in ((3, 2), (2, 3))]
    assert begun == [[0] * 3, [2] * 2]
    assert held(memory) == alone(case, 5)


def test_an_update_that_is_not_committed_is_not_seen(memory: int) -> None:
    """Two of three workers have written their shards, and one even the facts, when all are lost."""
    case = CASES["mixed"]

    def act(exchange: Exchange) -> dict[str, Any]:
        run = take_part(case, exchange, memory)
        advance(run, 3)
        exchange.wait_for_all()  # worker 0 has flipped
        before = held(memory)
        exchange.wait_for_all()
        arrays: Any = run.state.optimizer.arrays
        if exchange.rank < 2:
            for array in arrays.begin().values():
                array.fill_(7.0)
        if exchange.rank == 0:
            sequence = arrays.snapshot.sequence + 1
            arrays.snapshot.write_facts(sequence, {**arrays.snapshot.facts(), "step": 4, "copy": arrays._next})
        return before

    before = play(3, act)[0]
    assert held(memory) == before
    again = play(2, lambda exchange: gathered(take_part(case, exchange, memory)))[0]
    assert again == before


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_a_worker_lost_at_the_commit_tears_nothing(clip_norm: float, direct: bool, memory: int, forked: Forked) -> None:
    """Where all have written before the norm is known, the commit goes on without it; else nobody commits."""
    case = Case(zoo.convolution, zoo.images, {"clip_norm": clip_norm})

    def act(exchange: Exchange) -> None:
        run = take_part(case, exchange, memory)
        advance(run, 3)
        if exchange.rank == 2:

            def leave(*given: Any, **more: Any) -> None:
                time.sleep(0.5)  # the others go on, if they wait for nothing
                os._exit(1)

            run.state.optimizer.arrays.commit = leave  # type: ignore[method-assign]
        advance(run, 1)

    with pytest.raises(WorkerError, match="worker 2"):
        forked(3, act)
    expected = take_part(case, Solo(), -1)
    advance(expected, 4 if direct and not clip_norm else 3)
    assert held(memory) == gathered(expected)


def test_facts_of_a_commit_that_never_came_are_not_seen(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 0 is lost when it has written them."""
    case = CASES["mixed"]

    def flip(self: Snapshot, sequence: int) -> None:
        raise KeyboardInterrupt

    run = take_part(case, Solo(), memory)
    advance(run, 3)
    with monkeypatch.context() as lost, pytest.raises(KeyboardInterrupt):
        lost.setattr(Snapshot, "flip", flip)
        advance(run, 1)
    expected = take_part(case, Solo(), -1)
    advance(expected, 3)
    assert held(memory) == gathered(expected)


def test_a_lost_worker_s_update_is_done_again_to_the_same_bits(memory: int) -> None:
    case = CASES["convolution"]

    def act(exchange: Exchange, count: int, then: str = "") -> None:
        run = take_part(case, exchange, memory)
        advance(run, count)
        if then:  # an update of other values, left half-way
            for array in run.state.optimizer.arrays.begin().values():
                array.mul_(-3.0)

    play(3, functools.partial(act, count=2, then="half a step"))
    play(2, functools.partial(act, count=2))
    run = take_part(case, Solo(), -1)
    advance(run, 4)
    assert held(memory) == gathered(run)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_an_update_that_turns_out_not_to_be_finite_is_not_seen(
    clip_norm: float, direct: bool, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm is known when other chunks have been written already; the step can be done again."""
    monkeypatch.setattr("unisono.engine.optimizer.CHUNK", BLOCK)
    case = Case(zoo.convolution, zoo.images, {"ema_decay": 0.9, "clip_norm": clip_norm})

    def act(exchange: Exchange) -> tuple[dict[str, Any], dict[str, Any]]:
        run = take_part(case, exchange, memory)
        advance(run, 2)
        state, before = run.state, gathered(run)
        flat = torch.zeros_like(state.replica.flat)
        flat[state.replica.space.parameters[-1].start] = torch.inf
        totals = Totals(
            loss=1.0, terms=1, used=[True] * len(state.replica.parameters), integers=torch.empty(0), request=RUNNING
        )
        gradient = Sum([(Node(0, 0), state.replica.shard.of(flat).clone())])
        with pytest.raises(DivergedError):
            state.optimizer.update(gradient, totals, step=2, rate=0.1)
        assert gathered(run) == before == held(memory)
        exchange.wait_for_all()
        advance(run, 1)
        exchange.wait_for_all()
        return gathered(run), held(memory)

    found, kept = play(3, act)[0]
    run = take_part(case, Solo(), -1)
    advance(run, 3)
    assert found == kept == gathered(run)


def copies(memory: int, run: Run, count: int) -> list[int]:
    found = []
    for _ in range(count):
        advance(run, 1)
        found.append(int(Snapshot(memory).facts()["copy"]))
    return found


@pytest.mark.parametrize("workers", [1, 3])
def test_copies_catch_up_with_lazy_rows(workers: int, memory: int) -> None:
    """Only rows are copied that a copy lacks: also after it was pinned for long, and after an update that is lost."""
    case = CASES["lazy rows"]

    def act(exchange: Exchange) -> None:
        run = take_part(case, exchange, memory)
        other = take_part(case, Solo(), -1)
        for turn in range(12):
            if turn in (3, 8):
                run.client.save(run.state, {}, Path("nowhere"), 1)
            if turn == 5:  # an update that nobody commits
                for array in run.state.optimizer.arrays.begin().values():
                    array.fill_(7.0)
                run.state.optimizer._behind._rows.clear()
            advance(run, 1)
            advance(other, 1)
            assert gathered(run) == gathered(other), f"turn {turn}"
            exchange.wait_for_all()

    play(workers, act)


def test_commits_take_turns_and_never_touch_what_is_pinned(memory: int, direct: bool) -> None:
    run = take_part(CASES["mixed"], Solo(), memory)
    found = copies(memory, run, 4)
    assert all(one != other for one, other in itertools.pairwise(found))
    assert set(found) <= set(range(COPIES))
    run.client.save(run.state, {}, Path("nowhere"), 1)
    snapshot = Snapshot(memory)
    pinned = snapshot.content(snapshot.facts())  # looks at the memory, as who writes a checkpoint does
    before, copy = told(pinned), int(snapshot.facts()["copy"])
    judge(run)  # what belongs to the best weights is settled before it is changed; a checkpoint without them is not
    later = copies(memory, run, 5)
    assert copy not in later and len(set(later)) == COPIES - 1
    assert told(pinned) == before
    assert held(memory)["parameters"] != before["parameters"]
    run.client.save(run.state, {}, Path("nowhere"), 1)
    assert copy in copies(memory, run, 3)


def test_a_new_group_of_workers_keeps_what_was_pinned(memory: int) -> None:
    """A checkpoint that was being written when a worker was lost stays whole."""
    case = CASES["mixed"]
    run = take_part(case, Solo(), memory)
    advance(run, 2)
    run.client.save(run.state, {}, Path("nowhere"), 1)
    advance(run, 1)  # with this commit it is known to all that come after
    snapshot = Snapshot(memory)
    kept = snapshot.content({**snapshot.facts(), "copy": snapshot.facts()["pinned"]})
    before = told(kept)

    def act(exchange: Exchange) -> list[int]:
        run = take_part(case, exchange, memory)
        return copies(memory, run, 4)

    assert int(snapshot.facts()["pinned"]) not in play(2, act)[0]
    assert told(kept) == before


def test_facts_of_an_evaluation_are_committed_on_their_own(memory: int) -> None:
    run = take_part(CASES["mixed"], Solo(), memory)
    advance(run, 1)
    before = Snapshot(memory).facts()
    assert (before["evaluated"], before["has_best"]) == (False, False)
    assert run.state.judge(0.5, higher=True, keep=True)
    assert Snapshot(memory).facts() == before, "not yet"
    run.state.note_evaluation()
    after = Snapshot(memory).facts()
    assert (after["evaluated"], after["has_best"], after["best_score"]) == (True, True, 0.5)
    assert after["copy"] == before["copy"]


# Laid out, or not


def test_an_empty_file_is_not_laid_out(memory: int) -> None:
    assert not Snapshot.is_laid_out(memory)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_file_laid_out_half_way_is_laid_out_anew(writes: int, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 0 is lost after it has given the file its size, or has written the description as well."""
    case = CASES["mixed"]
    left, honest = iter([True] * writes), os.pwrite

    def pwrite(file: int, content: bytes, offset: int) -> int:
        if not next(left, False):
            raise KeyboardInterrupt
        return honest(file, content, offset)

    with monkeypatch.context() as half:
        half.setattr(os, "pwrite", pwrite)
        with pytest.raises(KeyboardInterrupt):
            play(2, lambda exchange: take_part(case, exchange, memory))
    assert os.fstat(memory).st_size > 0
    assert not Snapshot.is_laid_out(memory)
    play(2, lambda exchange: advance(take_part(case, exchange, memory), 2))
    run = take_part(case, Solo(), -1)
    advance(run, 2)
    assert held(memory) == gathered(run)


def test_laid_out_without_a_commit_is_a_beginning(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is lost in its first moments, when some arrays have been filled."""
    case = CASES["mixed"]

    def flip(self: Snapshot, sequence: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as lost:
        lost.setattr(Snapshot, "flip", flip)
        with pytest.raises(KeyboardInterrupt):
            play(2, lambda exchange: take_part(case, exchange, memory))
    assert Snapshot.is_laid_out(memory) and Snapshot(memory).sequence == 0

    def act(exchange: Exchange) -> dict[str, Any]:
        run = take_part(case, exchange, memory)
        assert not run.recovered and run.state.step == 0
        advance(run, 2)
        return gathered(run)

    found = play(3, act)[0]
    run = take_part(case, Solo(), -1)
    advance(run, 2)
    assert found == gathered(run) == held(memory)


def test_facts_alternate_between_two_places(memory: int) -> None:
    """So that those of a commit that never comes cannot harm those of the last one."""
    description = Description(
        arrays={}, names=[], segments=[], parameters=0, sources={}, dtypes={}, extra={}, size_bytes=FACTS_BYTES * 4
    )
    Snapshot.lay_out(memory, description)
    snapshot = Snapshot(memory)
    assert snapshot.description == description
    for sequence in range(1, 6):
        snapshot.write_facts(sequence, {"step": sequence, "long": "x" * (1000 - 100 * sequence)})
        snapshot.flip(sequence)
        snapshot.write_facts(sequence + 1, {"never": "committed"})
        assert Snapshot(memory).facts()["step"] == sequence
    with pytest.raises(AssertionError, match="facts are few"):
        snapshot.write_facts(7, {"long": "x" * FACTS_BYTES})
    assert snapshot.facts()["step"] == 5


def test_nobody_sees_the_memory_file(memory: int) -> None:
    assert str(Path(f"/proc/self/fd/{memory}").readlink()).startswith("/memfd:")
