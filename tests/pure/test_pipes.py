"""Pipes carry messages of any size between any number of workers, and tell at once who has gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unisono.errors import LostPeerError
from unisono.exchange.pipes import Pipes


class Meeting:
    """What all workers of a test, its threads, pass and hear."""

    def __init__(self, workers: int) -> None:
        self._barrier = threading.Barrier(workers)
        self._rows: list[list[int]] = [[]] * workers

    def gather(self, rank: int) -> Callable[[list[int]], list[list[int]]]:
        def gather(numbers: list[int]) -> list[list[int]]:
            self._rows[rank] = numbers
            self._barrier.wait(60)
            heard = list(self._rows)
            self._barrier.wait(60)
            return heard

        return gather


def act_together(workers: int, act: Callable[[Pipes, int], Any], timeout_seconds: float = 120) -> list[Any]:
    """What `act(pipes, rank)` returned, or raised, in each thread."""
    meeting, found = Meeting(workers), [None] * workers

    def work(rank: int) -> None:
        pipes = Pipes(meeting.gather(rank), rank=rank, workers=workers, timeout_seconds=timeout_seconds)
        try:
            found[rank] = act(pipes, rank)
        except LostPeerError as error:
            found[rank] = error
        finally:
            pipes.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_everybody_hears_everybody_in_order_of_rank(workers: int) -> None:
    sizes = (1, 8, 70_000, 3, 3_000_000, 1)  # larger than any pipe, too

    def act(pipes: Pipes, rank: int) -> list[list[bytes]]:
        heard = []
        for turn, size in enumerate(sizes):
            time.sleep(0.002 * ((turn + rank) % 2))  # now one is late, now another, who has to be woken up
            heard.append([bytes(row) for row in pipes.swap(bytes([10 * turn + rank]) * size)])
        return heard

    before = len(list(Path("/proc/self/fd").iterdir()))
    expected = [[bytes([10 * turn + rank]) * size for rank in range(workers)] for turn, size in enumerate(sizes)]
    assert act_together(workers, act) == [expected] * workers
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_who_has_gone_is_told_after_what_it_said() -> None:
    left = threading.Event()

    def act(pipes: Pipes, rank: int) -> list[bytearray]:
        if rank == 0:
            heard = pipes.swap(b"0")
            pipes.close()
            left.set()
            return heard
        if rank == 1:
            pipes._send(dict.fromkeys(pipes._outlets, memoryview(b"1")))  # it reads only when worker 0 has gone
            left.wait(60)
            heard = [bytearray() for _ in range(3)]
            heard[1] += b"1"
            while not all(heard):
                pipes._receive({file: 1 for file, worker in pipes._inlets.items() if not heard[worker]}, heard)
        else:
            heard = pipes.swap(b"2")
            left.wait(60)
        with pytest.raises(LostPeerError, match="another worker has gone"):
            pipes.swap(b"x" * 100_000)
        return heard

    assert act_together(3, act) == [[b"0", b"1", b"2"]] * 3


def test_who_does_not_come_is_named() -> None:
    over = threading.Event()

    def act(pipes: Pipes, rank: int) -> None:
        if rank == 1:
            over.wait(60)
            return
        try:
            pipes.swap(b"x")
        finally:
            over.set()

    found = act_together(2, act, timeout_seconds=0.2)
    assert found[1] is None
    assert str(found[0]) == "another worker has gone: no word from [1] in 0.2 s"


def test_a_worker_that_was_lost_before_the_pipes_were_laid_is_told() -> None:
    def gather(numbers: list[int]) -> list[list[int]]:
        return [numbers, [2**22 + 1, *numbers[1:]]]  # no process has such a number

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(LostPeerError, match="another worker has gone"):
        Pipes(gather, rank=0, workers=2, timeout_seconds=1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
