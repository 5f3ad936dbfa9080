"""The exchange of a single worker: there is no communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Solo:
    """An `Exchange` with no other worker."""

    rank = 0
    workers = 1
    offload = None
    generation = 0

    def __init__(self, device: torch.device = torch.device("cpu")) -> None:  # noqa: B008 - immutable
        self._device = device

    def new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(elements, dtype=dtype, device=self._device)

    def name(self, buffer: Tensor) -> int:
        return 0

    def add_integers(self, values: Tensor) -> Tensor:
        return values

    def to_owners(
        self, nodes: Sequence[Tensor], names: Sequence[Sequence[int]], *, shard_size: int, dtype: torch.dtype
    ) -> list[Tensor]:
        return list(nodes)

    def gather_shards(self, shard: Tensor, flat: Tensor, names: Sequence[int] | None = None) -> None:
        if flat.data_ptr() != shard.data_ptr():
            flat.copy_(shard)

    def gather_bytes(self, content: bytes) -> list[bytes]:
        return [content]

    def send_to_first(self, content: bytes) -> list[bytes]:
        return [content]

    def wait_for_all(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        return
