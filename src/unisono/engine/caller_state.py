"""The state of a process that a training borrows: kept before the training, and restored after it.

A worker process may be left in any state; the process of a caller may not. Owns what is kept: everything that
`numerics.settle`, the seeding of generators and the layout of a module change.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from unisono.processes.forking import rest_threads

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_DEVICES = ("cpu", "cuda")


@contextmanager
def preserved(*, threads: int) -> Iterator[None]:
    """Within, the process may be put into any known state; afterwards it is as before. `threads`: those that compute.

    The present thread's flush-to-zero, number of threads, autocast and gradient mode; torch's deterministic mode,
    matmul precision and default dtype; the generators of torch, CUDA, NumPy and Python.
    """
    settings, generators = _Settings(), _Generators()
    several = threads > 1
    if several:
        rest_threads()  # those at work keep the flush-to-zero that they were started with
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for device in _DEVICES:
                torch.set_autocast_enabled(device, False)
            yield
    finally:
        settings.restore()
        generators.restore()
        if several:
            rest_threads()


class _Settings:
    """Everything that `numerics.settle` sets, and what a task may set."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._flushes = bool((torch.full((1,), 1e-38, dtype=torch.float32) * 1e-3 == 0).all())
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        self._fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        self._benchmark = torch.backends.cudnn.benchmark
        self._precision = torch.get_float32_matmul_precision()
        self._dtype = torch.get_default_dtype()
        self._autocast = {device: torch.is_autocast_enabled(device) for device in _DEVICES}
        self._workspace = os.environ.get(CUBLAS)
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        torch.set_flush_denormal(self._flushes)
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        torch._C._set_deterministic_algorithms(self._deterministic, warn_only=self._warns_only)
        torch.utils.deterministic.fill_uninitialized_memory = self._fills  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = self._benchmark
        torch.set_float32_matmul_precision(self._precision)
        torch.set_default_dtype(self._dtype)
        for device, enabled in self._autocast.items():
            torch.set_autocast_enabled(device, enabled)
        if self._workspace is None:
            os.environ.pop(CUBLAS, None)
        if self._device is not None:
            torch.cuda.set_device(self._device)


class _Generators:
    """The global generators."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)
        random.setstate(self._python)
