"""Every exchange keeps the protocol: alone, played, and between real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import Forked

from unisono.errors import LostPeerError, WorkerError
from unisono.exchange import shared_memory as shared
from unisono.exchange.distributed import Distributed
from unisono.exchange.protocol import Exchange
from unisono.exchange.shared_memory import Shared
from unisono.exchange.simulated import play
from unisono.exchange.solo import Solo

SHARD = 5  # elements
SHARDS = (5, 40_000, 40_000, 20_000, 5, 90_000, 40_000)  # one after another: small ones, large ones, larger than before
COUNTS = {1: [[1], [3]], 2: [[1, 1], [2, 0], [0, 3]], 3: [[1, 1, 1], [2, 0, 1], [0, 0, 4], [1, 3, 2]]}


@pytest.fixture(params=["memory", "sockets"])
def through(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Exchange]:
    """How real workers exchange: as they do on one host, or as they must between hosts."""
    if request.param == "memory":
        return Shared
    monkeypatch.setattr("unisono.exchange.shared_memory.can_share", lambda *_: False)
    return Distributed


def node(rank: int, number: int, workers: int, dtype: torch.dtype) -> torch.Tensor:
    """A node whose every element tells where it comes from."""
    return torch.arange(SHARD * workers, dtype=dtype) + 1000 * rank + 100 * number


def tell(exchange: Exchange, mine: list[torch.Tensor], counts: list[int]) -> list[list[int]]:
    """Everybody's names of their buffers."""
    told = torch.zeros(exchange.workers, max(counts), dtype=torch.int64)
    for number, buffer in enumerate(mine):
        told[exchange.rank, number] = exchange.name(buffer)
    names = exchange.add_integers(told).tolist()
    return [row[:count] for row, count in zip(names, counts, strict=True)]


def converse(exchange: Exchange) -> dict[str, Any]:
    """Call everything, several times over and with changing sizes; return all that was heard."""
    rank, workers = exchange.rank, exchange.workers
    heard: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64, torch.float32):
        for counts in COUNTS[workers]:
            mine = [exchange.new_buffer(SHARD * workers, dtype) for _ in range(counts[rank])]
            assert all(not buffer.any() for buffer in mine)
            for number, buffer in enumerate(mine):
                buffer.copy_(node(rank, number, workers, dtype))
            names = tell(exchange, mine, counts)
            received = exchange.to_owners(mine, names, shard_size=SHARD, dtype=dtype)
            assert all(part.dtype == dtype and part.shape == (SHARD,) for part in received)
            heard[f"nodes {dtype} {counts}"] = [part.tolist() for part in received]
            for part in received:
                part.fill_(-1)  # the caller's to overwrite
    bits = torch.tensor([-0.0, 1e-42, torch.nan]).to(torch.float64).view(torch.int64) if rank == workers - 1 else None
    sums = exchange.add_integers(torch.zeros(3, dtype=torch.int64) if bits is None else bits)
    heard["a float's bits among zeros"] = sums.tolist()
    heard["wrapping"] = exchange.add_integers(torch.tensor([2**63 - 1 if rank == 0 else 1])).tolist()
    heard["no integers"] = exchange.add_integers(torch.zeros(0, dtype=torch.int64)).tolist()
    for size in SHARDS:
        flat = torch.full((size * workers,), -1.0)
        exchange.gather_shards(torch.full((size,), float(rank + size)), flat)
        heard[f"shards {len(heard)}"] = [
            flat[start : start + size].unique().tolist() for start in range(0, len(flat), size)
        ]
    for size in (0, 3, 100_000, 7):
        sent = exchange.send_to_first(bytes([rank + 1]) * size * rank)  # nothing from worker 0
        heard[f"sent to the first {size}"] = [[len(content), *set(content)] for content in sent]
    for turn in range(3):
        shard, flat = exchange.new_buffer(SHARD, torch.float32), torch.full((SHARD * workers,), -1.0)
        shard.fill_(float(10 * turn + rank))
        names = [one for (one,) in tell(exchange, [shard], [1] * workers)]
        exchange.gather_shards(shard, flat, names)
        heard[f"named shards {turn}"] = flat.view(workers, SHARD).unique(dim=1).squeeze(1).tolist()
    for content in (b"", bytes([rank]) * rank, b"x" * (10_000 if rank == 0 else 1)):
        heard[f"bytes {len(heard)}"] = [found.decode("latin-1") for found in exchange.gather_bytes(content)]
    exchange.wait_for_all()
    return heard


def expected(rank: int, workers: int) -> dict[str, Any]:
    """What the protocol says."""
    heard: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64):
        for counts in COUNTS[workers]:
            nodes = [node(other, number, workers, dtype) for other in range(workers) for number in range(counts[other])]
            heard[f"nodes {dtype} {counts}"] = [value[rank * SHARD : (rank + 1) * SHARD].tolist() for value in nodes]
    bits = torch.tensor([-0.0, 1e-42, torch.nan]).to(torch.float64).view(torch.int64)
    heard["a float's bits among zeros"] = bits.tolist()
    heard["wrapping"] = [2**63 - 1 if workers == 1 else -(2**63) + workers - 2]
    heard["no integers"] = []
    for size in SHARDS:
        heard[f"shards {len(heard)}"] = [[float(other + size)] for other in range(workers)]
    for size in (0, 3, 100_000, 7):
        sent = [[size * other, *([other + 1] if size * other else [])] for other in range(workers)]
        heard[f"sent to the first {size}"] = [] if rank else sent
    for turn in range(3):
        heard[f"named shards {turn}"] = [float(10 * turn + other) for other in range(workers)]
    contents = [
        [b""] * workers,
        [bytes([other]) * other for other in range(workers)],
        [b"x" * (10_000 if other == 0 else 1) for other in range(workers)],
    ]
    for content in contents:
        heard[f"bytes {len(heard)}"] = [one.decode("latin-1") for one in content]
    return heard


def test_solo() -> None:
    assert converse(Solo()) == expected(0, 1)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_played(workers: int) -> None:
    assert play(workers, converse) == [expected(rank, workers) for rank in range(workers)]


@pytest.mark.parametrize("workers", [2, 3])
def test_real_workers(workers: int, through: type[Exchange], forked: Forked) -> None:
    def act(exchange: Exchange) -> dict[str, Any]:
        assert type(exchange) is through
        return converse(exchange)

    assert forked(workers, act) == [expected(rank, workers) for rank in range(workers)]


@pytest.mark.parametrize(
    "call", ["to_owners", "add_integers", "gather_shards", "gather_bytes", "send_to_first", "wait_for_all"]
)
def test_a_lost_peer_is_told_as_such(call: str, through: type[Exchange], forked: Forked) -> None:

    def to_owners(exchange: Exchange) -> None:
        node = exchange.new_buffer(9, torch.float32)
        exchange.to_owners([node], tell(exchange, [node], [1, 1, 1]), shard_size=3, dtype=torch.float32)

    calls = {
        "to_owners": to_owners,
        "add_integers": lambda e: e.add_integers(torch.ones(3, dtype=torch.int64)),
        "gather_shards": lambda e: e.gather_shards(torch.ones(3), torch.ones(9)),
        "gather_bytes": lambda e: e.gather_bytes(b"x"),
        "send_to_first": lambda e: e.send_to_first(b"x"),
        "wait_for_all": lambda e: e.wait_for_all(),
    }

    def act(exchange: Exchange) -> str:
        exchange.wait_for_all()
        if exchange.rank == 1:
            return "gone"
        try:
            for _ in range(100):
                calls[call](exchange)
        except LostPeerError as error:
            return str(error)
        return "no error"

    found = forked(3, act)
    assert found[1] == "gone" and all("another worker has gone" in found[rank] for rank in (0, 2)), found


@pytest.mark.parametrize("slow", [0, 1, 2])
def test_who_leaves_at_once_leaves_nobody_behind(slow: int, monkeypatch: pytest.MonkeyPatch, forked: Forked) -> None:
    """Worker 0's process has the store at which all meet: it may go only when nobody reads there any more."""

    class SlowToRead:
        def __init__(self, store: torch.distributed.Store) -> None:
            self.set, self._store = store.set, store

        def multi_get(self, keys: list[str]) -> list[bytes]:
            time.sleep(0.1)
            return self._store.multi_get(keys)

    def meet(store: Any, what: str, rank: int, *more: Any) -> list[list[int]]:
        return honest(SlowToRead(store) if rank == slow else store, what, rank, *more)

    honest = shared._meet
    monkeypatch.setattr(shared, "_meet", meet)
    found = forked(3, lambda exchange: [type(exchange).__name__, torch.distributed.is_initialized()])
    assert found == [["Shared", False]] * 3  # and there is no group of torch's, with threads that wake a worker up


def test_nobody_passes_a_meeting_before_all_have_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Forked
) -> None:
    """Also with GPUs, where collectives outside host memory are only queued when they return."""

    def act(exchange: Exchange) -> bool:
        queued: list[Any] = []
        honest, host = torch.distributed.all_reduce, getattr(exchange, "_host", "none")

        def all_reduce(values: torch.Tensor, group: Any = None) -> None:
            if group is host:
                honest(values, group=group)
            else:
                queued.append(honest(values, group=group, async_op=True))

        torch.distributed.all_reduce = all_reduce
        assert isinstance(exchange, Distributed)
        if exchange.rank == 1:
            time.sleep(0.3)  # without this pause the test would only miss the fault
            (tmp_path / "written").touch()
        exchange.wait_for_all()
        seen = (tmp_path / "written").exists()
        for one in queued:
            one.wait()
        return seen

    monkeypatch.setattr("unisono.exchange.shared_memory.can_share", lambda *_: False)
    assert forked(2, act) == [True, True]


def test_who_comes_to_a_meeting_has_done_what_its_gpu_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(f"done on {device}"))
    monkeypatch.setattr(Distributed, "add_integers", lambda self, values: done.append(f"come, on {values.device}"))
    exchange = Distributed.__new__(Distributed)
    exchange._device = torch.device("cuda", 1)
    exchange.wait_for_all()
    assert done == ["done on cuda:1", "come, on cpu"]


def test_a_killed_worker_is_the_cause_and_its_peers_are_not(forked: Forked) -> None:
    def act(exchange: Exchange) -> None:
        exchange.wait_for_all()
        if exchange.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            exchange.wait_for_all()

    with pytest.raises(WorkerError, match="worker 1 was killed by SIGKILL"):
        forked(3, act)


def test_a_worker_that_raises_is_the_cause(forked: Forked) -> None:
    def act(exchange: Exchange) -> None:
        if exchange.rank == 1:
            raise ZeroDivisionError("planted")
        exchange.wait_for_all()

    with pytest.raises(WorkerError, match=r"worker 1 failed:(.|\n)*ZeroDivisionError: planted"):
        forked(3, act)


def test_a_slow_reader_hears_each_gathering_as_it_was(through: type[Exchange], forked: Forked) -> None:
    """Others may already be at the next exchange when one worker still reads what they gave to this one."""

    def act(exchange: Exchange) -> list[list[float]]:
        if exchange.rank == 0 and isinstance(exchange, Shared):
            read = exchange._read

            def read_late(*place: Any) -> torch.Tensor:
                time.sleep(0.05)
                return read(*place)

            exchange._read = read_late  # type: ignore[method-assign]
        heard = []
        for turn in range(5):
            flat = torch.full((2 * 40_000,), -1.0)
            exchange.gather_shards(torch.full((40_000,), float(10 * turn + exchange.rank)), flat)
            heard.append(flat.unique().tolist())
        return heard

    assert forked(2, act) == [[[10.0 * turn, 10.0 * turn + 1] for turn in range(5)]] * 2


def test_a_group_that_could_not_be_made_is_forgotten(tmp_path: Path) -> None:
    """One worker has waited in vain for another that was lost on its way; then it meets a newcomer."""

    def act(rank: int) -> None:
        cpu = torch.device("cpu")
        if rank == 0:
            alone = torch.distributed.FileStore(str(tmp_path / "lost"), 2)
            with pytest.raises(RuntimeError):
                Distributed(alone, rank=0, workers=2, device=cpu, timeout_seconds=0.3)
        store = torch.distributed.FileStore(str(tmp_path / "met"), 2)
        exchange = Distributed(store, rank=rank, workers=2, device=cpu, timeout_seconds=120)
        assert exchange.add_integers(torch.tensor([rank + 1])).tolist() == [3]
        exchange.close()

    workers = [multiprocessing.get_context("fork").Process(target=act, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
