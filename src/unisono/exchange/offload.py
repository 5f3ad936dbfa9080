"""Offloaded weight gradients: products that a late worker publishes, and waiting workers compute for it.

A *job* is one product, left transposed times right, of float32 numbers. Its owner copies both into a *slot*, memory
that all workers of a host map, and writes the slot's number into its pipe of jobs. Any worker that waits in an exchange
(`pipes.py`) wakes up and reads the number; so does the owner itself at the end, for jobs that no worker has begun. A
number is read once, so nothing is computed twice. Nothing is lost with a worker, either: the owner keeps the operands
until it has the product.

It is the same call on the same numbers, laid out in the same way, so no bit depends on which worker computes it.

Owns the slots, the pipes of jobs and of answers, and which worker computes what. The owner of a product defines its
use.
"""

from __future__ import annotations

import os
import select
import time
from array import array
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unisono.errors import LostPeerError
from unisono.exchange.pipes import Pipes, open_end

MOST_SLOTS = 8
SLOT_BYTES = 2**27  # of address space; unwritten pages take no memory
JOBS_EACH = 2  # published for each waiting worker: one that it computes, and the next
ALIGNED = 64  # bytes; as torch aligns its own tensors, on which a product's bits may depend
PATIENCE_SECONDS, SLOWEST_FLOPS = 0.2, 1e9  # how long an idle owner waits for a product
_COLUMNS = ("m", "i", "o", "nanoseconds")  # of the table of sizes, which has a row for each slot


class OffloadQueue:
    """One worker's queue of products that others may compute, and its access to the queues of others.

    Args:
        new_buffer, name, read: memory that all workers map, from `Shared`. pipes: of the exchange in which workers
        wait.

    Attributes:
        given_seconds: how long this worker has computed for others, in all. taken_seconds: how much longer this one
            would have computed without them.
    """

    def __init__(
        self,
        new_buffer: Callable[[int, torch.dtype], Tensor],
        name: Callable[[Tensor], int],
        read: Callable[[int, int, torch.dtype], Tensor],
        pipes: Pipes,
        *,
        rank: int,
        workers: int,
    ) -> None:
        self.given_seconds = self.taken_seconds = 0.0
        self._waiting, self._read = pipes.count_waiting, read
        self._shut = False
        self._slots = min(JOBS_EACH * (workers - 1), MOST_SLOTS)
        self._memory = new_buffer(self._slots * SLOT_BYTES // 4, torch.float32)
        self._sizes = new_buffer(self._slots * len(_COLUMNS), torch.int64)
        self._free = list(range(self._slots))  # a slot is also taken while an abandoned job is computed
        self._laid: dict[int, tuple[Any, Tensor, Tensor]] = {}  # slot → its key and operands
        self._found: list[tuple[Any, Tensor]] = []
        self._others: dict[int, int] = {}  # their pipes of jobs → rank
        self._places: dict[int, tuple[int, int, int]] = {}  # rank → its pipe of answers, its memory, its sizes
        self._jobs, self._put = os.pipe()
        self._answers, answered = os.pipe()
        try:
            for file in (self._jobs, self._answers):
                os.set_blocking(file, False)
            mine = array("q", [self._jobs, answered, name(self._memory), name(self._sizes)])
            for worker, told in enumerate(pipes.swap(mine.tobytes())):
                jobs, answers, *files = array("q", bytes(told))
                if worker != rank:
                    self._others[open_end(pipes.pids[worker], jobs, os.O_RDONLY | os.O_NONBLOCK)] = worker
                    self._places[worker] = (open_end(pipes.pids[worker], answers, os.O_WRONLY), files[0], files[1])
            pipes.swap(b"0")  # all have opened my files
        except BaseException:
            self.close()
            raise
        finally:
            os.close(answered)
        pipes.work = self

    # ---- for the owner of a product

    def publish(self, key: Any, left: Tensor, right: Tensor) -> bool:
        """Enqueue the product left [m, i] transposed times right [m, o], float32, if another worker waits for this one;
        return whether this was done. `collect` then has the product."""
        self._handle_messages()
        if self._shut or not self._free or len(self._laid) >= JOBS_EACH * self._waiting():
            return False
        (rows, width), other = left.shape, right.shape[1]
        fits = (rows + width) * other + rows * width + 2 * ALIGNED <= SLOT_BYTES // 4
        if not fits or not all(one.is_contiguous() and one.data_ptr() % ALIGNED == 0 for one in (left, right)):
            return False
        slot = self._free.pop()
        _row(self._sizes, slot)[:3] = torch.tensor([rows, width, other])
        its_left, its_right, _ = _cut(self._memory, self._sizes, slot)
        its_left.copy_(left)
        its_right.copy_(right)
        self._laid[slot] = (key, left, right)
        os.write(self._put, bytes([slot]))
        return True

    def collect(self) -> list[tuple[Any, Tensor]]:
        """The products of all enqueued pairs, with their keys; jobs that no worker has begun are computed here."""
        while self._laid and (slot := _take(self._jobs)) is not None:
            self._compute(slot)
            self._free.append(slot)
            self._handle_messages()
        while self._laid and self._await():
            self._handle_messages()
        for slot in list(self._laid):  # the worker that has begun it has ended, or hangs
            self._compute(slot)
        found, self._found = self._found, []
        return found

    def _compute(self, slot: int) -> None:
        """Compute an enqueued product in this worker."""
        key, left, right = self._laid.pop(slot)
        self._found.append((key, left.t() @ right))

    def _handle_messages(self) -> None:
        """Collect the products that others have computed."""
        while len(self._free) < self._slots and (slot := _take(self._answers)) is not None:
            if slot in self._laid:
                key, _, _ = self._laid.pop(slot)
                self._found.append((key, _cut(self._memory, self._sizes, slot)[2].clone()))
                self.taken_seconds += int(_row(self._sizes, slot)[3]) / 1e9
            self._free.append(slot)

    def _await(self) -> bool:
        """Wait for the next answer; return whether there is one, in time."""
        flop = max(2 * left.numel() * right.shape[1] for _, left, right in self._laid.values())
        answers, started = select.poll(), time.perf_counter()
        answers.register(self._answers, select.POLLIN)
        ready = answers.poll((PATIENCE_SECONDS + flop / SLOWEST_FLOPS) * 1e3)
        self.taken_seconds -= time.perf_counter() - started
        return any(event & select.POLLIN for _, event in ready)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, nothing is enqueued: this worker computes all its products itself."""
        self._shut = True
        try:
            yield
        finally:
            self._shut = False

    # ---- for a waiting worker

    def offers(self, late: Container[int]) -> list[int]:
        """The pipes from which jobs of these workers are read."""
        return [file for file, worker in self._others.items() if worker in late]

    def serve(self, file: int) -> None:
        """Compute a job from this pipe, if there still is one."""
        slot = _take(file)
        if slot is None:
            return
        answers, memory, sizes = self._places[self._others[file]]
        started = time.perf_counter_ns()
        told = self._read(self._others[file], sizes, torch.int64)
        left, right, product = _cut(self._read(self._others[file], memory, torch.float32), told, slot)
        torch.mm(left.t(), right, out=product)
        took = time.perf_counter_ns() - started
        _row(told, slot)[3] = took
        self.given_seconds += took / 1e9
        try:
            os.write(answers, bytes([slot]))
        except BrokenPipeError as error:
            raise LostPeerError(f"another worker has gone: {error}") from error

    def close(self) -> None:
        """Leave."""
        answers = [place[0] for place in self._places.values()]
        for file in (self._jobs, self._put, self._answers, *self._others, *answers):
            os.close(file)


def _row(sizes: Tensor, slot: int) -> Tensor:
    return sizes.view(-1, len(_COLUMNS))[slot]


def _cut(memory: Tensor, sizes: Tensor, slot: int) -> list[Tensor]:
    """What a slot holds: left [m, i], right [m, o], and their product [i, o]."""
    rows, width, other, _ = _row(sizes, slot).tolist()
    start, parts = slot * SLOT_BYTES // 4, []
    for shape in ((rows, width), (rows, other), (width, other)):
        size = shape[0] * shape[1]
        parts.append(memory[start : start + size].view(shape))
        start += -(-size * 4 // ALIGNED) * ALIGNED // 4
    return parts


def _take(file: int) -> int | None:
    """The number of a slot from a pipe; None: there is none now, or no writer any more."""
    try:
        content = os.read(file, 1)
    except BlockingIOError:
        return None
    return content[0] if content else None
