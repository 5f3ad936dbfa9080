"""Who hangs: a pure function of what the workers last said on the board, and what is done about it.

A worker that waits in an exchange is excused while another has not come to it; so whoever is waited for is found, and
not those who wait. Owns the rule, the deadline, and the folder with everybody's stacks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from unisono.board import Board, Row
from unisono.launch.crew import Crew, Member

PATIENCE = {"start": 10.0, "join": 10.0, "finish": 10.0, "wait": float("inf"), "prepare": float("inf"),
            "save": float("inf")}  # fmt: skip
"""Factors on the deadline, for phases that are not a step's. In some the supervisor itself is waited for."""
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
    """The workers that have made no progress for longer than their deadline, and wait for nobody.

    rows, stopped: by rank; `stopped` tells whether the process is stopped by a signal. now: seconds of the monotonic
    clock.
    """
    fewest = min((row.entered for row in rows.values()), default=0)
    late = [
        Stuck(rank=rank, seconds=now - row.since, row=row, stopped=stopped[rank])
        for rank, row in rows.items()
        if now - row.since > limit_seconds * PATIENCE.get(row.phase, 1.0) and not (row.waiting and fewest < row.entered)
    ]
    return [stuck for stuck in late if stuck.stopped] or late  # where all are in one exchange, it may be clear who is


class Watch:
    """Watches the crew of one run. `factor` is recovery.hang_factor."""

    def __init__(self, crew: Crew, board: Board, folder: Path, factor: float) -> None:
        self._crew = crew
        self._board = board
        self._folder = folder
        self._factor = factor
        self._longest_step = 0.0
        self._found = 0

    def learn(self, step_seconds: float) -> None:
        """A step has taken so long."""
        self._longest_step = max(self._longest_step, step_seconds)

    @property
    def limit_seconds(self) -> float:
        """How long a worker may be without progress; 0: for ever."""
        return self._factor * (max(1.0, self._longest_step) if self._longest_step else FIRST_STEP_PATIENCE)

    def find(self) -> list[tuple[Member, Stuck]]:
        """Who hangs now."""
        if not self.limit_seconds:
            return []
        at_work = {member.rank: member for member in self._crew.members.values() if not member.waiting}
        rows = {rank: self._board.row(member.slot) for rank, member in at_work.items()}
        stopped = {rank: self._crew.is_stopped(member) for rank, member in at_work.items()}
        now = time.monotonic()
        found = find_stuck(rows, stopped, now=now, limit_seconds=self.limit_seconds)
        return [(at_work[stuck.rank], stuck) for stuck in found]

    def describe(self, found: list[tuple[Member, Stuck]], step: int) -> str:
        """Who hangs, in words, after everybody's stacks have been written to a folder of the run."""
        self._found += 1
        told = "; ".join(str(stuck) for _, stuck in found)
        folder = self._folder / "hangs" / f"{self._found:03d}-step-{step + 1:08d}"
        try:
            self._crew.dump_stacks(folder, told)
        except OSError as error:
            return f"{told}; stacks could not be written: {error}"
        return f"{told}; all stacks are in {folder}"
