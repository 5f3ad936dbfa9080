"""The exchange of real processes, over torch.distributed: gloo, or nccl where the worker has a GPU.

Owns the process group and the shapes of its messages. Uses tensor collectives only, never one that pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unisono.errors import LostPeerError
from unisono.exchange.padding import gather_padded

Result = TypeVar("Result")

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
LARGE_BYTES = 2**20  # above, gloo's broadcasts together are faster than its all-gather


class Distributed:
    """A worker among processes. `store` is where they meet; None: among those of the process group that this process
    is in already, which is left as it is. `device` decides the backend."""

    offload = None

    def __init__(
        self, store: dist.Store | None, *, rank: int, workers: int, device: torch.device, timeout_seconds: float
    ) -> None:
        self.rank = rank
        self.workers = workers
        self._device = device
        self._group: dist.ProcessGroup | None = None  # the default one
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            if store is None:  # a group of its own, so that its messages and others' never mix
                self._group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_seconds))
            else:
                dist.init_process_group(
                    backend,
                    store=store,
                    rank=rank,
                    world_size=workers,
                    timeout=timedelta(seconds=timeout_seconds),
                    device_id=device if device.type == "cuda" else None,
                )
        except RuntimeError:
            if store is not None:
                _forget_half_made()
            raise
        self._outbox = torch.empty(0, device=device)
        self._inbox = torch.empty(0, device=device)

    def new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(elements, dtype=dtype, device=self._device)

    def name(self, buffer: Tensor) -> int:
        return 0  # sockets need none

    def add_integers(self, values: Tensor) -> Tensor:
        _call(lambda: dist.all_reduce(values, group=self._group))
        return values

    def to_owners(
        self, nodes: Sequence[Tensor], names: Sequence[Sequence[int]], *, shard_size: int, dtype: torch.dtype
    ) -> list[Tensor]:
        if len(nodes) == 1:  # already in order of owner
            outbox = nodes[0]
        else:
            self._outbox = _sized(self._outbox, len(nodes) * shard_size * self.workers, dtype)
            outbox = self._outbox
            if nodes:
                by_owner = outbox.view(self.workers, len(nodes), shard_size)
                for number, node in enumerate(nodes):
                    by_owner[:, number].copy_(node.view(self.workers, shard_size))
        received = [len(others) * shard_size for others in names]
        self._inbox = _sized(self._inbox, sum(received), dtype)
        sent = [len(nodes) * shard_size] * self.workers
        inbox = self._inbox
        _call(lambda: dist.all_to_all_single(inbox, outbox, received, sent, group=self._group))
        return list(inbox.view(-1, shard_size).unbind(0))

    def gather_shards(self, shard: Tensor, flat: Tensor, names: Sequence[int] | None = None) -> None:
        if self._device.type == "cuda" or shard.nbytes < LARGE_BYTES:
            _call(lambda: _all_gather(flat, shard, group=self._group))
            return
        parts = flat.view(self.workers, -1).unbind(0)
        parts[self.rank].copy_(shard)
        _call(lambda: _broadcast_each(parts, self._group))

    def gather_bytes(self, content: bytes) -> list[bytes]:
        return gather_padded(self, content, self._device)

    def wait_for_all(self) -> None:
        self.add_integers(torch.zeros(1, dtype=torch.int64, device=self._device))

    def close(self) -> None:
        dist.destroy_process_group(self._group)


def _forget_half_made() -> None:
    """Make torch forget a group that could not be made: it counts them, and takes the count for the next one's name, by
    which workers that were not in this one would wait for each other in vain. Ending a group sets the count back."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


def _broadcast_each(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill each part from the worker of that number. Gloo's own all-gather of 44 MB takes three times as long."""
    begun = [dist.broadcast(part, src=owner, group=group, async_op=True) for owner, part in enumerate(parts)]
    for broadcast in begun:
        broadcast.wait()


def _sized(buffer: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """The buffer cut to a size, or a larger one."""
    if buffer.dtype != dtype or buffer.untyped_storage().nbytes() < elements * dtype.itemsize:
        return torch.empty(elements, dtype=dtype, device=buffer.device)
    return torch.empty(0, dtype=dtype, device=buffer.device).set_(buffer.untyped_storage(), 0, (elements,), (1,))


def _call(collective: Callable[[], Result]) -> Result:
    try:
        return collective()
    except dist.DistBackendError as error:
        raise LostPeerError(f"another worker has gone: {error}") from error
    except RuntimeError as error:
        if any(sign in str(error) for sign in ("Connection", "Timed out", "timed out", "peer", "Socket")):
            raise LostPeerError(f"another worker has gone: {error}") from error
        raise
