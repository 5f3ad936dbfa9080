"""What starts workers: processes forked here, or torchrun's."""

from __future__ import annotations

from unisono.runtime.launchers.fork import count_workers, launch
from unisono.runtime.launchers.rank_assignment import RankAssignment, assignment_from_torchrun, restarted_by_torchrun
from unisono.runtime.worker import Act, work

__all__ = ["Act", "count_workers", "join_torchrun", "restarted_by_torchrun", "run_everywhere", "seat_from_torchrun"]


def run_everywhere(act: Act, *, workers: str | int, microbatches: int, threads: int, device: str) -> bool:
    """Run `act` in every worker: join torchrun's where it has started this process, else start local ones.

    Returns whether this process speaks for the run: the launcher, or torchrun's worker 0.
    """
    assignment = assignment_from_torchrun()
    if assignment is None:
        launch(count_workers(workers, microbatches, device), act, threads=threads, device=device)
        return True
    join_torchrun(assignment, act, threads=threads, device=device)
    return assignment.rank == 0


def join_torchrun(assignment: RankAssignment, act: Act, *, threads: int, device: str) -> None:
    """Run `act` in this process, as the worker that torchrun wants it to be."""
    from torch.distributed.elastic.multiprocessing.errors import record

    record(
        lambda: work(assignment, act, threads=threads, wanted_device=device)
    )()  # torchrun reads the error file that this writes
