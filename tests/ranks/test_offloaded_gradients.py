"""Who computes a weight's gradient changes no bit: late workers, helped by those who wait, against a single one."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
from test_invariance import CASES, Case, bert, bert_folder, encoded, perform  # noqa: F401 - a fixture
from torch import nn
from worlds import Forked

from unisono.backends.torch_backend import TorchBackend
from unisono.engine.audit import Audit
from unisono.engine.contribution import Contribution
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


@pytest.fixture
def laid(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every linear layer counts as a large one, all workers have processors, and each in turn is late. Returns a list
    whose length tells how often this process has computed for another one."""
    monkeypatch.setattr(linear, "LARGE", 1)
    monkeypatch.setattr(linear, "multiplies_bf16", lambda: False)  # else torch's own layers are used
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    served: list[int] = []
    serve, honest, turns = OffloadQueue.serve, TorchBackend._go_back, itertools.count()

    def count(self: OffloadQueue, file: int) -> None:
        before = self.given_seconds
        serve(self, file)
        if self.given_seconds > before:
            served.append(1)

    def go_back(self: TorchBackend, loss: Any, offload: Any) -> None:
        if (next(turns) + os.getpid()) % 3 == 0:
            time.sleep(0.02)
        honest(self, loss, offload)

    monkeypatch.setattr(OffloadQueue, "serve", count)
    monkeypatch.setattr(TorchBackend, "_go_back", go_back)
    return served


@pytest.mark.parametrize("name", NAMES)
def test_no_bit_tells_who_computed(name: str, tmp_path: Path, forked: Forked, laid: list[int]) -> None:
    case = (CASES | FROZEN)[name]
    expected = play(1, lambda exchange: perform(case, exchange, tmp_path / "alone"))[0]
    for workers in (2, 3, 5, 8):

        def act(exchange: Exchange, folder: Path = tmp_path / str(workers)) -> list[Any]:
            found = perform(case, exchange, folder)
            return [found, len(laid)]

        told = forked(workers, act)
        assert told[0][0] == expected, f"{workers} workers"
        assert sum(count for _, count in told) > 3, f"{workers} workers: nobody computed for another one"


def test_an_audited_microbatch_is_its_workers_own(
    tmp_path: Path, forked: Forked, laid: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is judged answers for every bit; the other microbatches have help as always."""
    helped: list[bool] = []
    contribute = Audit.contribute

    def watch(self: Audit, step: int, number: int, microbatch: Any) -> Contribution:
        offload = self._exchange.offload
        assert offload is not None
        if number == self._choose(step):
            time.sleep(0.1)  # so the other one waits
        before = offload.taken_seconds
        found = contribute(self, step, number, microbatch)
        if number == self._choose(step):
            helped.append(offload.taken_seconds > before)
        return found

    monkeypatch.setattr(Audit, "contribute", watch)
    case = CASES["preset BERT, clipped"]
    audited = Case(case.task, case.data, {**case.train, "audit_every": 1})

    def act(exchange: Exchange) -> list[Any]:
        perform(audited, exchange, tmp_path / "audited")
        return [helped, len(laid)]

    told = forked(2, act)
    assert sum(len(one) for one, _ in told) >= 6  # one a step
    assert not any(any(one) for one, _ in told)
    assert sum(count for _, count in told) > 0
