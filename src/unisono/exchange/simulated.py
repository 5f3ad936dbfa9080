"""An exchange that simulates N workers in one process, one after another.

Each worker is a thread, and a baton lets one run at a time, from one exchange to the next; so a thousand workers can be
checked on a laptop, through the same loop that real workers run. For tests, not for speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from unisono.errors import LostPeerError

Result = TypeVar("Result")


class Simulation:
    """What the simulated workers share: the baton, and the value that each has put into the current exchange."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.baton = threading.Lock()
        self.turn = threading.Condition(self.baton)
        self.lost = False
        self._laid_down: dict[int, Any] = {}
        self._combined: list[Any] = []  # one result for each exchange so far

    def swap(self, rank: int, value: Any, combine: Callable[[list[Any]], Result]) -> Result:
        """Put in a value and wait for the others'; return the result of `combine`, called once on all of them.

        The result is shared and must not alias the values: a worker may reuse its value at once.
        """
        exchange = len(self._combined)
        self._laid_down[rank] = value
        if len(self._laid_down) == self.workers:
            self._combined.append(combine([self._laid_down[other] for other in range(self.workers)]))
            self._laid_down = {}
            if exchange:
                self._combined[exchange - 1] = None  # every worker has passed it
            self.turn.notify_all()
        else:
            self.turn.wait_for(lambda: len(self._combined) > exchange or self.lost)
        if self.lost:
            raise LostPeerError("another simulated worker has stopped")
        return self._combined[exchange]


class Simulated:
    """One of the workers of a `Simulation`."""

    offload = None
    generation = 0

    def __init__(self, stage: Simulation, rank: int) -> None:
        self.rank = rank
        self.workers = stage.workers
        self._stage = stage

    def new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(elements, dtype=dtype)

    def name(self, buffer: Tensor) -> int:
        return 0

    def add_integers(self, values: Tensor) -> Tensor:
        return self._stage.swap(self.rank, values, lambda all_values: torch.stack(all_values).sum(0)).clone()

    def to_owners(
        self, nodes: Sequence[Tensor], names: Sequence[Sequence[int]], *, shard_size: int, dtype: torch.dtype
    ) -> list[Tensor]:
        rows = self._stage.swap(
            self.rank, nodes, lambda all_nodes: torch.stack([node for nodes in all_nodes for node in nodes])
        )
        return list(rows.view(-1, self.workers, shard_size)[:, self.rank].unbind(0))

    def gather_shards(self, shard: Tensor, flat: Tensor, names: Sequence[int] | None = None) -> None:
        flat.copy_(self._stage.swap(self.rank, shard, torch.cat))

    def gather_bytes(self, content: bytes) -> list[bytes]:
        return self._stage.swap(self.rank, content, list)

    def send_to_first(self, content: bytes) -> list[bytes]:
        everyone = self._stage.swap(self.rank, content, list)
        return [] if self.rank else everyone

    def wait_for_all(self) -> None:
        self._stage.swap(self.rank, None, list)

    def close(self) -> None:
        return


def play(workers: int, act: Callable[[Simulated], Result]) -> list[Result]:
    """Run `act` once for each of `workers` simulated workers; return their results in order of rank.

    The first exception ends all of them and is raised.
    """
    stage = Simulation(workers)
    results: dict[int, Result] = {}
    failures: list[BaseException] = []

    def perform(rank: int) -> None:
        with stage.baton:
            try:
                if not stage.lost:
                    results[rank] = act(Simulated(stage, rank))
            except BaseException as error:  # noqa: BLE001 - raised to the caller below
                failures.append(error)
                stage.lost = True
                stage.turn.notify_all()

    threads = [threading.Thread(target=perform, args=(rank,), daemon=True) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, LostPeerError)), failures[0])
    return [results[rank] for rank in range(workers)]
