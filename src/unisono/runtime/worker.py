"""The main function of a worker process: settle numerics, join, act, leave; a stop request does no harm.

Owns signals, and how an exception inside a worker is reported. `launchers/` start the workers.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import torch

from unisono.engine import numerics
from unisono.errors import Interrupted, LostPeerError, RecipeError, UnisonoError
from unisono.exchange.protocol import Exchange
from unisono.processes.limits import explain
from unisono.processes.progress_table import RUNNING, STOP
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.signals import in_main_thread, take_noted

STOPPING = (signal.SIGINT, signal.SIGTERM)
"""The signals that ask a run to stop."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # glibc's malloc.h
MMAP_MAX, TOP_PAD_BYTES = 65_536, 128 * 2**10  # glibc's defaults
MMAP_THRESHOLD_BYTES = 32 * 2**20  # glibc raises its threshold up to this as blocks are freed, and trims at twice that


class Stop:
    """Whether this worker was asked to stop, by SIGTERM or SIGUSR1. While `graceful` is false the request ends it at
    once."""

    def __init__(self) -> None:
        self.graceful = False
        self._asked = False

    def __call__(self) -> int:
        """progress_table.STOP where a stop was requested, else progress_table.RUNNING. After the first call, a request
        waits for the end of the step."""
        self.graceful = True
        return STOP if self._asked else RUNNING

    def ask(self, signum: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self._asked = True
        if not self.graceful:
            raise Interrupted("stopped before the first step.")


class Act(Protocol):
    """The work of a worker after it has joined the others."""

    def __call__(self, assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop) -> None: ...


def work(assignment: RankAssignment, act: Act, *, threads: int, wanted_device: str) -> None:
    """Do one worker's part, in this process."""
    stop = Stop()
    if in_main_thread():
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, stop.ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher gets a terminal's Ctrl-C, too
        for signum in take_noted():
            stop.ask(signum, None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # a local launcher blocks them until here
    keep_memory()
    try:
        device = assignment.device(wanted_device)
    except RecipeError as error:
        assignment.refuse(str(error))
        raise
    numerics.settle(threads=threads, device=device)
    exchange = assignment.join(device)
    act(assignment, exchange, device, stop)
    exchange.close()


def keep_memory() -> None:
    """Make glibc keep freed blocks of any size: it would return those above 32 MB at once, and every step would
    fault all their pages again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 * 2**20)


@contextmanager
def memory_kept() -> Iterator[None]:
    """Within, freed blocks are kept, as by `keep_memory`; afterwards they are returned, and glibc behaves as in a
    process that has used large blocks: the settings from before cannot be read. A value set in the environment
    stays."""
    libc = ctypes.CDLL(None)
    is_set = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if is_set or not hasattr(libc, "mallopt"):
        yield
        return
    keep_memory()
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * MMAP_THRESHOLD_BYTES)
        libc.mallopt(M_TOP_PAD, TOP_PAD_BYTES)
        libc.malloc_trim(0)


def guarded(main: Callable[[], None], write: Callable[[str], object], rank: int) -> int:
    """Run a worker's main; `write` what it raises, as JSON; return the process's exit code."""
    try:
        main()
        return 0
    except BaseException as error:  # noqa: BLE001 - every end of a worker must reach the launcher
        known = isinstance(error, UnisonoError)
        report = {
            "rank": rank,
            "kind": type(error).__name__,
            "message": str(error),
            "known": known,
            "symptom": isinstance(error, LostPeerError),
            "traceback": traceback.format_exc(),
            "limit": explain(error),
            "when": time.monotonic(),  # one clock for all processes of a host, never set back
        }
        write(json.dumps(report))
        return int(os.EX_SOFTWARE)
