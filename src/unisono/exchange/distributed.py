"""The exchange of real processes, over torch.distributed: gloo, and nccl for tensors on GPUs.

Owns the process groups and the shapes of their messages. Uses tensor collectives only, never one that pickles. Data in
host memory (tallies, facts, meetings) always goes through gloo: a collective of nccl returns when it is queued on the
device, so its return says nothing about the other workers.
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
    """A worker among processes. `store` is where they meet; None: the processes of the group that this process is in
    already, which is left unchanged. `device` decides which library sends the contributions."""

    offload = None

    def __init__(
        self,
        store: dist.Store | None,
        *,
        rank: int,
        workers: int,
        device: torch.device,
        timeout_seconds: float,
        generation: int = 0,
    ) -> None:
        self.rank = rank
        self.workers = workers
        self.generation = generation
        self._device = device
        timeout = timedelta(seconds=timeout_seconds)
        self._made = store is not None  # the default group is this exchange's own
        try:
            if store is None:  # new groups, so that its messages and others' never mix
                self._host: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timeout)
            else:
                dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=timeout)
                self._host = dist.group.WORLD  # blocks until all have come
            self._floats = self._host
            if device.type == "cuda":
                self._floats = dist.new_group(backend="nccl", timeout=timeout, device_id=device)
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
        _call(lambda: dist.all_reduce(values, group=self._host))
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
        _call(lambda: dist.all_to_all_single(inbox, outbox, received, sent, group=self._floats))
        return list(inbox.view(-1, shard_size).unbind(0))

    def gather_shards(self, shard: Tensor, flat: Tensor, names: Sequence[int] | None = None) -> None:
        on_host = shard.device.type == "cpu"
        if not on_host or shard.nbytes < LARGE_BYTES:
            _call(lambda: _all_gather(flat, shard, group=self._host if on_host else self._floats))
            return
        parts = flat.view(self.workers, -1).unbind(0)
        parts[self.rank].copy_(shard)
        _call(lambda: _broadcast_each(parts, self._host))

    def gather_bytes(self, content: bytes) -> list[bytes]:
        return gather_padded(self, content)

    def send_to_first(self, content: bytes) -> list[bytes]:
        sizes = torch.zeros(self.workers, dtype=torch.int64)
        sizes[self.rank] = len(content)
        found = [content]
        for worker, size in enumerate(self.add_integers(sizes).tolist()):
            if worker == self.rank > 0 and size:
                mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                _call(lambda: dist.send(mine, 0, group=self._host))  # noqa: B023 - called at once
            elif worker > self.rank == 0:
                theirs = torch.zeros(size, dtype=torch.uint8)
                if size:
                    _call(lambda: dist.recv(theirs, worker, group=self._host))  # noqa: B023 - called at once
                found.append(theirs.numpy().tobytes())
        return [] if self.rank else found

    def wait_for_all(self) -> None:
        if self._device.type == "cuda":  # queued work of the device is done before another worker relies on it
            torch.cuda.synchronize(self._device)
        self.add_integers(torch.zeros(1, dtype=torch.int64))

    def close(self) -> None:
        if self._made:
            dist.destroy_process_group()
            return
        for group in {self._host, self._floats}:
            dist.destroy_process_group(group)


def _forget_half_made() -> None:
    """Make torch forget a group that could not be made. Torch counts groups and uses the count for the next one's name;
    with another count, workers that were not in this group would wait for each other forever. Ending a group resets the
    count."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.destroy_process_group()


def _broadcast_each(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill each part from the worker of that number. Gloo's own all-gather of 44 MB takes three times as long."""
    for broadcast in [dist.broadcast(part, owner, group, async_op=True) for owner, part in enumerate(parts)]:
        broadcast.wait()


def _sized(buffer: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """The buffer cut to a size, or a new, larger one."""
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
