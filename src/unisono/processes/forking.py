"""Forked processes, and what they and their parent share.

Owns what all kinds of workers have in common, in training and in maps: a worker begins as a copy of its parent, ends
with it at the latest, and its end can be described in words. Does not decide which process is started or replaced.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol


class ChildProcess(Protocol):
    """A process that this one has started, forked or not. exitcode: None while it runs; minus a signal's number.
    sentinel: a descriptor that becomes readable when it has ended."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exitcode(self) -> int | None: ...

    @property
    def sentinel(self) -> int: ...

    def kill(self) -> None:
        """Send SIGKILL."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, for at most this many seconds."""
        ...


ends_with_this_one = False
"""Whether the process that is being forked now ends with this one at the latest: `fork` says so, and no other fork."""
PR_SET_PDEATHSIG = 1
OMP_PAUSE_HARD = 2


def fork(target: Callable[..., None], args: tuple[Any, ...], name: str, hold: Collection[int] = ()) -> BaseProcess:
    """Start a copy of this process that runs `target`.

    Signals in `hold` wait in the child until it unblocks them: a signal for the parent must not reach the child
    before it handles signals. `target` has to call `end_with_parent` first.
    """
    global ends_with_this_one
    caller = multiprocessing.current_process()
    is_daemonic = caller.daemon
    if is_daemonic:  # multiprocessing forbids children of a daemon, which might outlive it; these end with it
        caller.daemon = False
    before = signal.pthread_sigmask(signal.SIG_BLOCK, hold)
    gc.freeze()  # a collection in the child must not touch, and so copy, inherited objects
    try:
        process = multiprocessing.get_context("fork").Process(target=target, args=args, name=name)
        ends_with_this_one = True
        process.start()
    finally:
        ends_with_this_one = False
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_daemonic:
            caller.daemon = True
    return process


def end_copy(process: int) -> None:
    """End this process if it is not `process`: then the user's code has forked, and returned in the child as well. The
    child would repeat whatever follows, in memory and over connections that belong to `process`."""
    if os.getpid() == process:
        return
    told = (
        f"unisono: process {process} was forked by the code of the task or the data, and the child {os.getpid()} "
        "returned from that code. Only the parent goes on; the child has been ended. After os.fork(), end the child "
        "with os._exit(0) where its work is done.\n"
    )
    os.write(2, told.encode())
    os._exit(os.EX_SOFTWARE)  # no clean-up of what belongs to the parent


def flush_output() -> None:
    """Flush standard output and standard error. Either may be an object that cannot be flushed."""
    for stream in (sys.stdout, sys.stderr):
        if flush := getattr(stream, "flush", None):
            flush()


def is_terminal(stream: object) -> bool:
    """Whether a stream is a terminal. A replacement of standard output may only have `write`."""
    ask = getattr(stream, "isatty", None)
    return ask is not None and bool(ask())


def end_with_parent(parent: int) -> None:
    """Make the system kill this process when process `parent` ends; call it first in a child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the line above


def count_cores(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """How many cores this process may use: those of its affinity, at most its containers' CPU quota, rounded up.

    cgroups: where the control groups are mounted, in version 1 or 2. membership: the file that names this process's
    groups.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in _read_quotas(cgroups, membership)]
    return max(1, min([cores, *quotas]))


def _read_quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """The CPU quotas, in cores, of this process's control group and of those around it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux, or no /proc
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / controllers
        if controllers and not root.is_dir():
            root = cgroups / "cpu"  # as some systems mount it
        inner = root / place.strip("/")
        for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(root))):
            with suppress(OSError, ValueError):  # the file is absent, or holds "max"
                if controllers:
                    quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))  # −1: none
                    period = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
                else:
                    quota, period = map(int, (folder / "cpu.max").read_text(encoding="ascii").split())
                if quota > 0 and period > 0:
                    yield quota / period


def describe_end(code: int) -> str:
    """How a process ended, from its exit code: "was killed by SIGKILL" or "ended with exit code 3"."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def forget_kernel_buffers() -> None:
    """Make MKL free its buffers, which it lists by thread; call it before forking.

    A forked process that inherits the list of several threads may search it forever in its first matrix product.
    """
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if library.exists():
        free = getattr(
            ctypes.CDLL(str(library)), "mkl_serv_free_buffers", None
        )  # absent where torch is built without MKL
        if free is not None:
            free()


def rest_threads() -> None:
    """End the threads of OpenMP here; call it before forking a process that will use several threads.

    GNU's OpenMP does not notice that a fork copies no threads, and the child would wait for them forever. The threads
    start again with the next kernel.
    """
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library["user_api"] == "openmp":
            pause = getattr(ctypes.CDLL(library["filepath"]), "omp_pause_resource_all", None)  # since OpenMP 5.0
            if pause is not None:
                pause(OMP_PAUSE_HARD)
