"""Products that a late worker lays down are computed once, by whoever is there, with the bits that it would have got."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from unisono.errors import LostPeerError
from unisono.exchange import offload as desks
from unisono.exchange.meeting import StoreMeeting
from unisono.exchange.offload import OffloadQueue
from unisono.exchange.shared_memory import Shared

Act = Callable[[Shared, OffloadQueue], Any]


@pytest.fixture(autouse=True)
def _processors_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))


def in_threads(workers: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def act_together(*acts: Act) -> list[Any]:
    """What `act(exchange, offload)` of each worker, a thread, returned or raised."""
    store, found = dist.HashStore(), [None] * len(acts)

    def work(rank: int) -> None:
        exchange = Shared(StoreMeeting(store, rank, len(acts)), rank=rank, workers=len(acts), timeout_seconds=120)
        try:
            assert exchange.offload is not None
            found[rank] = acts[rank](exchange, exchange.offload)
        except BaseException as error:  # noqa: BLE001 - looked at below
            found[rank] = error
        finally:
            exchange.close()

    in_threads(len(acts), work)
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, LostPeerError):
            raise one
    return found


def operands(number: int, rows: int = 96, width: int = 80, other: int = 112) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    return torch.randn(rows, width, generator=random), torch.randn(rows, other, generator=random)


def product(number: int) -> Tensor:
    left, right = operands(number)
    return left.t() @ right


def wait(exchange: Shared, offload: OffloadQueue) -> float:
    """Of a worker that has nothing to do: until the others come. Returns the seconds that it gave."""
    exchange.wait_for_all()
    return offload.given_seconds


def until_waiting(exchange: Shared, others: int = 1) -> None:
    while exchange._pipes.count_waiting() < others:
        time.sleep(1e-3)


def check(found: list[tuple[int, Tensor]], numbers: range) -> None:
    assert sorted(key for key, _ in found) == list(numbers)
    for key, value in found:
        assert torch.equal(value, product(key)), key


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_who_waits_computes(workers: int) -> None:
    """More than there are slots, so each is used again."""
    products = 3 * desks.MOST_SLOTS

    def late(exchange: Shared, offload: OffloadQueue) -> float:
        until_waiting(exchange, workers - 1)
        for number in range(products):
            while not offload.publish(number, *operands(number)):
                time.sleep(1e-3)
        check(offload.collect(), range(products))
        exchange.wait_for_all()
        return offload.taken_seconds

    taken, *given = act_together(late, *[wait] * (workers - 1))
    assert sum(given) > 0
    assert taken <= sum(given) + 1e-9  # less by what the late one has waited for answers


def test_nobody_waits() -> None:
    asked = threading.Event()

    def busy(exchange: Shared, offload: OffloadQueue) -> bool:
        taken = offload.publish(0, *operands(0))
        asked.set()
        assert offload.collect() == []
        exchange.wait_for_all()
        return taken

    def late(exchange: Shared, offload: OffloadQueue) -> None:
        assert asked.wait(60)
        exchange.wait_for_all()

    assert act_together(busy, late) == [False, None]


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event, list[int]]:
    """Who waits takes its time: it sets the first event when it has begun a job, and goes on after the second. The
    owner's own products are noted in the list, by their slots."""
    begun, go_on = threading.Event(), threading.Event()
    multiply, compute, own = torch.mm, OffloadQueue._compute, []

    def mm(*both: Tensor, out: Tensor) -> Tensor:
        begun.set()
        assert go_on.wait(60)
        return multiply(*both, out=out)

    def note(self: OffloadQueue, slot: int) -> None:
        own.append(slot)
        compute(self, slot)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(OffloadQueue, "_compute", note)
    return begun, go_on, own


Slowly = tuple[threading.Event, threading.Event, list[int]]


def test_what_nobody_has_begun_is_taken_back(slowly: Slowly, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "PATIENCE_SECONDS", 1000)
    begun, go_on, own = slowly

    def go_on_when_computed() -> None:
        while not own:
            time.sleep(1e-3)
        go_on.set()

    def late(exchange: Shared, offload: OffloadQueue) -> None:
        until_waiting(exchange)
        assert offload.publish(0, *operands(0))
        assert begun.wait(60)
        assert offload.publish(1, *operands(1))
        assert not offload.publish(2, *operands(2)), "two lie there"
        threading.Thread(target=go_on_when_computed).start()
        check(offload.collect(), range(2))
        assert len(own) == 1, "the first was computed by who had begun it, the second by its owner"
        assert sorted(offload._free) == [0, 1]
        exchange.wait_for_all()

    act_together(late, wait)


def test_who_takes_too_long_is_not_waited_for(slowly: Slowly, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner computes the product; its slot is free again when the answer has come, which is no longer needed."""
    monkeypatch.setattr(desks, "PATIENCE_SECONDS", 0.02)
    begun, go_on, own = slowly

    def late(exchange: Shared, offload: OffloadQueue) -> None:
        until_waiting(exchange)
        assert offload.publish(0, *operands(0))
        assert begun.wait(60)
        check(offload.collect(), range(1))
        assert len(own) == 1
        assert len(offload._free) == 1, "somebody may still write there"
        monkeypatch.setattr(desks, "PATIENCE_SECONDS", 1000)
        go_on.set()
        while len(offload._free) < 2:
            offload._handle_messages()
        begun.clear()
        assert offload.publish(0, *operands(0))
        assert begun.wait(60)
        check(offload.collect(), range(1))
        assert len(own) == 1
        exchange.wait_for_all()

    act_together(late, wait)


def test_who_is_lost_with_a_job_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does its owner wait: an end is seen at once."""
    monkeypatch.setattr(desks, "PATIENCE_SECONDS", 1000)
    begun = threading.Event()

    def serve(self: OffloadQueue, file: int) -> None:
        os.read(file, 1)
        begun.set()
        raise LostPeerError("this worker goes")

    monkeypatch.setattr(OffloadQueue, "serve", serve)

    def late(exchange: Shared, offload: OffloadQueue) -> None:
        until_waiting(exchange)
        assert offload.publish(0, *operands(0))
        assert begun.wait(60)
        check(offload.collect(), range(1))
        exchange.wait_for_all()

    told = act_together(late, wait)
    assert all(isinstance(one, LostPeerError) for one in told)


def unfit() -> Iterator[Any]:
    left, right = operands(0)
    yield pytest.param(left.t().contiguous().t(), right, id="columns first")
    yield pytest.param(left.view(-1)[1 : 1 + 95 * 80].view(95, 80), right[:95], id="off the grid")
    yield pytest.param(torch.empty(desks.SLOT_BYTES // 8, 1), torch.empty(desks.SLOT_BYTES // 8, 1), id="too large")


@pytest.mark.parametrize(("left", "right"), unfit())
def test_what_could_get_other_bits_or_does_not_fit_is_not_taken(left: Tensor, right: Tensor) -> None:
    def late(exchange: Shared, offload: OffloadQueue) -> list[bool]:
        until_waiting(exchange)
        taken = [offload.publish(0, left, right), offload.publish(1, *operands(1))]
        check(offload.collect(), range(1, 2))
        exchange.wait_for_all()
        return taken

    assert act_together(late, wait)[0] == [False, True]


def test_shut() -> None:
    def late(exchange: Shared, offload: OffloadQueue) -> list[bool]:
        until_waiting(exchange)
        with offload.paused():
            taken = [offload.publish(0, *operands(0))]
        taken.append(offload.publish(1, *operands(1)))
        check(offload.collect(), range(1, 2))
        exchange.wait_for_all()
        return taken

    assert act_together(late, wait)[0] == [False, True]


def join_with(affinities: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The desks of workers with so many processors each, and what they hear of each other afterwards."""
    store, found = dist.HashStore(), [None] * len(affinities)
    mine = threading.local()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(mine.processors))

    def work(rank: int) -> None:
        mine.processors = affinities[rank]
        exchange = Shared(
            StoreMeeting(store, rank, len(affinities)), rank=rank, workers=len(affinities), timeout_seconds=120
        )
        found[rank] = (exchange.offload, exchange.gather_bytes(bytes([rank]) * (rank + 1)))
        exchange.close()

    in_threads(len(affinities), work)
    return found


@pytest.mark.parametrize("affinities", [[1, 1], [2, 1]], ids=["too few", "too few for one"])
def test_all_have_a_desk_or_none(affinities: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert join_with(affinities, monkeypatch) == [(None, [b"\0", b"\1\1"])] * 2


def test_who_cannot_open_a_desk_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other one hears of it at once."""
    gc.collect()
    before = sorted(Path("/proc/self/fd").iterdir())
    honest, failed = desks.open_end, []

    def open_end(pid: int, file: int, flags: int) -> int:
        if not failed:
            failed.append(file)
            raise LostPeerError("gone")
        return honest(pid, file, flags)

    monkeypatch.setattr(desks, "open_end", open_end)
    store, heard = dist.HashStore(), []

    def work(rank: int) -> None:
        try:
            Shared(StoreMeeting(store, rank, 2), rank=rank, workers=2, timeout_seconds=120)
        except LostPeerError as error:
            heard.append(str(error))

    in_threads(2, work)
    assert len(heard) == 2
    gc.collect()  # a mapping keeps its file
    assert sorted(Path("/proc/self/fd").iterdir()) == before
