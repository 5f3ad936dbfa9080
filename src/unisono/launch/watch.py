"""Who hangs: a pure function of what the workers last said on the board.

A worker that waits in an exchange is excused while another has not come to it; so whoever is waited for is found, and
not those who wait. Owns the rule and the words for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unisono.board import Row

PATIENCE = {"start": 10.0, "join": 10.0, "finish": 10.0, "wait": float("inf"), "prepare": float("inf"),
            "save": float("inf")}  # fmt: skip
"""Factors on the deadline, for phases that are not a step's. The supervisor itself is waited for in some."""
FIRST_STEP_PATIENCE = 30.0
"""Factor before any step has been measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """A worker without progress: its rank, for how long, and at what it was."""

    rank: int
    seconds: float
    row: Row
    stopped: bool

    def __str__(self) -> str:
        stopped = ", stopped by a signal" if self.stopped else ""
        return f"worker {self.rank} made no progress for {self.seconds:.0f} s (at {self.row}{stopped})"


def find_stuck(
    rows: Mapping[int, Row], stopped: Mapping[int, bool], *, now: float, limit_seconds: float
) -> list[Stuck]:
    """The workers that have made no progress for longer than their deadline and wait for nobody.

    rows, stopped: by rank; `stopped` tells whether the process is stopped by a signal. now: seconds of the monotonic
    clock.
    """
    behind = min((row.entered for row in rows.values()), default=0)
    late = {
        rank: row for rank, row in rows.items() if now - row.since > limit_seconds * PATIENCE.get(row.phase, 1.0)
        and not (row.waiting and behind < row.entered)
    }  # fmt: skip
    if any(stopped[rank] for rank in late):  # all are in one exchange, and it is clear who keeps it
        late = {rank: row for rank, row in late.items() if stopped[rank]}
    return [
        Stuck(rank=rank, seconds=now - row.since, row=row, stopped=stopped[rank]) for rank, row in late.items()
    ]


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False
