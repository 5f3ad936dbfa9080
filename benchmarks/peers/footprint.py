"""How much memory a run's processes take, seen from outside; and the end of all that it started.

Owns the mark by which a run's processes are known (an environment variable, which also those inherit whose parents
are gone), what is read from /proc, and when. All sides are measured alike.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "UNISONO_BENCH_RUN"
INTERVAL_SECONDS = 0.2
PAGES_SHARE = 1 / 50
"""Counting a process's pages takes up to 50 ms; it is done so often that it takes this share of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen at one instant (unix seconds), in bytes.

    largest: the highest resident memory that any one process has had up to now (VmHWM). shared_out: the memory of all
    processes together, each page shared by n of them counted as 1/n for each (PSS); 0 where it was not looked at.
    """

    time: float
    largest: int
    shared_out: int


class Watch(threading.Thread):
    """Looks at the marked processes five times a second, at their pages less often, until it is stopped."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.looks: list[Look] = []
        self._mark = mark
        self._over = threading.Event()

    def run(self) -> None:
        """Look, and wait."""
        next_count = 0.0
        while not self._over.wait(INTERVAL_SECONDS):
            found = find_marked(self._mark)
            largest = max((_read(pid, "status", "VmHWM") for pid in found), default=0)
            shared_out = 0
            if time.monotonic() >= next_count:
                started = time.thread_time()
                shared_out = sum(_read(pid, "smaps_rollup", "Pss") for pid in found)
                next_count = time.monotonic() + (time.thread_time() - started) / PAGES_SHARE
            self.looks.append(Look(time=time.time(), largest=largest, shared_out=shared_out))

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self.join()

    def peak(self, of: Callable[[Look], int], until: float) -> int:
        """The highest value up to an instant."""
        return max((of(look) for look in self.looks if look.time <= until), default=0)


def find_marked(mark: str) -> list[int]:
    """Processes whose environment holds the mark."""
    wanted, found = f"{MARK}={mark}\0".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it has ended, or is somebody else's
                if wanted in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
    return found


def end_marked(mark: str) -> None:
    """Kill what is left of a run. Workers of torchrun and Ray lead sessions of their own: no group holds all."""
    while alive := find_marked(mark):
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _read(pid: int, file: str, name: str) -> int:
    with suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8"), re.M)
        return int(found.group(1)) * 1024 if found else 0
    return 0
