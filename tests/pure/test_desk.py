"""Products that a late worker lays down are computed once, by whoever is there, with the bits that it would have got."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unisono.errors import LostPeerError
from unisono.exchange import desk as desks
from unisono.exchange.desk import Desk
from unisono.exchange.shared import Shared

Act = Callable[[Shared, Desk[Any]], Any]


@pytest.fixture(autouse=True)
def _processors_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))


def act_together(*acts: Act) -> list[Any]:
    """What `act(exchange, desk)` of each worker, a thread, returned or raised."""
    store, found = dist.HashStore(), [None] * len(acts)

    def work(rank: int) -> None:
        exchange = Shared(store, rank=rank, workers=len(acts), timeout_seconds=20)
        try:
            assert exchange.desk is not None
            found[rank] = acts[rank](exchange, exchange.desk)
        except (LostPeerError, AssertionError) as error:
            found[rank] = error
        finally:
            exchange.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for one in found:
        if isinstance(one, AssertionError):
            raise one
    return found


def operands(number: int, rows: int = 96, width: int = 80, other: int = 112) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    return torch.randn(rows, width, generator=random), torch.randn(rows, other, generator=random)


def product(number: int) -> Tensor:
    left, right = operands(number)
    return left.t() @ right


def wait(exchange: Shared, desk: Desk[Any]) -> float:
    """Of a worker that has nothing to do: until the others come. Returns the seconds that it gave."""
    exchange.wait_for_all()
    return desk.given_seconds


def until_waiting(exchange: Shared, others: int = 1) -> None:
    while exchange._pipes.count_waiting() < others:
        time.sleep(1e-3)


def check(found: list[tuple[int, Tensor]], numbers: range) -> None:
    assert sorted(key for key, _ in found) == list(numbers)
    for key, value in found:
        assert torch.equal(value, product(key)), key


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_who_waits_computes(workers: int) -> None:
    def late(exchange: Shared, desk: Desk[Any]) -> tuple[list[bool], float]:
        until_waiting(exchange, workers - 1)
        taken = []
        for number in range(40):
            taken.append(desk.lay_down(number, *operands(number)))
            if not taken[-1]:
                time.sleep(2e-3)  # who waits wakes up, and has done it
                assert number > 0, "nobody took the first"
        found = desk.collect()
        assert sorted(key for key, _ in found) == [number for number, one in enumerate(taken) if one]
        for key, value in found:
            assert torch.equal(value, product(key)), key
        before = desk.taken_seconds
        exchange.wait_for_all()
        return taken, before

    (taken, seconds), *given = act_together(late, *[wait] * (workers - 1))
    assert sum(taken) >= 10
    assert seconds > 0
    assert sum(given) == pytest.approx(seconds)


def test_nobody_waits() -> None:
    def busy(exchange: Shared, desk: Desk[Any]) -> bool:
        taken = desk.lay_down(0, *operands(0))
        assert desk.collect() == []
        exchange.wait_for_all()
        return taken

    def late(exchange: Shared, desk: Desk[Any]) -> None:
        time.sleep(0.05)
        exchange.wait_for_all()

    assert act_together(busy, late) == [False, None]


def test_what_nobody_has_begun_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One who waits has begun the first job, and takes long; the second is its owner's again."""
    begun, computed = threading.Event(), []
    honest = Desk.serve

    def serve(self: Desk[Any], file: int) -> None:
        begun.set()
        time.sleep(0.1)
        honest(self, file)

    monkeypatch.setattr(Desk, "serve", serve)
    monkeypatch.setattr(Desk, "_compute", lambda self, slot: computed.append(slot) or compute(self, slot))

    def late(exchange: Shared, desk: Desk[Any]) -> None:
        until_waiting(exchange)
        assert desk.lay_down(0, *operands(0))
        assert begun.wait(10)
        assert desk.lay_down(1, *operands(1))
        assert not desk.lay_down(2, *operands(2)), "two lie there"
        check(desk.collect(), range(2))
        exchange.wait_for_all()

    act_together(late, wait)
    assert 1 <= len(computed) <= 2


compute = Desk._compute


@pytest.mark.parametrize("leaves", [True, False], ids=["is lost", "hangs"])
def test_who_has_begun_a_job_and_does_not_end_it(leaves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner computes it, and lays down nothing any more."""
    monkeypatch.setattr(desks, "PATIENCE_SECONDS", 0.05)
    begun, over = threading.Event(), threading.Event()

    def serve(self: Desk[Any], file: int) -> None:
        os.read(file, 1)
        begun.set()
        if leaves:
            raise LostPeerError("this worker goes")
        assert over.wait(10)

    monkeypatch.setattr(Desk, "serve", serve)

    def late(exchange: Shared, desk: Desk[Any]) -> tuple[bool, float]:
        until_waiting(exchange)
        assert desk.lay_down(0, *operands(0))
        assert begun.wait(10)
        check(desk.collect(), range(1))
        again = desk.lay_down(1, *operands(1))
        over.set()
        if not leaves:
            exchange.wait_for_all()
        return again, desk.taken_seconds

    (again, taken), _ = act_together(late, wait)
    assert not again
    assert taken == 0.0


def unfit() -> Iterator[Any]:
    left, right = operands(0)
    yield pytest.param(left.t().contiguous().t(), right, id="columns first")
    yield pytest.param(left.view(-1)[1 : 1 + 95 * 80].view(95, 80), right[:95], id="off the grid")
    yield pytest.param(torch.empty(desks.SLOT_BYTES // 8, 1), torch.empty(desks.SLOT_BYTES // 8, 1), id="too large")


@pytest.mark.parametrize(("left", "right"), unfit())
def test_what_could_get_other_bits_or_does_not_fit_is_not_taken(left: Tensor, right: Tensor) -> None:
    def late(exchange: Shared, desk: Desk[Any]) -> list[bool]:
        until_waiting(exchange)
        taken = [desk.lay_down(0, left, right), desk.lay_down(1, *operands(1))]
        check(desk.collect(), range(1, 2))
        exchange.wait_for_all()
        return taken

    assert act_together(late, wait)[0] == [False, True]


def test_shut() -> None:
    def late(exchange: Shared, desk: Desk[Any]) -> list[bool]:
        until_waiting(exchange)
        with desk.shut():
            taken = [desk.lay_down(0, *operands(0))]
        taken.append(desk.lay_down(1, *operands(1)))
        check(desk.collect(), range(1, 2))
        exchange.wait_for_all()
        return taken

    assert act_together(late, wait)[0] == [False, True]


def test_workers_without_processors_to_themselves_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(1))
    store, found = dist.HashStore(), []

    def work(rank: int) -> None:
        exchange = Shared(store, rank=rank, workers=2, timeout_seconds=20)
        exchange.wait_for_all()
        found.append(exchange.desk)
        exchange.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [None, None]
