"""An exchange whose every call is visible from outside: which worker has entered a call, and which has not returned.

Owns the marks in the progress table. The exchange itself is another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unisono.exchange.protocol import Exchange
from unisono.processes.progress_table import Progress


class Watched:
    """Another `Exchange`, with a mark in the progress table before and after each call."""

    def __init__(self, exchange: Exchange, progress: Progress) -> None:
        self.rank = exchange.rank
        self.workers = exchange.workers
        self.offload = exchange.offload
        self.generation = exchange.generation
        self._exchange = exchange
        self._progress = progress

    def new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        return self._exchange.new_buffer(elements, dtype)

    def name(self, buffer: Tensor) -> int:
        return self._exchange.name(buffer)

    def add_integers(self, values: Tensor) -> Tensor:
        self._progress.enter("add_integers")
        found = self._exchange.add_integers(values)
        self._progress.leave()
        return found

    def to_owners(
        self, nodes: Sequence[Tensor], names: Sequence[Sequence[int]], *, shard_size: int, dtype: torch.dtype
    ) -> list[Tensor]:
        self._progress.enter("to_owners")
        found = self._exchange.to_owners(nodes, names, shard_size=shard_size, dtype=dtype)
        self._progress.leave()
        return found

    def gather_shards(self, shard: Tensor, flat: Tensor, names: Sequence[int] | None = None) -> None:
        self._progress.enter("gather_shards")
        self._exchange.gather_shards(shard, flat, names)
        self._progress.leave()

    def gather_bytes(self, content: bytes) -> list[bytes]:
        self._progress.enter("gather_bytes")
        found = self._exchange.gather_bytes(content)
        self._progress.leave()
        return found

    def send_to_first(self, content: bytes) -> list[bytes]:
        self._progress.enter("send_to_first")
        found = self._exchange.send_to_first(content)
        self._progress.leave()
        return found

    def wait_for_all(self) -> None:
        self._progress.enter("wait_for_all")
        self._exchange.wait_for_all()
        self._progress.leave()

    def close(self) -> None:
        self._exchange.close()
