"""The state of a process that a training borrows: kept before the training, and restored after it.

A worker process may be left in any state; the process of a caller may not. Owns what is kept: everything that
`numerics.settle`, the seeding of generators and the layout of a module change.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from unisono.engine import numerics
from unisono.processes.forking import rest_threads


@contextmanager
def preserved() -> Iterator[None]:
    """Within, the process may be put into any known state; afterwards it is as before.

    The present thread's flush-to-zero, number of threads, autocast and gradient mode; torch's deterministic mode,
    matmul precision and default dtype; the generators of torch, CUDA, NumPy and Python.
    """
    settings, generators = numerics.Settings(), _Generators()
    rest_threads()  # those at work keep the flush-to-zero that they were started with
    try:
        with torch.inference_mode(False), torch.enable_grad():
            numerics.reset_modes()
            yield
    finally:
        settings.restore()
        generators.restore()
        rest_threads()


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
