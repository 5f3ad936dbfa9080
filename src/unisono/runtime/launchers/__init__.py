"""Starting workers, joining them, ending them."""

from __future__ import annotations

from unisono.runtime.launchers.fork import count_workers, launch
from unisono.runtime.launchers.rank_assignment import Seat, restarted_by_torchrun, seat_from_torchrun
from unisono.runtime.worker import Act, work

__all__ = ["Act", "count_workers", "join_torchrun", "restarted_by_torchrun", "run_everywhere", "seat_from_torchrun"]


def run_everywhere(act: Act, *, workers: str | int, microbatches: int, threads: int, device: str) -> bool:
    """Run `act` in every worker: join torchrun's where it has started this process, else start local ones.

    Returns whether this process speaks for the run: the launcher, or torchrun's worker 0.
    """
    seat = seat_from_torchrun()
    if seat is None:
        launch(count_workers(workers, microbatches, device), act, threads=threads, device=device)
        return True
    join_torchrun(seat, act, threads=threads, device=device)
    return seat.rank == 0


def join_torchrun(seat: Seat, act: Act, *, threads: int, device: str) -> None:
    """Run `act` in this process, as the worker that torchrun wants it to be."""
    from torch.distributed.elastic.multiprocessing.errors import record

    record(
        lambda: work(seat, act, threads=threads, wanted_device=device)
    )()  # torchrun reads the error file that this writes
