"""Workers as fresh interpreters of this host: for a process that has used a GPU, or has threads that no fork survives.

What a worker needs of this process (a task and its data; of a recipe, only the recipe) is taken apart by
`parallel/wire.py` and lies in an unnamed memory file: its pickle and, beside it, the buffers of its arrays, which all
workers map and none copies. Only this process's own children inherit the file; nothing of it reaches a disk or a
network. Everything else is inherited descriptors and plain values.

Owns the file, and the error message for a value that cannot be sent. `spawned.py` is the side of the new processes.
"""

from __future__ import annotations

import dataclasses
import multiprocessing.spawn
import os
from collections.abc import Mapping
from typing import Any

import torch

from unisono.engine.snapshot import new_file
from unisono.errors import RecipeError
from unisono.parallel.wire import Packer
from unisono.processes.spawning import SpawnedProcess
from unisono.runtime.launchers.fork import ActSpec, launch, supervise
from unisono.runtime.launchers.launcher import Training, count_workers
from unisono.runtime.supervised_worker import WorkerSpec, Workload
from unisono.runtime.worker import Act

SPAWNED = "unisono.runtime.launchers.spawned"
ALIGNED = 64  # bytes; kernels' bits may depend on where an array begins
CHUNK_BYTES = 1 << 30  # one system call writes less than 2 GB
MOST_DEPTH = 8
_MAIN = ("init_main_from_name", "init_main_from_path", "sys_argv", "dir")


class Spawn:
    """Launches fresh interpreters."""

    def count(self, wanted: str | int, microbatches: int, device: str) -> int:
        """As wanted; "auto": all GPUs, else all cores."""
        return count_workers(wanted, microbatches, device)

    def train(self, training: Training) -> None:
        """Train under a supervisor, which brings the run through losses of workers."""
        with Payload(training.runner) as payload:

            def start(spec: WorkerSpec, workload: Workload) -> SpawnedProcess:
                if spec.progress_table.fileno() < 0:
                    raise _refuse_files()
                value = {"kind": "worker", "spec": spec.plain(), "payload": payload.told}
                return SpawnedProcess(SPAWNED, value, [*spec.descriptors(), payload.file])

            supervise(training, start)

    def run(self, act: Act, *, workers: int, threads: int, device: str) -> bool:
        """Run `act` in each; this process reports for them."""
        with Payload(act) as payload:

            def start(spec: ActSpec, act: Act) -> SpawnedProcess:
                files = [payload.file, spec.channel.fileno()]
                return SpawnedProcess(SPAWNED, {"kind": "act", "spec": spec.plain(), "payload": payload.told}, files)

            launch(workers, act, threads=threads, device=device, start=start)
        return True


class Payload:
    """A value in a memory file, for `spawned.open_payload`. `told`: the plain values that it needs.

    Raises:
        RecipeError: a part of the value cannot be sent; says which.
    """

    def __init__(self, value: object) -> None:
        self.file = new_file()
        if self.file < 0:
            raise _refuse_files()
        self._size = 0
        self._ranges: list[tuple[int, int]] = []
        try:
            packer = Packer(self._keep)
            try:
                packer.add(value)
            except Exception as error:
                raise _refuse(value, error) from error
            content, chunks = packer.finish()
            self.told: Mapping[str, Any] = {
                "file": self.file,
                "content": self._write(content),
                "chunks": chunks.tolist(),
                "ranges": self._ranges,
                "main": _describe_main() if b"__main__" in bytes(content) else {},
                "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
            }
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> Payload:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.file)

    def _keep(self, content: memoryview) -> bool:
        self._ranges.append(self._write(content))
        return True

    def _write(self, content: memoryview) -> tuple[int, int]:
        """Append bytes; return their offset and their number."""
        content = content.cast("B")
        begin = -(-self._size // ALIGNED) * ALIGNED
        written = 0
        while written < len(content):
            written += os.pwrite(self.file, content[written : written + CHUNK_BYTES], begin + written)
        self._size = begin + written
        return begin, written


def _describe_main() -> dict[str, Any]:
    """How a fresh interpreter finds what this one's script defines: it imports the script, under another name.

    Raises:
        RecipeError: there is no file to import.
    """
    found = multiprocessing.spawn.get_preparation_data("worker")
    if not any(name.startswith("init_main") for name in found):
        raise RecipeError(
            'launcher "spawn": the task, or what belongs to it, is defined in an interactive session, which a fresh '
            "interpreter cannot import. Put it into a module (a .py file), or use workers = 1, or the launcher "
            '"fork" before this process uses a GPU.'
        )
    return {name: found[name] for name in _MAIN if name in found}


def _refuse(value: object, error: Exception) -> RecipeError:
    where = find_unsendable(value)
    return RecipeError(
        f'launcher "spawn": {where or "the task"} cannot be sent to a fresh interpreter: {type(error).__name__}: '
        f"{error}. Allowed is what Python can pickle: classes and functions that a module defines at its top, and "
        'plain values. Move it there, make it in the task\'s build(), or use the launcher "fork" or "in_process".'
    )


def _refuse_files() -> RecipeError:
    return RecipeError(
        'launcher "spawn": this system has no memory files, or limits the size of files (ulimit -f), which holds for '
        'them. Lift the limit, or use the launcher "fork" or "in_process".'
    )


def find_unsendable(value: object) -> str:
    """The innermost part of a value that cannot be sent, as attributes and keys from the outside in: "task.scale"."""
    names: list[str] = []
    for _ in range(MOST_DEPTH):
        found = next(((name, part) for name, part in _parts(value) if not _is_sendable(part)), None)
        if found is None:
            break
        name, value = found
        names.append(name)
    return ".".join(name for name in names if not name.startswith("_"))


def _parts(value: object) -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [(repr(key), part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(str(number), part) for number, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).items()) if not isinstance(value, type) else []


def _is_sendable(value: object) -> bool:
    packer = Packer(lambda content: True)
    try:
        packer.add(value)
    except Exception:  # noqa: BLE001 - a user's class
        return False
    return True
