"""Workers as actors of a Ray cluster: an existing cluster, or one on this host for the time of the call.

Owns the actors. Functions, items and results go through Ray's object store, in Ray's own serialisation, with large
buffers out of band. Both sides copy the buffers of items and results, so nothing keeps the store in use, and arrays can
be written to, as with local processes. Arrays that the function refers to lie in the store, where a host's workers
share them, and cannot be written to. Workers are processes with a memory of their own, on other hosts: unisono, and
everything that the function imports, must be installed there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from unisono.errors import ParallelError, WorkerError
from unisono.parallel.connection import HASH_SEED, connection, import_ray, is_open
from unisono.parallel.item_batches import ItemBatch, ItemFault, MapJob, Outcome, settle
from unisono.parallel.outcomes import pack_items, perform, restore
from unisono.parallel.wire import Packer, reduce, unpack
from unisono.processes.forking import count_cores

FRUITLESS = 5
"""The number of actors in a row that ended before they were ready, at which a call ends."""

LOOK_SECONDS = 0.02  # between an actor's two checks of a task that may take too long

Sent = tuple[bytes, array, list[np.ndarray]]  # values as `wire` packs them: body, chunks, buffers


class Ray:
    """The engine: actors of a Ray cluster, each with one CPU of it.

    address: of an existing cluster ("auto", "host:port", "ray://host:port"). None: the cluster to which this process is
        connected; without a connection, one on this host, with a CPU for each worker and without telemetry, is started
        and shut down again.
    token: the cluster's authentication token. None: what Ray finds by its own rules (RAY_AUTH_TOKEN,
        RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token); a cluster started here gets a new one if there is none.

    Raises:
        ParallelError: Ray is not installed or too old, there is no such cluster, or it refuses the token.
    """

    inherits = False

    def __init__(self, address: str | None = None, token: str | None = None) -> None:
        for name, value in (("address", address), ("token", token)):
            if value is not None and not (isinstance(value, str) and value):
                raise ParallelError(f"parallel.Ray: {name} = {value!r}: allowed are texts, or None.")
        self._address, self._token = address, token

    def count(self, workers: int | str) -> int:
        """One per CPU of the cluster."""
        if workers != "auto":
            return int(workers)
        if self._address is None and not is_open():
            return count_cores()
        connection.open(self._address, self._token, 1)
        try:
            return max(int(import_ray().cluster_resources().get("CPU", 1)), 1)
        finally:
            connection.close()

    def start(self, job: MapJob, workers: int, timeout_seconds: float | None) -> RayPool:
        """Start the actors; returns when the first one is ready."""
        connection.open(self._address, self._token, workers)
        try:
            return RayPool(job, workers, timeout_seconds)
        except BaseException:
            connection.close()
            raise


class RayPool:
    """A call's actors."""

    def __init__(self, job: MapJob, workers: int, timeout_seconds: float | None) -> None:
        ray = self._ray = import_ray()
        self._actors: list[_Actor] = []
        self._fruitless = 0
        self._bytes: dict[int, int] = {}
        try:
            self._job = ray.put(job)
        except Exception as error:
            raise ParallelError(
                f"the function cannot be sent to a Ray cluster: {error!r}. Give one that refers to nothing that stays "
                "in its process, such as open files, locks, sockets; or use engine = 'processes'."
            ) from error
        seed = {} if connection.seeded else {"env_vars": {HASH_SEED: os.environ.get(HASH_SEED, "0")}}
        self._class = ray.remote(_RayWorker).options(num_cpus=1, max_restarts=0, runtime_env=seed)
        self._timeout_seconds = timeout_seconds
        try:
            for _ in range(workers):
                self._hire()
            while not any(actor.ready for actor in self._actors):
                self._welcome(1.0)
        except BaseException:
            self._dismiss()
            raise

    def capacity(self, ahead: bool) -> int:
        """One batch for each idle actor; with `ahead`, one more for each. An actor counts from when it is ready."""
        return sum(max(0, 1 + ahead - len(actor.batches)) for actor in self._actors if actor.ready)

    def submit(self, batch: ItemBatch) -> list[ItemFault]:
        """Send a batch to the actor with the least to do."""
        actor = min((actor for actor in self._actors if actor.ready), key=lambda actor: len(actor.batches))
        buffers: list[np.ndarray] = []
        packer = Packer(_keep_in(buffers), make_pickler)
        numbers, faults = pack_items(batch, packer.add)
        body, chunks = packer.finish()
        sent: Sent = (bytes(body), chunks, buffers)
        self._bytes[batch.id] = _count_bytes(sent)
        actor.batches.append((batch, actor.handle.perform.remote(batch.id, numbers, sent)))
        return faults

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """Receive what has arrived."""
        self._welcome(0.0 if any(actor.ready for actor in self._actors) else 1.0)
        flying = {actor.batches[0][1]: actor for actor in self._actors if actor.batches}
        if not flying:
            return []
        done, _ = self._ray.wait(list(flying), num_returns=1, timeout=seconds)
        if done:
            done, _ = self._ray.wait(list(flying), num_returns=len(flying), timeout=0)
        outcomes: list[Outcome] = []
        for reference in done:
            outcomes += self._take(flying[reference], reference)
        return outcomes

    def close(self, at_once: bool) -> None:
        """End all actors, and a cluster that was started for them."""
        self._dismiss()
        connection.close()

    def _take(self, actor: _Actor, reference: Any) -> list[Outcome]:
        try:
            sent: Sent = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return self._replace(actor, _tell_end(error))
        actor.batches.popleft()
        outcome = restore(_unpack(sent))
        outcome.bytes_ = self._bytes.pop(outcome.id) + _count_bytes(sent)
        return [outcome] + (self._replace(actor, "") if outcome.late else [])

    def _replace(self, actor: _Actor, how: str) -> list[Outcome]:
        """Report an actor that has ended, or that is ended now since it is late; start another."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle)
        self._hire()
        outcomes = []
        for place, (batch, _) in enumerate(actor.batches):
            self._bytes.pop(batch.id, None)
            first = how and place == 0  # later ones were not begun
            at = batch.numbers[0] if first and len(batch.numbers) == 1 else -1
            loss = how or "was ended for another task"
            outcomes.append(Outcome(id=batch.id, loss=loss, at=at, late=not how, suspect=bool(first)))
        return outcomes

    def _hire(self) -> None:
        self._actors.append(_Actor(self._class.remote(sys.path, self._timeout_seconds), self._job))

    def _welcome(self, seconds: float) -> None:
        """Note which actors have become ready, or ended before that; wait for the first of them for a limited time."""
        new = {actor.beginning: actor for actor in self._actors if not actor.ready}
        if not new:
            return
        done, _ = self._ray.wait(list(new), num_returns=1, timeout=seconds)
        if done:
            done, _ = self._ray.wait(list(new), num_returns=len(new), timeout=0)
        for reference in done:
            try:
                self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                self._fruitless += 1
                if self._fruitless >= FRUITLESS:
                    raise WorkerError(
                        f"{FRUITLESS} Ray actors in a row ended before they were ready; the last one "
                        f"{_tell_end(error)}. Is unisono installed on the cluster's hosts, and all that the function "
                        f"imports?\n{error}"
                    ) from error
                self._replace(new[reference], "")
            else:
                self._fruitless = 0
                new[reference].ready = True

    def _dismiss(self) -> None:
        for actor in self._actors:
            with suppress(Exception):  # the connection may be lost
                self._ray.kill(actor.handle)
        self._actors.clear()


class _Actor:
    """An actor, on its caller's side."""

    def __init__(self, handle: Any, job: Any) -> None:
        self.handle = handle
        self.beginning = handle.begin.remote(job)
        self.ready = False
        self.batches: deque[tuple[ItemBatch, Any]] = deque()


class _RayWorker:
    """An actor, on its own side."""

    def __init__(self, path: list[str], timeout_seconds: float | None) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]  # before anything of the caller's is imported
        self._timeout_seconds = timeout_seconds
        self._board = [-1, 0]  # the running task (−1: none), its start (nanoseconds)

    def begin(self, job: MapJob) -> None:
        """Receive the function; returns when it has arrived."""
        self._job = job
        settle(job.threads)

    def perform(self, id_: int, numbers: list[int], sent: Sent) -> Sent:
        """Run a batch."""
        if self._timeout_seconds is None:
            return self._perform(id_, numbers, sent)
        results: list[Sent] = []
        work = threading.Thread(target=lambda: results.append(self._perform(id_, numbers, sent)), daemon=True)
        work.start()
        while work.is_alive():
            work.join(LOOK_SECONDS)
            at, since = self._board
            if at >= 0 and time.monotonic_ns() - since > self._timeout_seconds * 1e9:
                return _pack_alone(Outcome(id=id_, loss="was ended", at=at, late=True))
        return results[0]

    def _perform(self, id_: int, numbers: list[int], sent: Sent) -> Sent:
        buffers: list[np.ndarray] = []
        packer = Packer(_keep_in(buffers, copy=True), make_pickler)
        perform(self._job, ItemBatch(id=id_, numbers=numbers, items=_unpack(sent)), self._board, packer.add)
        body, chunks = packer.finish()
        return bytes(body), chunks, buffers


def make_pickler(*arguments: Any, **settings: Any) -> Any:
    """Ray's pickler, which includes classes and functions of the user's script, with the form of `wire` for arrays."""
    from ray.cloudpickle import CloudPickler

    class Pickler(CloudPickler):
        def reducer_override(self, value: Any) -> Any:
            reduced = reduce(value)
            return super().reducer_override(value) if reduced is NotImplemented else reduced

    return Pickler(*arguments, **settings)


def _keep_in(buffers: list[np.ndarray], copy: bool = False) -> Any:
    """Takes buffers. Without a copy, they are sent as they are when the list is sent."""

    def keep(content: memoryview) -> bool:
        buffers.append(np.array(content, np.uint8) if copy else np.frombuffer(content, np.uint8))
        return True

    return keep


def _unpack(sent: Sent) -> list[Any]:
    body, chunks, buffers = sent
    return unpack(body, chunks, [np.array(content) for content in buffers])


def _pack_alone(outcome: Outcome) -> Sent:
    packer = Packer(lambda content: False)
    packer.add(outcome)
    body, chunks = packer.finish()
    return bytes(body), chunks, []


def _count_bytes(sent: Sent) -> int:
    return len(sent[0]) + sum(content.nbytes for content in sent[2])


def _tell_end(error: Exception) -> str:
    """How an actor ended, shortened from Ray's long message."""
    for line in str(error).splitlines():
        if "because" in line or "exit detail" in line:
            return f"ended ({line.partition('. Some common causes')[0].strip()})"
    return f"ended ({type(error).__name__})"
