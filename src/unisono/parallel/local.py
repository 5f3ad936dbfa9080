"""Workers as processes of this host: forked when a call begins, gone when it ends.

Owns the processes, their sockets and their shared memory. The function and all that it refers to are inherited, not
sent; items and results travel as `wire.py` takes them apart, large buffers through an `Arena`. A worker that ends is
replaced; what it had not given back is told.
"""

from __future__ import annotations

import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import time
import weakref
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from threadpoolctl import threadpool_limits

from unisono.errors import ParallelError
from unisono.parallel.arena import Arena
from unisono.parallel.tasks import Batch, Fault, Job, Outcome, SeedTorch, describe, run
from unisono.parallel.wire import pack, unpack
from unisono.processes import describe_end, end_with_parent, forget_kernel_buffers, fork

ARENA_BYTES = 128 << 20
"""Shared memory each way for each worker; only what has been used takes space. What does not fit goes by the socket."""

_HEAD = struct.Struct("<QQQQQ")  # batch, tasks, ranges of the body, ranges given back, bytes of the body
_HELD = (signal.SIGINT, signal.SIGTERM)


class Processes:
    """The engine: `workers` forked processes."""

    inherits = True

    def count(self, workers: int | str) -> int:
        """One per core that this process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cores if workers == "auto" else int(workers)

    def start(self, job: Job, workers: int, timeout_seconds: float | None) -> LocalCrew:
        """Fork the workers."""
        if not hasattr(os, "fork"):
            raise ParallelError("engine 'processes': this system cannot fork processes. Use Linux, macOS, or 'ray'.")
        return LocalCrew(job, workers, timeout_seconds)


class LocalCrew:
    """A call's processes."""

    def __init__(self, job: Job, workers: int, timeout_seconds: float | None) -> None:
        self._job = job
        self._timeout_seconds = timeout_seconds
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        sys.stdout.flush()
        sys.stderr.flush()
        if "torch" in sys.modules:
            forget_kernel_buffers()
        try:
            for _ in range(workers):
                self._hire()
        except BaseException:
            self.close(at_once=True)
            raise

    def capacity(self, ahead: bool) -> int:
        """One batch for each idle worker; with `ahead`, one more for each."""
        return sum(max(0, 1 + ahead - len(worker.batches)) for worker in self._workers)

    def submit(self, batch: Batch) -> list[Fault]:
        """Send a batch to the worker with the least to do."""
        worker = min(self._workers, key=lambda worker: len(worker.batches))
        faults = worker.send(batch)
        self._watch(worker)
        return faults

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """Move what can be moved through the sockets; return what has come back."""
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
        for worker in self._workers:
            worker.close(at_once)
        self._workers.clear()
        self._selector.close()

    def _hire(self) -> None:
        worker = _Worker(self._job)
        self._workers.append(worker)
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _watch(self, worker: _Worker) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outgoing else 0)
        self._selector.modify(worker.socket, events, worker)

    def _replace(self, worker: _Worker, late: bool = False) -> list[Outcome]:
        """Tell of a worker that has ended; start another."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        at = worker.board[0]
        worker.close(at_once=True)
        how = describe_end(worker.process.exitcode or 0)
        self._hire()
        return [
            Outcome(id=batch.id, loss=how, at=at if at in batch.numbers else -1, late=late) for batch in worker.batches
        ]

    def _end_late_ones(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        assert self._timeout_seconds is not None
        for worker in list(self._workers):
            at, since = worker.board
            if at >= 0 and time.monotonic_ns() - since > self._timeout_seconds * 1e9:
                outcomes += self._replace(worker, late=True)
        return outcomes


class _Worker:
    """A process, as its parent sees it."""

    def __init__(self, job: Job) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        self.board = Arena(mmap.PAGESIZE).view[:16].cast("q")  # the task at work (−1: none), since when (nanoseconds)
        self.board[0] = -1
        self._items, self._results = Arena(ARENA_BYTES), Arena(ARENA_BYTES)
        self.batches: deque[Batch] = deque()
        self.outgoing: deque[memoryview] = deque()
        self._incoming = bytearray()
        self._freed = array("Q")  # ranges of results that have been read
        self._bytes: dict[int, int] = {}
        args = (job, theirs, self.socket, self.board, self._items, self._results, os.getpid())
        self.process = fork(_serve, args, "unisono worker", hold=_HELD)
        theirs.close()

    def send(self, batch: Batch) -> list[Fault]:
        """Queue a batch for sending; return faults for what cannot be sent."""
        faults: list[Fault] = []
        try:
            body, ranges = _pack_into(self._items, batch.items)
        except Exception:  # noqa: BLE001 - which item it was is found out, and told
            numbers, items = [], []
            for number, item in zip(batch.numbers, batch.items, strict=True):
                try:
                    pack(item, lambda content: True)
                except Exception as error:  # noqa: BLE001 - told with its item
                    faults.append(describe(number, error))
                else:
                    numbers.append(number)
                    items.append(item)
            batch = Batch(id=batch.id, numbers=numbers, items=items)
            body, ranges = _pack_into(self._items, items)
        self.outgoing += _frame(batch.id, array("Q", batch.numbers), ranges, self._freed, body)
        self._freed = array("Q")
        self._bytes[batch.id] = len(body) + sum(ranges[1::2])
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
        """Take what has arrived. False: the process has ended."""
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
        """Take apart what has arrived whole."""
        outcomes: list[Outcome] = []
        begin = 0
        while len(self._incoming) - begin >= _HEAD.size:
            head = _HEAD.unpack_from(self._incoming, begin)
            body = begin + _HEAD.size + 8 * _count_numbers(head)
            end = body + head[-1]
            if len(self._incoming) < end:
                break
            _, given, back = _cut(head, bytes(self._incoming[begin + _HEAD.size : body]))
            for offset, length in _pairs(back):
                self._items.give_back(offset, length)
            buffers = [_copy(self._results, offset, length) for offset, length in _pairs(given)]
            self._freed += given
            outcome = self._unpack(bytes(self._incoming[body:end]), buffers)
            outcome.bytes_ = self._bytes.pop(outcome.id) + end - begin + sum(given[1::2])
            outcomes.append(outcome)
            self.batches.popleft()
            begin = end
        if begin:
            del self._incoming[:begin]
        return outcomes

    def _unpack(self, body: bytes, buffers: list[np.ndarray]) -> Outcome:
        batch = self.batches[0]
        try:
            outcome: Outcome = unpack(body, buffers)
        except Exception as error:
            first, last = batch.numbers[0], batch.numbers[-1]
            raise ParallelError(
                f"a result of tasks {first} … {last} was sent, but cannot be put together again: {error!r}. "
                "Return plain values, arrays, frames or tensors."
            ) from error
        return outcome

    def close(self, at_once: bool) -> None:
        """End the process."""
        if at_once:
            self.process.kill()
        with suppress(OSError):  # it has ended
            self.socket.shutdown(socket.SHUT_RDWR)  # closing would not do: later workers have inherited this end
        self.socket.close()
        self.process.join()


def _pack_into(arena: Arena, value: object) -> tuple[memoryview, array]:
    """Pack a value; return its bytes and the ranges (offset, size, offset, size …) of its buffers in the arena."""
    ranges = array("Q")

    def keep(content: memoryview) -> bool:
        offset = arena.take(content.nbytes)
        if offset >= 0:
            arena.view[offset : offset + content.nbytes] = content
            ranges.extend((offset, content.nbytes))
        return offset >= 0

    try:
        return pack(value, keep), ranges
    except BaseException:
        for offset, length in _pairs(ranges):
            arena.give_back(offset, length)
        raise


def _serve(
    job: Job, end: socket.socket, other: socket.socket, board: memoryview, items: Arena, results: Arena, parent: int
) -> None:
    """A worker's life: batches in, outcomes out, until the parent closes its end."""
    end_with_parent(parent)
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    _limit_threads(job.threads)
    sys.meta_path.insert(0, SeedTorch())
    freed = array("Q")  # ranges of items that nothing refers to any more
    while (packed := _receive(end, _HEAD.size)) is not None:
        head = _HEAD.unpack(packed)
        numbers, ranges, back = _cut(head, bytes(_receive(end, 8 * _count_numbers(head)) or b""))
        for offset, length in _pairs(back):
            results.give_back(offset, length)
        outcome = _run(job, head[0], numbers, _receive(end, head[-1]) or b"", _lend(items, ranges, freed), board)
        body, given = _pack_outcome(results, outcome)
        gone, freed[:] = freed[:], array("Q")
        with suppress(BrokenPipeError, ConnectionResetError):  # nobody waits for it any more
            for part in _frame(head[0], array("Q"), given, gone, body):
                end.sendall(part)
        del outcome, body
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no clean-up of what was inherited from the parent


def _run(
    job: Job, id_: int, numbers: array, body: bytes | bytearray, buffers: list[np.ndarray], board: memoryview
) -> Outcome:
    try:
        items = unpack(body, buffers)
    except Exception as error:  # noqa: BLE001 - told with the items
        told = f"it was sent, but cannot be put together again: {error!r}"
        return Outcome(id=id_, faults=[Fault(number=number, error=told, trace=told) for number in numbers])
    buffers.clear()
    outcome = run(job, Batch(id=id_, numbers=numbers, items=items), board)
    for place, fault in enumerate(outcome.faults):
        if _find_fault(fault.number, fault.exception):
            outcome.faults[place] = Fault(number=fault.number, error=fault.error, trace=fault.trace)
    return outcome


def _lend(arena: Arena, ranges: array, freed: array) -> list[np.ndarray]:
    """Buffers in the arena; their ranges are put into `freed` when nothing refers to them any more."""
    buffers = []
    for offset, length in _pairs(ranges):
        content = np.frombuffer(arena.memory, np.uint8, length, offset)
        weakref.finalize(content, freed.extend, (offset, length))
        buffers.append(content)
    return buffers


def _copy(arena: Arena, offset: int, length: int) -> np.ndarray:
    content = np.empty(length, np.uint8)
    content[:] = np.frombuffer(arena.memory, np.uint8, length, offset)
    return content


def _frame(id_: int, numbers: array, ranges: array, back: array, body: memoryview) -> list[memoryview]:
    """A message: its head, what `_cut` reads, and its body."""
    head = _HEAD.pack(id_, len(numbers), len(ranges), len(back), len(body))
    return [memoryview(head + numbers.tobytes() + ranges.tobytes() + back.tobytes()), body]


def _count_numbers(head: tuple[int, ...]) -> int:
    return sum(head[1:4])


def _cut(head: tuple[int, ...], content: bytes) -> tuple[array, array, array]:
    """The numbers of tasks, the ranges that the body's buffers lie in, and those given back."""
    numbers = array("Q", content)
    return numbers[: head[1]], numbers[head[1] : head[1] + head[2]], numbers[head[1] + head[2] :]


def _pairs(ranges: array) -> Iterator[tuple[int, int]]:
    return zip(ranges[::2], ranges[1::2], strict=True)


def _pack_outcome(arena: Arena, outcome: Outcome) -> tuple[memoryview, array]:
    """Pack what became of a batch; what cannot be sent becomes a fault, or is told in words."""
    try:
        return _pack_into(arena, outcome)
    except Exception:  # noqa: BLE001 - which value it was is found out below
        small = Outcome(id=outcome.id, seconds=outcome.seconds)
    for number, value in zip(outcome.done, outcome.values, strict=True):
        if fault := _find_fault(number, value):
            small.faults.append(fault)
        else:
            small.done.append(number)
            small.values.append(value)
    for node, value in outcome.nodes:
        if fault := _find_fault(node.index << node.level, value):
            small.faults.append(fault)
        else:
            small.nodes.append((node, value))
    small.faults += outcome.faults
    return _pack_into(arena, small)


def _find_fault(number: int, value: object) -> Fault | None:
    """Why a value cannot be sent."""
    try:
        unpack(pack(value, lambda content: False), ())
    except Exception as error:  # noqa: BLE001 - told with its item
        told = f"its result cannot be sent: {error}"
        return Fault(number=number, error=told, trace=told)
    return None


def _receive(end: socket.socket, size: int) -> bytearray | None:
    """Exactly so many bytes; None where the other end is gone."""
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        count = end.recv_into(view[done:])
        if not count:
            return None
        done += count
    return content


def _limit_threads(threads: int) -> None:
    """Have kernels use so many threads, in libraries that are there and in those that come."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    threadpool_limits(threads)
