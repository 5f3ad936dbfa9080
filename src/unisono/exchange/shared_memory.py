"""The exchange of processes on one host: nodes are read in place, instead of travelling through sockets.

Each worker keeps its tree's buffers in anonymous shared memory (memfd: no name, so nothing outlives the processes, and
no limit of /dev/shm applies); an owner reads its part of every node in place. The small exchanges go through pipes and
are the barriers: after one of them, all workers can read what a worker wrote before it. Workers need their meeting only
until the pipes are open.

Owns the memory. The engine decides what is added, and in which order, so the bits are those of any other exchange.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unisono.errors import LostPeerError
from unisono.exchange.meeting import Meeting
from unisono.exchange.offload import OffloadQueue
from unisono.exchange.padding import gather_padded
from unisono.exchange.pipes import Pipes, open_end

SMALL_BYTES = 65_536  # below, a message costs less than shared memory


class Shared:
    """An `Exchange` of a worker among processes of one host, on CPUs."""

    def __init__(
        self, meeting: Meeting, *, rank: int, workers: int, timeout_seconds: float, generation: int = 0
    ) -> None:
        self.rank = rank
        self.workers = workers
        self.generation = generation
        self._pipes = Pipes(
            lambda numbers: _meet(meeting, "pipes", numbers),
            rank=rank,
            workers=workers,
            timeout_seconds=timeout_seconds,
        )
        self._files: dict[int, int] = {}  # address of a buffer of mine → its file descriptor
        self._maps: dict[tuple[int, int], mmap.mmap] = {}  # (rank, file descriptor there) → its memory here
        self._windows: list[Tensor] = []  # two, used in turn: one may still be read while the other is written
        self.offload: OffloadQueue | None = None
        try:
            if all(answer for (answer,) in self._pipes.swap(bytes([_can_assist(workers)]))):
                self.offload = OffloadQueue(
                    self.new_buffer, self.name, self._read, self._pipes, rank=rank, workers=workers
                )
        except BaseException:
            self.close()
            raise

    def new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Return zeros in shared memory."""
        file = os.memfd_create("unisono")
        size = max(elements * dtype.itemsize, 1)
        os.ftruncate(file, size)
        self._maps[self.rank, file] = mmap.mmap(file, size)
        buffer = torch.frombuffer(self._maps[self.rank, file], dtype=dtype, count=elements)
        self._files[buffer.data_ptr()] = file
        return buffer

    def name(self, buffer: Tensor) -> int:
        return self._files[buffer.data_ptr()]

    def add_integers(self, values: Tensor) -> Tensor:
        total = values.contiguous()
        numbers = total.view(-1).numpy()
        rows = self._pipes.swap(numbers.tobytes() or b"0")
        for worker, row in enumerate(rows):
            if worker != self.rank:
                numbers += np.frombuffer(row, np.int64, count=len(numbers))
        return total

    def to_owners(
        self, nodes: Sequence[Tensor], names: Sequence[Sequence[int]], *, shard_size: int, dtype: torch.dtype
    ) -> list[Tensor]:
        """As the protocol says; the result lies in the workers' buffers; each owner has its own part of them."""
        mine = slice(self.rank * shard_size, (self.rank + 1) * shard_size)
        return [self._read(worker, file, dtype)[mine] for worker, files in enumerate(names) for file in files]

    def gather_shards(self, shard: Tensor, flat: Tensor, names: Sequence[int] | None = None) -> None:
        if names is None and shard.nbytes < SMALL_BYTES:
            rows = self._pipes.swap(shard.contiguous().view(torch.uint8).numpy().tobytes())
            for part, row in zip(flat.chunk(self.workers), rows, strict=True):
                part.copy_(torch.frombuffer(row, dtype=shard.dtype))
            return
        if names is None:
            window = shard
            if shard.data_ptr() not in self._files:
                window = self._next_window(shard.nbytes)
                window[: shard.nbytes].copy_(shard.view(torch.uint8))
            names = self._announce(self.name(window))
        for worker, part in enumerate(flat.chunk(self.workers)):
            values = shard if worker == self.rank else self._read(worker, names[worker], shard.dtype)[: len(shard)]
            part.copy_(values)

    def gather_bytes(self, content: bytes) -> list[bytes]:
        return gather_padded(self, content)

    def send_to_first(self, content: bytes) -> list[bytes]:
        sizes = torch.zeros(self.workers, dtype=torch.int64)
        sizes[self.rank] = len(content)
        lengths: list[int] = self.add_integers(sizes).tolist()
        window = self._next_window(max(1, len(content)))
        window.numpy()[: len(content)] = np.frombuffer(content, np.uint8)
        names = self._announce(self.name(window))
        found = [content]
        if self.rank == 0:
            rows = [self._read(worker, names[worker], torch.uint8) for worker in range(1, self.workers)]
            found += [row[:length].numpy().tobytes() for row, length in zip(rows, lengths[1:], strict=True)]
        self.wait_for_all()  # worker 0 has read what lies in others' memory
        return [] if self.rank else found

    def wait_for_all(self) -> None:
        self._pipes.swap(b"0")

    def close(self) -> None:
        self._pipes.close()
        if self.offload:
            self.offload.close()
        for file in self._files.values():
            os.close(file)

    def _announce(self, name: int) -> list[int]:
        """Send every worker the names of my buffers to read; return theirs. Earlier writes can be read afterwards."""
        told = torch.zeros(self.workers, dtype=torch.int64)
        told[self.rank] = name
        return self.add_integers(told).tolist()

    def _read(self, worker: int, file: int, dtype: torch.dtype) -> Tensor:
        """The whole of another worker's buffer, mapped here."""
        if (worker, file) not in self._maps:
            handle = open_end(self._pipes.pids[worker], file, os.O_RDWR)
            self._maps[worker, file] = mmap.mmap(handle, os.fstat(handle).st_size)
            os.close(handle)
        return torch.frombuffer(self._maps[worker, file], dtype=dtype)

    def _next_window(self, size_bytes: int) -> Tensor:
        """The window that was not used last, made large enough: a peer may still read the last one."""
        window = self._windows.pop(0) if len(self._windows) == 2 else None
        if window is None or window.nbytes < size_bytes:
            window = self.new_buffer(size_bytes, torch.uint8)
        self._windows.append(window)
        return window


def can_share(meeting: Meeting) -> bool:
    """Whether all workers can read each other's memory. Every worker must call this; all get the same result."""
    file = os.memfd_create("unisono") if hasattr(os, "memfd_create") else -1
    files = _meet(meeting, "memory", [os.getpid(), file])
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # limits memory files too
    readable = unlimited and all(_can_open(pid, other) for pid, other in files)
    answers = _meet(meeting, "readable", [int(readable)])
    if file >= 0:
        os.close(file)
    return all(answer for (answer,) in answers)


def _can_assist(workers: int) -> bool:
    """Whether this worker may map memory without limit, and each has processors to itself, idle while it waits."""
    unlimited = resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    return unlimited and len(os.sched_getaffinity(0)) >= workers * torch.get_num_threads()


def _meet(meeting: Meeting, what: str, numbers: list[int]) -> list[list[int]]:
    """The numbers that every worker passes under `what`, in order of rank."""
    return [[int(number) for number in row.split()] for row in meeting.gather(what, " ".join(map(str, numbers)))]


def _can_open(pid: int, file: int) -> bool:
    try:
        os.close(open_end(pid, file, os.O_RDWR))
    except LostPeerError:
        return False
    return True
