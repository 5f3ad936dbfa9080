"""Forked processes, and what they and their parent need to know of each other.

Owns what every kind of worker has in common, whether it trains or maps: it begins as a copy of its parent, ends with
it at the latest, and how it ended can be told in words. Decides nothing about who is started or replaced.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
OMP_PAUSE_HARD = 2


def fork(target: Callable[..., None], args: tuple[Any, ...], name: str, hold: Collection[int] = ()) -> BaseProcess:
    """Start a copy of this process that runs `target`.

    Signals in `hold` wait in the child until it unblocks them: what was meant for the parent must not reach it before
    it listens.
    """
    process = multiprocessing.get_context("fork").Process(target=target, args=args, name=name)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, hold)
    gc.freeze()  # a collection in the child must not touch, and so copy, what it has inherited
    try:
        process.start()
    finally:
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def end_with_parent(parent: int) -> None:
    """To be called first in a child: have the system kill it when process `parent` ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the line above


def count_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_end(code: int) -> str:
    """How a process ended, from its exit code: "was killed by SIGKILL" or "ended with exit code 3"."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def forget_kernel_buffers() -> None:
    """To be called before forking: make MKL free its buffers, which it lists by thread.

    A forked process that inherits the list of several threads may search it for ever in its first matrix product.
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
    """To be called before forking a process that will use several threads: end those of OpenMP here.

    GNU's does not know that a fork copies no threads, and the child would wait for them for ever. They begin again with
    the next kernel.
    """
    from threadpoolctl import threadpool_info

    for library in threadpool_info():
        if library["user_api"] == "openmp":
            pause = getattr(ctypes.CDLL(library["filepath"]), "omp_pause_resource_all", None)  # since OpenMP 5.0
            if pause is not None:
                pause(OMP_PAUSE_HARD)
