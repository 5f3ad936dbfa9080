"""Who computes a weight's gradient changes no bit: late workers, helped by those who wait, against a single one."""

from __future__ import annotations

import fcntl
import os
import termios
import time
from array import array
from pathlib import Path
from typing import Any

import pytest
from test_invariance import CASES, Case, bert, bert_folder, encoded, perform  # noqa: F401 - a fixture
from torch import nn
from worlds import Forked

from unisono.engine.audit import Audit
from unisono.engine.contribution import Contribution, Contributor
from unisono.exchange import offload as offloading
from unisono.exchange.offload import OffloadQueue
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.kernels import linear
from unisono.tasks.task import Task


def frozen_in_part() -> Task:
    """A pretrained encoder of whose first layer's queries, keys and values, one product, the keys stay as they are."""
    task = bert()
    build = task.build

    def freeze() -> nn.Module:
        module = build()
        module.get_parameter("bert.encoder.layer.0.attention.self.key.weight").requires_grad_(False)
        return module

    task.build = freeze  # type: ignore[method-assign]
    return task


FROZEN = {"frozen in part": Case(frozen_in_part, encoded, {"learning_rate": 1e-3})}
NAMES = ("frozen in part", "preset transformer", "preset BERT, clipped", "preset BERT, bf16", "preset bag")


Helped = list[int]
"""Grows when this process computes for another one."""


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch) -> Helped:
    """Every linear layer counts as a large one, and all workers have processors. In each step one worker is late: it
    begins when another waits for it, and goes on when that one has taken a job. So there is help, however the machine
    shares out its time."""
    monkeypatch.setattr(linear, "LARGE", 1)
    monkeypatch.setattr(linear, "multiplies_bf16", lambda: False)  # else torch's own layers are used
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(offloading, "PATIENCE_SECONDS", 1000)
    given: Helped = []
    serve, contribute, collect = OffloadQueue.serve, Contributor.contribute, OffloadQueue.collect
    init, place = OffloadQueue.__init__, [0, 1]  # this process's rank, and the workers

    def remember(self: OffloadQueue, *arguments: Any, rank: int, workers: int) -> None:
        place[:] = rank, workers
        init(self, *arguments, rank=rank, workers=workers)

    def count(self: OffloadQueue, file: int) -> None:
        before = self.given_seconds
        serve(self, file)
        if self.given_seconds > before:
            given.append(1)

    def begin(self: Contributor, step: int, number: int, microbatch: Any) -> Contribution:
        if self.offload is not None and place[0] == step % place[1]:
            while not self.offload._waiting():
                time.sleep(1e-3)
        return contribute(self, step, number, microbatch)

    def take_back(self: OffloadQueue) -> list[tuple[Any, Any]]:
        while self._laid and count_bytes(self._jobs) == len(self._laid):
            time.sleep(1e-3)
        return collect(self)

    monkeypatch.setattr(OffloadQueue, "__init__", remember)
    monkeypatch.setattr(OffloadQueue, "serve", count)
    monkeypatch.setattr(OffloadQueue, "collect", take_back)
    monkeypatch.setattr(Contributor, "contribute", begin)
    return given


def count_bytes(pipe: int) -> int:
    """What can be read from it now."""
    found = array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, found)
    return found[0]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *[(name, (2, 3)) for name in ("frozen in part", "preset BERT, clipped", "preset bag")],
        *[pytest.param(name, (2, 3, 5, 8), marks=pytest.mark.slow) for name in NAMES],
    ],
)
def test_no_bit_tells_who_computed(
    name: str, counts: tuple[int, ...], tmp_path: Path, forked: Forked, helped: Helped
) -> None:
    case = (CASES | FROZEN)[name]
    expected = play(1, lambda exchange: perform(case, exchange, tmp_path / "alone"))[0]
    for workers in counts:

        def act(exchange: Exchange, folder: Path = tmp_path / str(workers)) -> list[Any]:
            found = perform(case, exchange, folder)
            return [found, len(helped)]

        told = forked(workers, act)
        assert told[0][0] == expected, f"{workers} workers"
        assert sum(count for _, count in told) >= 2, f"{workers} workers: nobody computed for another one"


def test_an_audited_microbatch_is_its_workers_own(
    tmp_path: Path, forked: Forked, helped: Helped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is judged answers for every bit; the other microbatches have help as always."""
    taken: list[bool] = []
    contribute = Audit.contribute

    def watch(self: Audit, step: int, number: int, microbatch: Any) -> Contribution:
        offload = self._exchange.offload
        assert offload is not None
        before = offload.taken_seconds
        found = contribute(self, step, number, microbatch)
        if number == self._choose(step):
            taken.append(offload.taken_seconds > before)
        return found

    monkeypatch.setattr(Audit, "contribute", watch)
    case = CASES["preset BERT, clipped"]
    audited = Case(case.task, case.data, {**case.train, "audit_every": 1})

    def act(exchange: Exchange) -> list[Any]:
        perform(audited, exchange, tmp_path / "audited")
        return [taken, len(helped)]

    told = forked(2, act)
    assert sum(len(one) for one, _ in told) >= 6  # one a step
    assert not any(any(one) for one, _ in told)
    assert sum(count for _, count in told) > 0
