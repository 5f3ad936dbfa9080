"""The process of a supervised worker: it takes a rank assignment and works. When its group of workers is dissolved, it
drops the unfinished step and takes another assignment.

Owns the worker's end of the channel. The work itself is passed in; `supervisor.py` watches the process.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from unisono.engine import numerics
from unisono.engine.state import TrainState
from unisono.errors import LostPeerError
from unisono.exchange.protocol import Exchange
from unisono.exchange.watched import Watched
from unisono.processes.fault_injection import Fault, parse
from unisono.processes.forking import end_with_parent, flush_output
from unisono.processes.limits import explain
from unisono.processes.progress_table import FINISH, PHASES, RUNNING, ProgressTable, ProgressWriter
from unisono.runtime.background_writer import BackgroundWriter
from unisono.runtime.channel import Channel
from unisono.runtime.launchers.rank_assignment import RankAssignment, receive_assignment
from unisono.runtime.signals import ASKING
from unisono.runtime.supervisor_client import SupervisorClient
from unisono.runtime.worker import guarded, keep_memory
from unisono.tracking import events

DUMP = signal.SIGUSR2
"""Makes a worker write all its stacks, whatever it is doing."""


class Workload(Protocol):
    """The work of a supervised worker; `runner.Runner` is one."""

    def warm(self, device: torch.device, workers: int, client: SupervisorClient) -> None:
        """Prepare what needs no other worker."""
        ...

    def train(
        self,
        exchange: Exchange,
        device: torch.device,
        client: SupervisorClient,
        *,
        local_rank: int,
        local_workers: int,
        again: bool,
    ) -> bool:
        """Take part in a group of workers, the first one or `again`; return whether all is done; false: another group
        goes on."""
        ...


_PLAIN = ("slot", "memory", "threads", "device", "workers", "parent")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What a worker's process gets at its start. memory: file of the run's snapshot. workers: their number. report,
    stacks: unnamed files, for the error that it raises, and for its stacks. inherited: of other workers, what a copy
    of the supervisor has to close."""

    slot: int
    channel: Channel
    progress_table: ProgressTable
    memory: int
    threads: int
    device: str
    workers: int
    report: TextIO
    stacks: TextIO
    parent: int
    faults: tuple[Fault, ...] = ()
    inherited: tuple[Channel | TextIO, ...] = ()

    def descriptors(self) -> list[int]:
        """The files that its process must have inherited."""
        files = (self.channel, self.progress_table, self.report, self.stacks)
        return [*(file.fileno() for file in files), *([self.memory] if self.memory >= 0 else [])]

    def plain(self) -> dict[str, Any]:
        """The same in plain values, for a process that has inherited the descriptors."""
        values = {name: getattr(self, name) for name in _PLAIN}
        files = {name: getattr(self, name).fileno() for name in ("channel", "progress_table", "report", "stacks")}
        return values | files | {"rows": self.progress_table.rows, "faults": [str(fault) for fault in self.faults]}

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> WorkerSpec:
        """What `plain` has described, in the process that has inherited it."""
        report, stacks = (
            os.fdopen(values[name], "w+", encoding="utf-8", errors="replace") for name in ("report", "stacks")
        )
        return WorkerSpec(
            channel=Channel(socket.socket(fileno=values["channel"])),
            progress_table=ProgressTable(values["rows"], values["progress_table"]),
            report=report,
            stacks=stacks,
            faults=tuple(parse(fault, PHASES) for fault in values["faults"]),
            **{name: values[name] for name in _PLAIN},
        )


class SupervisedClient:
    """The supervisor client of a supervised worker."""

    def __init__(self, spec: WorkerSpec, progress_writer: ProgressWriter) -> None:
        self.progress: ProgressWriter = progress_writer
        self.memory = spec.memory
        self._channel = spec.channel
        self._progress_table = spec.progress_table
        self._told = 0  # events
        # without a snapshot, the worker has to write checkpoints itself
        self._writer = BackgroundWriter(self.tell) if spec.memory < 0 else None

    @property
    def prepared(self) -> bool:
        return self._progress_table.prepared

    @prepared.setter
    def prepared(self, done: bool) -> None:
        self._progress_table.prepared = done

    def request(self) -> int:
        if self.progress.rank == 0 and self._progress_table.observers_first:
            self.progress.wait_until_heard(self._told)
        request = self._progress_table.request
        return RUNNING if request == FINISH and self.progress.rank else request  # only worker 0 looks in time

    def tell(self, event: events.Event) -> None:
        self._told += 1
        self._channel.send({"event": type(event).__name__, "fields": dataclasses.asdict(event)})

    def save(self, state: TrainState, facts: Mapping[str, Any], folder: Path, keep: int) -> None:
        if self._writer is not None:
            self._writer.save(state, facts, folder, keep)
            return
        if state.exchange.rank == 0:
            self._ask("save")
        state.optimizer.arrays.pin()

    def settle(self) -> bool:
        if self._writer is not None:
            return self._writer.settle()
        return bool(self._ask("settle")["written"]) if self.progress.rank == 0 else True

    def close(self) -> None:
        """Finish what this worker writes itself."""
        if self._writer is not None:
            self._writer.close()

    def _ask(self, what: str) -> dict[str, Any]:
        self._channel.send({"ask": what})
        return self._channel.receive()[0]


def serve(spec: WorkerSpec, open_workload: Callable[[], Workload]) -> None:
    """Serve as a worker, until all is done or the supervisor releases it."""
    end_with_parent(spec.parent)
    for one in spec.inherited:
        one.close()
    gc.freeze()  # inherited objects are never garbage: a collection after a loss need not visit them
    faulthandler.enable(spec.stacks)
    faulthandler.register(DUMP, spec.stacks, all_threads=True)
    for signum in ASKING:  # a terminal or Slurm sends them to all; the supervisor answers
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    code = guarded(lambda: _serve(spec, open_workload()), spec.report.write, spec.slot)
    spec.report.flush()
    flush_output()
    os._exit(code)  # no clean-up of what was inherited from the parent


def _serve(spec: WorkerSpec, workload: Workload) -> None:
    progress_writer = spec.progress_table.progress_writer(spec.slot, spec.faults)
    client = SupervisedClient(spec, progress_writer)
    progress_writer.at("start")
    keep_memory()
    place = RankAssignment(rank=spec.slot, workers=spec.workers, local_rank=spec.slot, local_workers=spec.workers)
    device = place.device(spec.device)
    numerics.settle(threads=spec.threads, device=device)
    workload.warm(device, spec.workers, client)
    why = ""
    _leave_group(progress_writer)
    while True:
        spec.channel.send({"waiting": why})
        assignment = receive_assignment(spec.channel)
        if assignment is None:
            return
        try:
            if _take_part(assignment, progress_writer, workload, device, client):
                break
            why = ""
        except LostPeerError as error:
            why = str(error)
        except BaseException:
            client.close()
            raise
        _leave_group(progress_writer)
        gc.collect()  # the last group's memory, before the next one's is made; it may take longer than a step
    client.close()


def _leave_group(progress_writer: ProgressWriter) -> None:
    """Wait for a rank assignment, in no group. A waiting worker never counts as hung."""
    progress_writer.assignment(-1, -1)
    progress_writer.at("wait")


def _take_part(
    assignment: RankAssignment,
    progress_writer: ProgressWriter,
    workload: Workload,
    device: torch.device,
    client: SupervisorClient,
) -> bool:
    """Work in one group of workers. Return whether all is done; false: another group goes on."""
    progress_writer.assignment(assignment.rank, assignment.generation)
    progress_writer.at("join")
    progress_writer.enter("join")
    try:
        exchange: Exchange = Watched(assignment.join(device), progress_writer)
    except RuntimeError as error:  # the error of a store or a backend when others do not come
        if explain(error):
            raise
        raise LostPeerError(f"the workers could not meet: {error}") from error
    progress_writer.leave()
    try:
        return workload.train(
            exchange,
            device,
            client,
            local_rank=assignment.local_rank,
            local_workers=assignment.local_workers,
            again=assignment.generation > 1,
        )
    finally:
        with suppress(RuntimeError):  # a backend's error for a broken connection; the group has ended anyway
            exchange.close()
