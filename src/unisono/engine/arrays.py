"""Where a run's trained arrays live: weights, optimiser state, averages; flat, one element per element of the space.

Each worker holds its shard of every array. This module has the interface, and the simplest implementation: one copy, in
this worker's own memory, updated in place. `snapshot.py` has the other: several copies in memory that outlives workers.

Owns memory. Does not compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unisono.engine.replica import Replica
from unisono.exchange.protocol import Exchange

WEIGHTS, AVERAGE, BEST = "weights", "average", "best"
"""Names of the arrays that are no optimiser state."""


class Arrays(Protocol):
    """The trained arrays of a run, of which this worker holds its shard. All workers call the same methods in the same
    order, except `mine`, `best` and `best_integers`."""

    @property
    def committed(self) -> bool:
        """Whether they hold a state to go on from; if not, zeros."""
        ...

    @property
    def in_place(self) -> bool:
        """Whether `begin` returns the same arrays as `mine`."""
        ...

    def mine(self) -> dict[str, Tensor]:
        """Name → [shard size], my part of the present values."""
        ...

    def best(self) -> Tensor:
        """[shard size], my part of the best evaluation's weights, to be written and read."""
        ...

    def best_integers(self) -> Tensor:
        """int64, the integer buffers that belong to `best`."""
        ...

    def begin(self) -> dict[str, Tensor]:
        """Arrays of the form of `mine` for an update to write whole: the same arrays, or others with old content.

        Until `commit`, `mine` still returns the valid values.
        """
        ...

    def commit(self, facts: Mapping[str, Any], counts: Tensor, integers: Tensor, *, met: bool = False) -> None:
        """Make the values written since `begin` the present ones: of all workers, or of none.

        facts: plain values that belong to them. counts, integers: int64, updates per parameter, and integer buffers.
        met: every worker has called the exchange since it wrote the last of them, and need not wait for others.
        """
        ...

    def note(self, facts: Mapping[str, Any]) -> None:
        """Replace the facts of the present values; of all workers, or of none."""
        ...

    def pin(self) -> None:
        """Keep the present values readable for the writer of a checkpoint, until the next `pin`."""
        ...

    def whole(self, name: str) -> Tensor:
        """[workers × shard elements] a whole array, gathered if need be; to be read only, until the commit after next.

        All workers call this.
        """
        ...


class PrivateArrays:
    """One copy in this worker's memory, updated in place: if a worker is lost, its part is in the last checkpoint."""

    committed = False
    in_place = True

    def __init__(self, names: Sequence[str], replica: Replica, exchange: Exchange) -> None:
        self._exchange = exchange
        self._flat = replica.flat
        mine = replica.shard.of(replica.flat)
        weights = mine
        if exchange.workers > 1:
            weights = exchange.new_buffer(len(mine), mine.dtype).copy_(mine)
        self._arrays = {name: weights if name == WEIGHTS else torch.zeros_like(mine) for name in names}
        self._best: Tensor | None = None
        self._best_integers = torch.zeros_like(replica.integer_values())

    def mine(self) -> dict[str, Tensor]:
        return self._arrays

    def best(self) -> Tensor:
        if self._best is None:
            self._best = torch.zeros_like(self._arrays[WEIGHTS])
        return self._best

    def best_integers(self) -> Tensor:
        return self._best_integers

    def begin(self) -> dict[str, Tensor]:
        return self._arrays

    def commit(self, facts: Mapping[str, Any], counts: Tensor, integers: Tensor, *, met: bool = False) -> None:
        return

    def note(self, facts: Mapping[str, Any]) -> None:
        return

    def pin(self) -> None:
        return

    def whole(self, name: str) -> Tensor:
        flat = self._flat if name == WEIGHTS else torch.empty_like(self._flat)
        self._exchange.gather_shards(self.best() if name == BEST else self._arrays[name], flat)
        return flat
