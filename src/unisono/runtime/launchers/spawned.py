"""The main of a spawned worker: it opens what its parent has prepared for it, and is a worker like any other.

Owns the reading of a `spawn.Payload`. What is read comes from the parent of this process, through a file that only its
children have inherited.
"""

from __future__ import annotations

import mmap
import multiprocessing
import multiprocessing.spawn
import os
from collections.abc import Mapping
from typing import Any

import torch

from unisono.errors import RecipeError
from unisono.parallel.wire import Unreadable, unpack
from unisono.runtime.launchers.fork import ActSpec, serve_act
from unisono.runtime.supervised_worker import WorkerSpec, serve


def main(told: Mapping[str, Any]) -> None:
    """Run a worker, to its end. told: the values that `spawn.Spawn` passes."""
    if told["kind"] == "worker":
        spec = WorkerSpec.from_plain(told["spec"])
        for file in spec.descriptors():
            os.set_inheritable(file, False)
        serve(spec, lambda: open_payload(told["payload"]))
    else:
        serve_act(ActSpec.from_plain(told["spec"]), lambda: open_payload(told["payload"]))


def open_payload(told: Mapping[str, Any]) -> Any:
    """The value of a payload. Its arrays lie in the payload's memory; changes to them stay in this process.

    Raises:
        RecipeError: it cannot be put together here.
    """
    torch.set_default_dtype(getattr(torch, told["dtype"]))
    if told["main"]:
        _import_main(told["main"])
    file = told["file"]
    size = os.fstat(file).st_size
    memory = memoryview(mmap.mmap(file, size, access=mmap.ACCESS_COPY))
    os.close(file)
    buffers = [memory[begin : begin + length] for begin, length in told["ranges"]]
    begin, length = told["content"]
    (value,) = unpack(memory[begin : begin + length], told["chunks"], buffers)
    if isinstance(value, Unreadable):
        error = value.error
        raise RecipeError(
            f'launcher "spawn": the task cannot be put together in a fresh interpreter: {type(error).__name__}: '
            f"{error}. A class must be importable there: define it at the top of a module, and not in a function or an "
            "interactive session."
        )
    return value


def _import_main(described: Mapping[str, Any]) -> None:
    """Import the parent's script under another name, as multiprocessing does; refuse to start processes
    meanwhile."""
    process = multiprocessing.current_process()
    process._inheriting = True  # type: ignore[attr-defined]
    try:
        multiprocessing.spawn.prepare(dict(described))
    finally:
        del process._inheriting  # type: ignore[attr-defined]
