"""Processes that load a source's microbatches ahead of their use, where `take` cannot run in a thread beside the model.

    worker ── wanted microbatches, most urgent first ──▶ loader: source.take(samples, …)
           ◀── names, shapes, and a memory file ──

A loader executes "load these samples for this microbatch" and decides nothing. So no bit depends on which loader does
it, or whether a loader does it at all. The wanted microbatches may change at any time: shares of a step follow the
workers' speeds. torch's DataLoader could not follow, since it returns samples only in its sampler's order.

Owns the processes, their memory, and the message about a process that fails. The worker forks them, and they end with
it: the worker kills them when it closes the pool, and the system does when the worker ends. The worker handles signals
that request an end; a loader ignores them.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from unisono import errors
from unisono.data.source import Source
from unisono.errors import UnisonoError
from unisono.processes.forking import describe_end, end_with_parent, forget_kernel_buffers, fork

Key = tuple[int, int]
"""Numbers of a step and of a microbatch."""

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ALIGNMENT = 64  # bytes, as torch allocates: kernels may compute other bits at other addresses
JOIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A microbatch to load; the fields are arguments of `Source.take`."""

    key: Key
    samples: np.ndarray
    epoch: int = 0
    repeats: np.ndarray | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class _Loader:
    """A process, and its requests. sample: the number of the sample that it loads, or −1, in memory that it writes."""

    number: int
    process: BaseProcess
    connection: Connection
    stacks: TextIO
    sample: mmap.mmap
    asked: list[Wanted] = field(default_factory=list)


class LoaderPool:
    """`count` processes that call `source.take`. The thread that made it must close it.

    prepare: called in a thread on each microbatch that has arrived; None: no function is called.
    """

    def __init__(
        self, source: Source, count: int, prepare: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    ) -> None:
        self._source = source
        self._prepare = prepare
        self._thread = None if prepare is None else ThreadPoolExecutor(1, "unisono-prepare")
        self._plan: dict[Key, Wanted] = {}
        self._found: dict[Key, Future[dict[str, Tensor]]] = {}
        self._by_file = _makes_memory_files()
        self._asked_each = 2 if self._by_file else 1  # while it writes into a pipe, a loader reads nothing
        self._loaders: list[_Loader] = []
        sys.stdout.flush()  # or each loader would print it again
        sys.stderr.flush()
        forget_kernel_buffers()
        try:
            for number in range(count):
                self._start(number)
        except BaseException:
            self.close()
            raise

    @property
    def depth(self) -> int:
        """How many microbatches are worth a request: all loaders busy, and the same number ready for use."""
        return 2 * len(self._loaders)

    def want(self, plan: Sequence[Wanted]) -> None:
        """Set what is needed from now on, the most urgent first. A loaded microbatch that is not needed is dropped."""
        self._plan = {wanted.key: wanted for wanted in plan}
        self._found = {key: found for key, found in self._found.items() if key in self._plan}
        self._receive_all(0)
        self._hand_out()

    def result(self, key: Key) -> dict[str, Tensor]:
        """Return a wanted microbatch, as soon as it is loaded. Each can be taken once.

        Raises:
            UnisonoError: as `take` raised it.
            RuntimeError: `take` raised something else, or its process ended; names the sample, with the traceback.
        """
        while key not in self._found:
            self._receive_all(None)
            self._hand_out()
        del self._plan[key]
        return self._found.pop(key).result()

    def close(self) -> None:
        """End the processes at once."""
        for loader in self._loaders:
            loader.process.kill()
        for loader in self._loaders:
            loader.process.join()
            loader.process.close()
            loader.connection.close()
            loader.stacks.close()
            loader.sample.close()
        self._loaders, self._plan, self._found = [], {}, {}
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self, number: int) -> None:
        mine, theirs = Pipe()
        stacks = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with the rest
        sample = mmap.mmap(-1, 8)
        inherited = [mine, *(loader.connection for loader in self._loaders)]
        arguments = (self._source, theirs, inherited, stacks, sample, os.getpid(), self._by_file)
        process = fork(_serve, arguments, f"loader {number}", hold=IGNORED)
        theirs.close()
        self._loaders.append(_Loader(number=number, process=process, connection=mine, stacks=stacks, sample=sample))

    def _hand_out(self) -> None:
        """Give wanted microbatches that no loader has been given yet to the loaders with little to do."""
        taken = {wanted.key for loader in self._loaders for wanted in loader.asked} | self._found.keys()
        waiting = iter([wanted for key, wanted in self._plan.items() if key not in taken])
        for room in range(self._asked_each):
            for loader in self._loaders:
                if len(loader.asked) > room:
                    continue
                if (wanted := next(waiting, None)) is None:
                    return
                repeats = None if wanted.repeats is None else wanted.repeats.tolist()
                request = {"samples": wanted.samples.tolist(), "epoch": wanted.epoch, "repeats": repeats}
                try:
                    loader.connection.send_bytes(json.dumps(request).encode())
                except OSError:
                    self._fail(loader)
                loader.asked.append(wanted)

    def _receive_all(self, seconds: float | None) -> None:
        """Receive what has been loaded; wait for some, at most this long (None: without limit)."""
        for connection in wait([loader.connection for loader in self._loaders], seconds):
            self._receive(next(loader for loader in self._loaders if loader.connection is connection))

    def _receive(self, loader: _Loader) -> None:
        """Receive one microbatch of a loader; keep it if it is still wanted."""
        try:
            told: dict[str, Any] = json.loads(loader.connection.recv_bytes())
            if "kind" in told:
                _raise(told)
            memory = _receive_memory(loader.connection, told["bytes"], self._by_file)
        except (EOFError, OSError):
            self._fail(loader)
        wanted = loader.asked.pop(0)
        if wanted.key not in self._plan:
            return
        microbatch = {name: _open(memory, *place) for name, place in told["columns"].items()}
        if self._thread is not None and self._prepare is not None:
            self._found[wanted.key] = self._thread.submit(self._prepare, microbatch)
        else:
            self._found[wanted.key] = Future()
            self._found[wanted.key].set_result(microbatch)

    def _fail(self, loader: _Loader) -> None:
        """Raise an error with what is known about a process that has ended."""
        loader.process.join(JOIN_SECONDS)
        code = loader.process.exitcode
        sample = int.from_bytes(loader.sample[:8], sys.byteorder, signed=True)
        asked = loader.asked[0] if loader.asked else None
        at = f"sample {sample}" if sample >= 0 else f"one of the samples {asked.samples.tolist()}" if asked else ""
        where = f" while it loaded {at} of epoch {asked.epoch}" if asked else ""
        hint = " It may have been out of memory: see dmesg." if code == -signal.SIGKILL else ""
        os.lseek(loader.stacks.fileno(), 0, os.SEEK_SET)
        stacks = loader.stacks.read()
        told = f"loader {loader.number} {describe_end(code if code is not None else 0)}{where}.{hint}"
        raise RuntimeError(told + (f"\n{stacks}" if stacks else ""))


def load_in_turn(
    source: Source, pieces: Sequence[np.ndarray], loaders: int
) -> Generator[dict[str, Tensor], None, None]:
    """Yield a microbatch for each array of sample numbers, in order; with `loaders` processes that read ahead."""
    if not loaders or not len(pieces):
        yield from map(source.take, pieces)
        return
    plan = [Wanted(key=(0, number), samples=samples) for number, samples in enumerate(pieces)]
    with closing(LoaderPool(source, min(loaders, len(pieces)))) as pool:
        for number in range(len(plan)):
            pool.want(plan[number : number + pool.depth])
            yield pool.result((0, number))


# In a loader's process


def _serve(
    source: Source,
    connection: Connection,
    inherited: Sequence[Connection],
    stacks: TextIO,
    sample: mmap.mmap,
    parent: int,
    by_file: bool,
) -> None:
    """Load what the worker requests, until it closes the connection or kills this process."""
    end_with_parent(parent)
    for signum in IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    faulthandler.enable(stacks)
    for other in inherited:  # or it would stay open when the worker closes it
        other.close()
    torch.set_num_threads(1)

    def note(number: int) -> None:
        sample[:8] = number.to_bytes(8, sys.byteorder, signed=True)

    watch: Callable[[Callable[[int], None]], None] | None = getattr(source, "watch", None)
    if watch is not None:
        watch(note)
    code = 0
    try:
        while True:
            note(-1)
            request = json.loads(connection.recv_bytes())
            try:
                _answer(source, connection, request, by_file)
            except Exception as error:  # noqa: BLE001 - the worker reports whatever the user's code raises
                known = isinstance(error, UnisonoError)
                report = {"kind": type(error).__name__, "message": str(error), "known": known}
                connection.send_bytes(json.dumps(report | {"trace": traceback.format_exc()}).encode())
            sys.stdout.flush()
            sys.stderr.flush()
    except (EOFError, OSError):  # the worker has closed its end
        pass
    except BaseException:  # noqa: BLE001 - such as sys.exit in a dataset
        traceback.print_exc(file=stacks)
        stacks.flush()
        code = 1
    os._exit(code)  # no clean-up of what was inherited from the worker


def _answer(source: Source, connection: Connection, request: dict[str, Any], by_file: bool) -> None:
    samples = np.array(request["samples"], np.int64)
    if request["repeats"] is None:
        microbatch = source.take(samples, epoch=request["epoch"])
    else:
        microbatch = source.take(samples, epoch=request["epoch"], repeats=np.array(request["repeats"], np.int64))
    columns, size = {}, 0
    for name, tensor in microbatch.items():
        columns[name] = (size, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    header = json.dumps({"columns": columns, "bytes": size}).encode()
    if not by_file:
        content = np.zeros(max(size, 1), np.uint8)
        for name, tensor in microbatch.items():
            start = columns[name][0]
            content[start : start + tensor.nbytes] = _as_bytes(tensor)
        connection.send_bytes(header)
        connection.send_bytes(content.data)
        return
    file = os.memfd_create("unisono-microbatch")
    try:
        os.ftruncate(file, max(size, 1))
        for name, tensor in microbatch.items():  # a write takes half the time of mapping it and faulting its pages
            plain, done = _as_bytes(tensor).data, 0
            while done < len(plain):
                done += os.pwrite(file, plain[done:], columns[name][0] + done)
        connection.send_bytes(header)
        send_handle(connection, file, 0)
    finally:
        os.close(file)


def _as_bytes(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


# In the worker


def _receive_memory(connection: Connection, size: int, by_file: bool) -> Any:
    """The memory that a loader has filled: mapped, or read. It is freed with the last tensor in it."""
    if not by_file:
        content = torch.empty(max(size, 1), dtype=torch.uint8).numpy()
        connection.recv_bytes_into(content.data)
        return content
    file = recv_handle(connection)
    try:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        return mmap.mmap(file, max(size, 1), flags=flags)
    finally:
        os.close(file)


def _open(memory: Any, start: int, dtype: str, shape: Sequence[int]) -> Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    count = int(np.prod(shape))
    if not count:
        return torch.empty(*shape, dtype=kind)
    return torch.frombuffer(memory, dtype=kind, count=count, offset=start).view(*shape)


def _raise(report: dict[str, Any]) -> None:
    """Raise what a loader has raised: an error of unisono unchanged, others with their traceback."""
    kind = getattr(errors, report["kind"], None)
    if report["known"] and isinstance(kind, type) and issubclass(kind, UnisonoError):
        raise kind(report["message"])
    raise RuntimeError(f"a loader raised {report['kind']}: {report['message']}\n\n{report['trace']}")


def _makes_memory_files() -> bool:
    """Whether the system has memory files, and does not limit their size."""
    return hasattr(os, "memfd_create") and resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
