"""From the figures of the runs to tables, and to what the peers do better.

Owns ratios, rows and that sentence. Pure: neither starts nor reads anything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py
from record import Cell, Spread

NOTHING = "–"
LEAST_GAIN = 1.005
"""What is less is written 1.00, and says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run is judged by. Megabytes are 2**20 bytes."""

    samples_per_second: float
    first_step_seconds: float
    largest_process_mb: float
    all_processes_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the table: which figure, and whether more of it is better."""

    name: str
    figure: Callable[[Figures], float]
    more_is_better: bool = False


COLUMNS = (
    Column(name="samples/s", figure=lambda run: run.samples_per_second, more_is_better=True),
    Column(name="first step, s", figure=lambda run: run.first_step_seconds),
    Column(name="largest process, MB", figure=lambda run: run.largest_process_mb),
    Column(name="all processes, MB", figure=lambda run: run.all_processes_mb),
)


def ratios(ours: Sequence[Figures], theirs: Sequence[Figures], column: Column = COLUMNS[0]) -> Spread:
    """A figure of ours over theirs, round by round: what else the machine did fell on both.

    Raises:
        ValueError: they ran in different numbers of rounds.
    """
    pairs = zip(ours, theirs, strict=True)
    return Spread(values=tuple(column.figure(mine) / column.figure(other) for mine, other in pairs))


def table(
    runs: Mapping[str, Sequence[Figures]], ours: Mapping[str, str], titles: Mapping[str, str], failed: Mapping[str, str]
) -> list[dict[str, Cell]]:
    """Return a row per side, in the order of `titles`.

    Args:
        runs: of each side, a run per round.
        ours: the sides that the others are compared with, and what their columns are called.
        titles: what sides are called.
        failed: why a side has no runs.
    """
    rows = []
    for side, title in titles.items():
        row: dict[str, Cell] = {"side": title}
        measured = runs.get(side, ())
        row |= {column.name: _spread(measured, column) for column in COLUMNS}
        for mine, name in ours.items():
            is_peer = measured and side not in ours and mine in runs
            row[f"{name} / it"] = _short(ratios(runs[mine], measured)) if is_peer else NOTHING
        if failed:
            row["failed"] = failed.get(side, "")
        rows.append(row)
    return rows


def better(runs: Mapping[str, Sequence[Figures]], mine: str, ours: Sequence[str], titles: Mapping[str, str]) -> str:
    """Say for each column which peers beat `mine`, and how clearly: by the median of the ratios of neighbours."""
    parts = []
    for column in COLUMNS:
        beaten = []
        for side, theirs in runs.items():
            if side in ours:
                continue
            ratio = median(ratios(runs[mine], theirs, column).values)
            gain = 1 / ratio if column.more_is_better else ratio
            if gain >= LEAST_GAIN:
                beaten.append((gain, titles[side]))
        found = ", ".join(f"{title} ({gain:.2f} times)" for gain, title in sorted(beaten, reverse=True))
        parts.append(f"{column.name}: {found or 'none'}")
    return f"**What the peers do better** than {titles[mine]}: {'; '.join(parts)}."


def _spread(measured: Sequence[Figures], column: Column) -> Cell:
    return Spread(values=tuple(map(column.figure, measured))) if measured else NOTHING


def _short(spread: Spread) -> str:
    low, high = min(spread.values), max(spread.values)
    return f"{spread.median:.2f} ({low:.2f} to {high:.2f})"
