"""The only door to other workers: what the engine knows of an exchange.

Owns the interface and its meaning. `solo`, `played` and `distributed` implement it; no other module talks to another
worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Exchange(Protocol):
    """A group of workers that call the same methods in the same order.

    Nothing here adds floating-point numbers: `add_integers` is exact in any order, and the engine adds the rest itself,
    in its tree. Every method raises LostPeerError where another worker has gone.
    """

    rank: int
    workers: int

    def new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Return zeros, in memory from which `to_owners` and `gather_shards` send best, on this worker's device."""
        ...

    def add_integers(self, values: Tensor) -> Tensor:
        """Return the sum over workers of an int64 tensor (wrapping); all pass one shape. May overwrite `values`."""
        ...

    def to_owners(
        self, nodes: Sequence[Tensor], counts: Sequence[int], *, shard_size: int, dtype: torch.dtype
    ) -> list[Tensor]:
        """Send each owner its part of my nodes; return all workers' nodes, cut to my shard, in order of worker, then
        node.

        `nodes`: flat tensors of workers × shard_size elements. `counts`: how many nodes each worker has. The result
        may alias `nodes` or other workers' memory, and is the caller's to overwrite. `nodes` come from `new_buffer`;
        they may be written again after the next exchange of any kind.
        """
        ...

    def gather_shards(self, shard: Tensor, flat: Tensor) -> None:
        """Fill `flat` (workers × shard elements) with every worker's shard, in order of rank.

        A shard from `new_buffer` may be written again after the next exchange of any kind.
        """
        ...

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return what every worker passed, in order of rank."""
        ...

    def wait_for_all(self) -> None:
        """Return when every worker has called this."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...
