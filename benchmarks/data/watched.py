"""A command, how long it took, and how much memory it and its children had at most.

Owns the sampling. Memory is the proportional set size (PSS) of all its processes together, every 50 ms: pages that
several share are counted once, files that are mapped count as far as they are in memory.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

EVERY_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """What was seen of a command."""

    seconds: float
    peak_bytes: int
    output: str


def run(command: Sequence[str], environment: Mapping[str, str] | None = None, *, memory: bool = True) -> Watched:
    """Run a command to its end. Raises CalledProcessError if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    peak = [0]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(EVERY_SECONDS):
            peak[0] = max(peak[0], sum(map(_measure, _family(process.pid))))

    thread = threading.Thread(target=sample)
    if memory:
        thread.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    over.set()
    if memory:
        thread.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Watched(seconds=seconds, peak_bytes=peak[0], output=output)


def _family(pid: int) -> list[int]:
    found = [pid]
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _family(int(child))
    return found


def _measure(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
