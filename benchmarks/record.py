"""What a measurement leaves behind: a Markdown table on standard output, and the same rows as JSON under `results/`.

Owns their form, and the medians and spreads in them. Measures nothing.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Repeats of one figure: the median stands for them, the extremes say how far to trust it."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 3
        low, high = min(self.values), max(self.values)
        return f"{self.median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


Cell = Spread | str | int | float


def record(name: str, title: str, rows: Sequence[dict[str, Cell]]) -> None:
    """Print rows of equal keys as a Markdown table; write them to `results/NAME.json` with the date and the machine."""
    print("\n".join([f"\n### {title}\n", *_table(rows), f"\n{_machine()}, {_now():%Y-%m-%d}\n"]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "title": title,
        "when": _now().isoformat(timespec="seconds"),
        "machine": _machine(),
        "rows": [{key: _plain(cell) for key, cell in row.items()} for row in rows],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _table(rows: Sequence[dict[str, Cell]]) -> list[str]:
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    return lines + ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]


def _plain(cell: Cell) -> object:
    return {"median": cell.median, "values": list(cell.values)} if isinstance(cell, Spread) else cell


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = found.group(1) if found else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{processor}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _now() -> datetime:
    return datetime.now(UTC)
