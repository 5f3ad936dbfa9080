"""Two kinds of worlds that a measurement alternates between: unisono's workers, and a plain gloo group for the peer.

Owns their start, the memory of unisono's snapshot, and how rank 0 hands back its seconds. Both fork their workers on
this host, give each one thread and flush denormals.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from unisono.engine.snapshot import new_file
from unisono.exchange.protocol import Exchange
from unisono.runtime.launchers.fork import launch
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.worker import Stop

WORKERS = 2
TIMEOUT = timedelta(seconds=600)


def in_unisono(act: Callable[[Exchange, int], Any], workers: int = WORKERS) -> Any:
    """Run `act(exchange, file for the snapshot)` in each of unisono's workers; return worker 0's result, which JSON can
    hold."""
    memory = new_file()
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result"

        def work(assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop) -> None:
            found = act(exchange, memory)
            if assignment.rank == 0:
                result.write_text(json.dumps(found), encoding="utf-8")

        try:
            launch(workers, work, threads=1, device="cpu")
        finally:
            os.close(memory)
        return json.loads(result.read_text(encoding="utf-8"))


def in_plain(act: Callable[[int, int], float]) -> float:
    """Run `act(rank, workers)` in each process of a plain gloo group; return rank 0's result."""
    with tempfile.TemporaryDirectory() as scratch:
        processes.start_processes(_plain, (act, Path(scratch)), nprocs=WORKERS, start_method="fork")
        return float((Path(scratch) / "result").read_text())


def _plain(rank: int, act: Callable[[int, int], float], scratch: Path) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(scratch / "store"), WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS, timeout=TIMEOUT)
    found = act(rank, WORKERS)
    if rank == 0:
        (scratch / "result").write_text(repr(found))
    dist.destroy_process_group()
