"""Workers as processes of this host: forked when a call begins, ended when it ends.

Owns the processes, their sockets and their shared memory. The function and everything that it refers to are inherited,
not sent; items and results are sent in the form of `wire.py`, large buffers through an `Arena`. A worker that ends is
replaced; the tasks whose results it had not returned are reported.
"""

from __future__ import annotations

import atexit
import mmap
import os
import selectors
import signal
import socket
import sys
import time
import weakref
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from unisono.errors import ParallelError
from unisono.parallel.arena import Arena
from unisono.parallel.item_batches import ItemBatch, ItemFault, MapJob, Outcome, settle
from unisono.parallel.messages import Message, Parcel, pairs, parse, receive
from unisono.parallel.outcomes import pack_items, perform, restore
from unisono.processes.forking import (
    count_cores,
    describe_end,
    end_with_parent,
    flush_output,
    forget_kernel_buffers,
    fork,
    rest_threads,
)

ARENA_BYTES = 128 << 20
"""Shared memory each way for each worker; only used parts take space. What does not fit goes through the socket."""

_HELD = (signal.SIGINT, signal.SIGTERM)


class Processes:
    """The engine: `workers` forked processes."""

    inherits = True

    def count(self, workers: int | str) -> int:
        """One per core that this process may use."""
        return count_cores() if workers == "auto" else int(workers)

    def start(self, job: MapJob, workers: int, timeout_seconds: float | None) -> LocalPool:
        """Fork the workers."""
        if not hasattr(os, "fork"):
            raise ParallelError("engine 'processes': this system cannot fork processes. Use Linux, macOS, or 'ray'.")
        return LocalPool(job, workers, timeout_seconds)


class LocalPool:
    """A call's processes."""

    def __init__(self, job: MapJob, workers: int, timeout_seconds: float | None) -> None:
        self._job = job
        self._timeout_seconds = timeout_seconds
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        flush_output()
        try:
            for _ in range(workers):
                self._hire()
        except BaseException:
            self.close(at_once=True)
            raise
        atexit.register(self.close, True)  # a caller that ends in the middle would wait for the workers otherwise

    def capacity(self, ahead: bool) -> int:
        """One batch for each idle worker; with `ahead`, one more for each."""
        return sum(max(0, 1 + ahead - len(worker.batches)) for worker in self._workers)

    def submit(self, batch: ItemBatch) -> list[ItemFault]:
        """Send a batch to the worker with the least to do."""
        worker = min(self._workers, key=lambda worker: len(worker.batches))
        faults = worker.send(batch)
        self._watch(worker)
        return faults

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """Send and receive what the sockets take; return the outcomes that have arrived."""
        outcomes: list[Outcome] = []
        if self._timeout_seconds is not None:
            seconds = min(seconds, 0.05)
        for key, mask in self._selector.select(seconds):
            worker: _Worker = key.data
            alive = not mask & selectors.EVENT_WRITE or worker.flush()
            if mask & selectors.EVENT_READ:
                alive = worker.receive() and alive
            outcomes += worker.read()
            if alive:
                self._watch(worker)
            else:
                outcomes += self._replace(worker)
        if self._timeout_seconds is not None:
            outcomes += self._end_late_ones()
        return outcomes

    def close(self, at_once: bool) -> None:
        """End all workers."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.close(at_once)
        self._workers.clear()
        self._selector.close()

    def _hire(self) -> None:
        if "torch" in sys.modules:
            forget_kernel_buffers()
        if self._job.threads > 1:
            rest_threads()
        worker = _Worker(self._job)
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _watch(self, worker: _Worker) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
        self._selector.modify(worker.socket, events, worker)

    def _replace(self, worker: _Worker, late: bool = False) -> list[Outcome]:
        """Report a worker that has ended, or that is ended now since it is late; start another."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        if not late:
            worker.process.join(1.0)  # its socket closes a little before it ends
        worker.close(at_once=True)
        at = worker.board[0] if not late or self._is_late(worker) else -1  # it may just have started the next task
        how = describe_end(worker.process.exitcode or 0)
        self._hire()
        return [
            Outcome(id=batch.id, loss=how, at=at if at in batch.numbers else -1, late=late) for batch in worker.batches
        ]

    def _end_late_ones(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for worker in list(self._workers):
            if self._is_late(worker):
                outcomes += self._replace(worker, late=True)
        return outcomes

    def _is_late(self, worker: _Worker) -> bool:
        at, since = worker.board
        limit = self._timeout_seconds
        return limit is not None and at >= 0 and time.monotonic_ns() - since > limit * 1e9


class _Worker:
    """A worker process, on its parent's side."""

    def __init__(self, job: MapJob) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        self.board = Arena(mmap.PAGESIZE).view[:16].cast("q")  # the running task (−1: none), its start (nanoseconds)
        self.board[0] = -1
        self._items, self._results = Arena(ARENA_BYTES), Arena(ARENA_BYTES)
        self.batches: deque[ItemBatch] = deque()
        self.outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()
        self._freed = array("Q")  # ranges of results that have been read
        self._bytes: dict[int, int] = {}
        args = (job, theirs, self.socket, self.board, self._items, self._results, os.getpid())
        self.process = fork(_serve, args, "unisono worker", hold=_HELD)
        theirs.close()

    def send(self, batch: ItemBatch) -> list[ItemFault]:
        """Queue a batch for sending; return faults for items that cannot be sent."""
        parcel = Parcel(self._items)
        numbers, faults = pack_items(batch, parcel.add)
        self.outgoing += parcel.close(batch.id, array("Q", numbers), self._freed)
        self._freed = array("Q")
        self._bytes[batch.id] = parcel.size_bytes
        self.batches.append(batch)
        self.flush()
        return faults

    def flush(self) -> bool:
        """Send what the socket takes. False: the process has ended."""
        while self.outgoing:
            try:
                sent = self.socket.send(self.outgoing[0])
            except BlockingIOError:
                return True
            except (BrokenPipeError, ConnectionResetError):
                return False
            if sent == len(self.outgoing[0]):
                self.outgoing.popleft()
            else:
                self.outgoing[0] = self.outgoing[0][sent:]
        return True

    def receive(self) -> bool:
        """Receive what has arrived. False: the process has ended."""
        while True:
            try:
                content = self.socket.recv(1 << 20)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not content:
                return False
            self._incoming += content
            if len(content) < 1 << 16:
                return True

    def read(self) -> list[Outcome]:
        """Unpack the messages that have arrived complete."""
        outcomes: list[Outcome] = []
        for message in parse(self._incoming):
            for offset, length in pairs(message.freed):
                self._items.give_back(offset, length)
            buffers = [_copy(self._results, offset, length) for offset, length in pairs(message.ranges)]
            outcome = restore(message.open(buffers))
            self._freed += message.ranges
            outcome.bytes_ = self._bytes.pop(outcome.id) + message.size_bytes
            outcomes.append(outcome)
            self.batches.popleft()
        return outcomes

    def close(self, at_once: bool) -> None:
        """End the process."""
        if at_once:
            self.process.kill()
        with suppress(OSError):  # it has ended
            self.socket.shutdown(socket.SHUT_RDWR)  # closing is not enough: later workers have inherited this end
        self.socket.close()
        self.process.join()


def _serve(
    job: MapJob, end: socket.socket, other: socket.socket, board: memoryview, items: Arena, results: Arena, parent: int
) -> None:
    """A worker's life: batches in, outcomes out, until the parent closes its end."""
    end_with_parent(parent)
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    settle(job.threads)
    freed = array("Q")  # ranges of items that are no longer referred to
    while (message := receive(end)) is not None:
        for offset, length in pairs(message.freed):
            results.give_back(offset, length)
        parcel = Parcel(results)
        _perform(job, message, items, freed, board, parcel)
        given_back = freed[:]
        del freed[: len(given_back)]
        with suppress(BrokenPipeError, ConnectionResetError):  # the parent no longer waits for it
            for part in parcel.close(message.id, array("Q"), given_back):
                end.sendall(part)
        del parcel, message
    flush_output()
    os._exit(0)  # no clean-up of what was inherited from the parent


def _perform(job: MapJob, message: Message, arena: Arena, freed: array, board: memoryview, parcel: Parcel) -> None:
    """Run a message's batch; when this returns, only the function itself may still refer to the items."""
    items = message.open(_lend(arena, message.ranges, freed))
    perform(job, ItemBatch(id=message.id, numbers=message.numbers, items=items), board, parcel.add)


def _lend(arena: Arena, ranges: array, freed: array) -> list[np.ndarray]:
    """Buffers in the arena; their ranges are put into `freed` when they are no longer referred to."""
    buffers = []
    for offset, length in pairs(ranges):
        content = np.frombuffer(arena.memory, np.uint8, length, offset)
        weakref.finalize(content, freed.extend, (offset, length))
        buffers.append(content)
    return buffers


def _copy(arena: Arena, offset: int, length: int) -> np.ndarray:
    content = np.empty(length, np.uint8)
    content[:] = np.frombuffer(arena.memory, np.uint8, length, offset)
    return content
