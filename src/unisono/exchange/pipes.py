"""Small messages among the processes of one host, through pipes. A collective of gloo goes through several threads and
a socket, and takes a hundred times as long.

Each worker has a pipe from every other one. Only these two processes hold its ends, so a worker that is lost, or
leaves, is noticed at once: its earlier messages can still be read, and then comes the end of file.

Owns the pipes, and the waiting. `shared_memory.py` defines what the messages mean.
"""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Container
from typing import Protocol

from unisono.errors import LostPeerError

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this process, and no sign of another's end
SPIN_SECONDS = 1e-4  # a sleeping process takes as long to wake up, and messages are mostly quicker


class Work(Protocol):
    """Work for a worker that waits."""

    def offers(self, late: Container[int]) -> list[int]:
        """Files that become readable when these workers, by rank, have work for others."""
        ...

    def serve(self, file: int) -> None:
        """Do one job from one of these files."""
        ...


class Pipes:
    """A worker's end of the pipes.

    Args:
        gather: returns the numbers that every worker passed, in order of rank; called by all of them, once.

    Attributes:
        pids: of all workers, by rank.
        work: to be done while waiting; None: nothing.
    """

    def __init__(
        self, gather: Callable[[list[int]], list[list[int]]], *, rank: int, workers: int, timeout_seconds: float
    ) -> None:
        self._rank, self._workers = rank, workers
        self._timeout_seconds = timeout_seconds
        peers = [worker for worker in range(workers) if worker != rank]
        made = {worker: os.pipe() for worker in peers}
        self._inlets = {inlet: worker for worker, (inlet, _) in made.items()}
        self._arrivals = select.poll()
        for inlet in self._inlets:
            self._arrivals.register(inlet, select.POLLIN)
        self.work: Work | None = None
        self._outlets: dict[int, int] = {}
        try:
            told = gather([os.getpid(), *(made[worker][1] if worker in made else -1 for worker in range(workers))])
            self.pids = [pid for pid, *_ in told]
            for worker in peers:
                self._outlets[open_end(self.pids[worker], told[worker][1 + rank], os.O_WRONLY)] = worker
            for file in (*self._inlets, *self._outlets):
                os.set_blocking(file, False)
            self.swap(b"0")  # a worker that has written to me has opened its end
        except BaseException:
            self.close()
            raise
        finally:
            for _, outlet in made.values():
                os.close(outlet)

    def swap(self, content: bytes) -> list[bytearray]:
        """Return what every worker passed, in order of rank; all pass the same number of bytes, one at least.

        Raises:
            LostPeerError: another worker has ended, or did not come in time.
        """
        found = [bytearray(content if worker == self._rank else b"") for worker in range(self._workers)]
        unsent = dict.fromkeys(self._outlets, memoryview(content))
        lacking = dict.fromkeys(self._inlets, len(content))
        spin_until = time.perf_counter() + SPIN_SECONDS
        while unsent or lacking:
            sent, received = self._send(unsent), self._receive(lacking, found)
            if sent or received:
                continue
            if time.perf_counter() < spin_until:
                os.sched_yield()
            else:
                self._wait(unsent, lacking)
        return found

    def count_waiting(self) -> int:
        """How many other workers wait in the next exchange."""
        return sum(event & select.POLLIN > 0 for _, event in self._arrivals.poll(0))

    def close(self) -> None:
        """Leave; the others notice it."""
        for file in (*self._inlets, *self._outlets):
            os.close(file)
        self._inlets, self._outlets = {}, {}

    def _send(self, unsent: dict[int, memoryview]) -> bool:
        """Write as much as the pipes take; return whether anything was written."""
        before = len(unsent)
        for file, content in list(unsent.items()):
            try:
                written = os.write(file, content)
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise LostPeerError(f"another worker has gone: {error}") from error
            if written < len(content):
                unsent[file] = content[written:]
            else:
                del unsent[file]
        return len(unsent) < before

    def _receive(self, lacking: dict[int, int], found: list[bytearray]) -> bool:
        """Read what has arrived; return whether there was anything."""
        anything = False
        for file, size in list(lacking.items()):
            try:
                content = os.read(file, size)
            except BlockingIOError:
                continue
            if not content:
                raise LostPeerError(f"another worker has gone: worker {self._inlets[file]} has closed its pipe")
            anything = True
            found[self._inlets[file]] += content
            if len(content) < size:
                lacking[file] = size - len(content)
            else:
                del lacking[file]
        return anything

    def _wait(self, unsent: dict[int, memoryview], lacking: dict[int, int]) -> None:
        """Sleep until one of the pipes is ready, or do some work of late workers."""
        waiting = select.poll()
        for file in unsent:
            waiting.register(file, select.POLLOUT)
        for file in lacking:
            waiting.register(file, select.POLLIN)
        offers = self.work.offers({self._inlets[file] for file in lacking}) if self.work else []
        for file in offers:
            waiting.register(file, select.POLLIN)
        ready = waiting.poll(self._timeout_seconds * 1e3)
        for file, _ in ready:
            if self.work and file in offers:
                self.work.serve(file)
        if not ready:
            late = sorted({self._inlets[file] for file in lacking} | {self._outlets[file] for file in unsent})
            raise LostPeerError(f"another worker has gone: no word from {late} in {self._timeout_seconds:g} s")


def open_end(pid: int, file: int, flags: int) -> int:
    """Open another process's end of a pipe in this process, too."""
    try:
        return os.open(f"/proc/{pid}/fd/{file}", flags)
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise
        raise LostPeerError(f"another worker has gone: {error}") from error
