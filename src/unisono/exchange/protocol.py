"""The only door to other workers: the interface of an exchange, as the engine uses it.

Owns the interface and its meaning. `solo`, `simulated`, `distributed` and `shared_memory` implement it; no other module
communicates with another worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Offload(Protocol):
    """A queue of matrix products that other workers compute while they wait for this one. No bit depends on which
    worker computes a product.

    given_seconds: how long this worker has computed for others, in all. taken_seconds: how much longer this one would
    have computed without them.
    """

    given_seconds: float
    taken_seconds: float

    def publish(self, key: Any, left: Tensor, right: Tensor) -> bool:
        """Enqueue the product left [m, i] transposed times right [m, o], float32, if another worker waits for this one;
        return whether this was done. `collect` then has the product."""
        ...

    def collect(self) -> list[tuple[Any, Tensor]]:
        """Wait for the products [i, o] of all enqueued pairs; return them, with their keys."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Within, nothing is enqueued: this worker computes all its products itself."""
        ...


class Exchange(Protocol):
    """A group of workers that call the same methods in the same order.

    Nothing here adds floating-point numbers: `add_integers` is exact in any order, and the engine adds the rest itself,
    in its tree. Every method raises LostPeerError where another worker has ended.

    offload: None where workers share no memory, or have no processors to themselves.
    generation: which of a run's groups of workers this is.
    """

    rank: int
    workers: int
    generation: int

    @property
    def offload(self) -> Offload | None: ...

    def new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Return zeros, in memory from which `to_owners` and `gather_shards` send best, on this worker's device."""
        ...

    def name(self, buffer: Tensor) -> int:
        """Return a number by which other workers find a buffer from `new_buffer`."""
        ...

    def add_integers(self, values: Tensor) -> Tensor:
        """Return the sum over workers of an int64 tensor in host memory (wrapping), when all have come; all pass one
        shape. May overwrite `values`."""
        ...

    def to_owners(
        self, nodes: Sequence[Tensor], names: Sequence[Sequence[int]], *, shard_size: int, dtype: torch.dtype
    ) -> list[Tensor]:
        """Send each owner its part of my nodes; return all workers' nodes, cut to my shard, in order of worker, then
        node.

        `nodes`: flat tensors of workers × shard_size elements, from `new_buffer`. `names`: of every worker's nodes, by
        rank, as an exchange sent them after the nodes were written. The result may alias `nodes` or other workers'
        memory, and the caller may overwrite it. Nodes may be written again after the next exchange of any kind.
        """
        ...

    def gather_shards(self, shard: Tensor, flat: Tensor, names: Sequence[int] | None = None) -> None:
        """Fill `flat` (workers × shard elements) with every worker's shard, in order of rank.

        A shard from `new_buffer` may be written again after the next exchange of any kind. `names`: of the buffers in
        which the shards lie, by rank, if an exchange sent them after these were written: that saves one exchange.
        """
        ...

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return what every worker passed, in order of rank."""
        ...

    def send_to_first(self, content: bytes) -> list[bytes]:
        """Return on worker 0 what every worker passed, in order of rank; on others nothing, and nothing is sent to
        them."""
        ...

    def wait_for_all(self) -> None:
        """Return when every worker has called this, and all work queued on its device before is done."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...
