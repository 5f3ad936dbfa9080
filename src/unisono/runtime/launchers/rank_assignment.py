"""A worker's place among the others, and how it joins them.

Owns rank and meeting point. Under torchrun both come from its environment; where torch.distributed is initialised, from
its process group; a local launcher hands out rank assignments, with a socket to worker 0 for each.
"""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypedDict

import torch
import torch.distributed as dist

from unisono.errors import UnisonoError
from unisono.exchange.meeting import JOIN_SECONDS, Meeting, SocketMeeting, StoreMeeting
from unisono.exchange.protocol import Exchange
from unisono.exchange.solo import Solo
from unisono.processes.limits import allow_files
from unisono.runtime.channel import Channel
from unisono.runtime.launchers import devices

TIMEOUT_SECONDS = 1800.0
_meetings = itertools.count()  # in one process group: each uses its own keys in the store


class _Place(TypedDict):
    rank: int
    workers: int
    timeout_seconds: float
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAssignment:
    """A worker's rank in its group, and where the group meets. `sockets` are file descriptors: of worker 0 to each of
    the others, of another one to worker 0; none under torchrun, which has its own meeting point. `file` is one that all
    have in common, without a name, for a store of torch.distributed where they need one. `in_group`: the workers are
    those of the process group that is initialised here. `generation` counts the groups of workers of a supervisor, or
    torchrun's restarts."""

    rank: int
    workers: int
    local_rank: int
    local_workers: int
    sockets: tuple[int, ...] = ()
    file: int = -1
    generation: int = 0
    in_group: bool = False

    def device(self, wanted: str) -> torch.device:
        """The device that the recipe requires: a GPU of this worker's own, or the CPU.

        Raises:
            RecipeError: there is none for it.
        """
        gpus = devices.count_gpus(wanted)
        return torch.device(
            devices.choose(wanted, gpus=gpus, local_rank=self.local_rank, local_workers=self.local_workers)
        )

    def refuse(self, why: str) -> None:
        """Write at the meeting point that this worker cannot come: all workers end and report the reason."""
        if self.workers > 1:
            devices.agree(self._meeting(), devices.Told(fault=why))

    def join(self, device: torch.device) -> Exchange:
        """Meet the other workers.

        Raises:
            RecipeError: they do not compute on one kind of device, each on its own.
        """
        if self.workers == 1:
            return Solo(device)
        from unisono.exchange.distributed import Distributed
        from unisono.exchange.shared_memory import Shared, can_share

        here = self.local_workers == self.workers and device.type == "cpu"
        place: _Place = {
            "rank": self.rank,
            "workers": self.workers,
            "timeout_seconds": TIMEOUT_SECONDS,
            "generation": self.generation,
        }
        allow_files(self.local_workers, refuse=False)
        meeting = self._meeting()
        try:
            devices.agree(meeting, devices.describe(device))
            if here and can_share(meeting):
                return Shared(meeting, **place)
            store = meeting.store if isinstance(meeting, StoreMeeting) else self._open_file()
            return Distributed(None if self.in_group else store, device=device, **place)
        finally:
            meeting.close()

    def _meeting(self) -> Meeting:
        if self.sockets:
            return SocketMeeting(self.sockets, self.rank)
        return StoreMeeting(self._store(), self.rank, self.workers)

    def _open_file(self) -> dist.Store:
        """A store in the common file. The file stays open, since a group may use its store at any time."""
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # on one host: gloo would look up the host's name, and listen to others
        store = dist.FileStore(f"/proc/self/fd/{os.dup(self.file)}", self.workers)
        store.set_timeout(timedelta(seconds=JOIN_SECONDS))
        return store

    def _store(self) -> dist.Store:
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        if self.in_group:
            return _store_of_group()
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UnisonoError(
                f"cannot meet the other workers at {address}: {error}. If the port is in use, give torchrun "
                "another --master-port."
            ) from error
        # the agent's store outlives its workers: keys from before a restart must not be read again
        return dist.PrefixStore(f"unisono-{self.generation}", store)


def give_assignments(channels: Sequence[Channel], generation: int = 0) -> None:
    """Give the workers of this host, which all wait, their rank assignments: by rank, as in `receive_assignment`."""
    workers, ends = len(channels), []
    with tempfile.TemporaryFile() as file:
        for rank in [*range(1, workers), 0]:
            place = {"rank": rank, "workers": workers, "local_rank": rank, "local_workers": workers}
            message = {**place, "generation": generation}
            if rank > 0:
                near, far = socket.socketpair()
                ends.append(near)
                with far:
                    channels[rank].send(message, [file.fileno(), far.fileno()])
            else:
                channels[0].send(message, [file.fileno(), *(end.fileno() for end in ends)])
    for end in ends:
        end.close()


def receive_assignment(channel: Channel) -> RankAssignment | None:
    """Wait for a rank assignment, the one to use next; None: the worker is not needed any more."""
    message, descriptors = channel.receive()
    if "leave" in message:
        return None
    file, *sockets = descriptors
    return RankAssignment(**message, file=file, sockets=tuple(sockets))


def assignment_from_torchrun() -> RankAssignment | None:
    """The rank assignment in torchrun's environment; None where there is none."""
    try:
        rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank, local_workers = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except KeyError:
        return None
    return RankAssignment(
        rank=rank, workers=workers, local_rank=local_rank, local_workers=local_workers, generation=_count_restarts()
    )


def count_peers() -> int:
    """The number of workers that another program has started, with this process among them; 0: it is no worker."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    assignment = assignment_from_torchrun()
    return assignment.workers if assignment is not None else 0


def find_assignment() -> RankAssignment | None:
    """The rank of this process among workers that another program has started: in the process group that is initialised
    here, where there is one, else torchrun's. All workers must call this."""
    found = assignment_from_torchrun()
    if not (dist.is_available() and dist.is_initialized()):
        return found
    rank, workers = dist.get_rank(), dist.get_world_size()
    if found is not None and (found.rank, found.workers) == (rank, workers):
        return replace(found, in_group=True)
    store = _store_of_group()
    store.set(f"host-{rank}", socket.gethostname())
    hosts = store.multi_get([f"host-{worker}" for worker in range(workers)])
    mine = [worker for worker, host in enumerate(hosts) if host == hosts[rank]]
    return RankAssignment(
        rank=rank, workers=workers, local_rank=mine.index(rank), local_workers=len(mine), in_group=True
    )


def _store_of_group() -> dist.Store:
    """A part of the store in which the workers of the initialised process group meet, for one purpose."""
    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"unisono-{next(_meetings)}", store)


def restarted_by_torchrun() -> bool:
    """Whether torchrun's agent has started this worker again, after a loss."""
    return _count_restarts() > 0


def _count_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
