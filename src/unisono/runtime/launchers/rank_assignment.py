"""A worker's place among the others, and how it joins them.

Owns rank and the address of the meeting point. Under torchrun both come from its environment; where torch.distributed
is initialised, from its process group; a local launcher hands out rank assignments.
"""

from __future__ import annotations

import itertools
import os
import socket
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypedDict

import torch
import torch.distributed as dist

from unisono.errors import UnisonoError
from unisono.exchange.protocol import Exchange
from unisono.exchange.solo import Solo
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
    """A worker's rank in its group, and where the group meets. `listener` is the file descriptor of the socket on which
    worker 0 lets the others meet, at `port` (0: under torchrun, which has its own meeting point). `in_group`: the
    workers are those of the process group that is initialised here. `generation` counts the groups of workers of a
    supervisor, or torchrun's restarts."""

    rank: int
    workers: int
    local_rank: int
    local_workers: int
    port: int = 0
    listener: int = -1
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
            devices.agree(self._store(), self.rank, self.workers, devices.Told(fault=why))

    def join(self, device: torch.device) -> Exchange:
        """Meet the other workers.

        Raises:
            RecipeError: they do not compute on one kind of device, each on its own.
        """
        if self.workers == 1:
            return Solo(device)
        from unisono.exchange.distributed import Distributed
        from unisono.exchange.shared_memory import Shared, can_share

        store = self._store()
        devices.agree(store, self.rank, self.workers, devices.describe(device))
        here = self.local_workers == self.workers and device.type == "cpu"
        place: _Place = {
            "rank": self.rank,
            "workers": self.workers,
            "timeout_seconds": TIMEOUT_SECONDS,
            "generation": self.generation,
        }
        if here and can_share(store, self.rank, self.workers):
            return Shared(store, **place)
        return Distributed(None if self.in_group else store, device=device, **place)

    def _store(self) -> dist.Store:
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        if self.in_group:
            return _store_of_group()
        if self.port:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # on one host a name that does not resolve need not stop gloo
            return dist.TCPStore(
                "127.0.0.1",
                self.port,
                self.workers,
                is_master=self.rank == 0,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=self.listener if self.rank == 0 else None,
            )
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
