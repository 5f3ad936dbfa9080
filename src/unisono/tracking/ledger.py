"""The ledger of a run: `metrics.jsonl`, every step exactly once; `curves.svg`, drawn from it; and `summary.json`.

Owns the three files. An event may be reported twice, by a worker and by its replacement: the ledger keeps the first
report. A resumed run first forgets the steps after the one that it resumes from. If the disk fails, lines wait in
memory, and training goes on.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from unisono.config.wording import readable
from unisono.errors import RunFolderError
from unisono.storage.elsewhere import write_or_rescue
from unisono.storage.files import to_json, whole_file, write_text
from unisono.tracking import events
from unisono.tracking.goodput import goodput, measure_speed

Line = dict[str, Any]

HISTORY = {"Recovered", "Resized", "Corrupted", "Resumed"}  # what happened to the run: training again does not undo it


def warn_on_stderr(message: str) -> None:
    """Writes a warning where there is no other observer."""
    print(f"warning: {readable(message)}", file=sys.stderr, flush=True)


class Ledger:
    """Keeps what happened, one JSON line each: {"event": name, …, "clock": seconds since this ledger was made, "when":
    UTC unix seconds}. Spans are differences of "clock": a date may be set forwards or back at any time.

    A line is in the kernel when `observe` returns, or else waits for the next event, for the run's end or for `close`.
    It is whole or absent, and lines are in the order in which they were reported. Events reported before RunStarted
    are written after it.

    Args:
        folder: the run folder, made when the run starts.
        warn: called once when lines begin to wait, once when all are written, and for curves that cannot be drawn. It
            may report to the ledger itself.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = warn_on_stderr) -> None:
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._warn = warn
        self._since = round(time.time(), 3)
        self._begun_at = time.monotonic()
        self._has_begun = False
        self._file: int | None = None
        self._good_bytes = 0  # the part of the file that is whole lines
        self._present = Present()
        self._waiting: deque[Line] = deque()
        self._trouble = ""

    def observe(self, event: events.Event) -> None:
        """Keep an event; at the run's end, write curves and summary.

        Raises:
            RunFolderError: the summary cannot be written. No other fault of the disk is raised.
        """
        if isinstance(event, events.RunEnded):
            self._end(event)
            return
        line = {"event": type(event).__name__, **dataclasses.asdict(event)}
        if isinstance(event, events.RunStarted):
            line["since"] = self._since
        line["clock"], line["when"] = self._clock(), round(time.time(), 3)
        if isinstance(event, events.RunStarted) and not self._has_begun:
            self._has_begun = True
            self._waiting.appendleft(line)
        else:
            self._waiting.append(line)
        self._write_waiting()

    def complete(self, event: events.RunEnded) -> events.RunEnded:
        """The event with "recoveries", "resumes", "seconds", "samples_per_second" and "goodput" in its summary: of the
        whole run, all its sessions together. Writes nothing; one call is enough."""
        if "goodput" in event.summary:
            return event
        lines = self._read_all()
        counted = {
            name: sum(line["event"] == of for line in lines)
            for name, of in (("recoveries", "Recovered"), ("resumes", "Resumed"))
        }
        speed = measure_speed(lines, event.summary.get("steps", 0))
        summary = {**event.summary, **speed, **counted, "goodput": goodput(lines, until=self._clock())}
        return dataclasses.replace(event, summary=summary)

    def _clock(self) -> float:
        """Seconds since this ledger was made."""
        return round(time.monotonic() - self._begun_at, 3)

    def close(self) -> None:
        """Try a last time to write the waiting lines."""
        self._write_waiting()
        if self._waiting and self._has_begun:
            content = _encode(self._read_all()).decode()
            try:
                place, _ = write_or_rescue(self._folder, lambda place: write_text(place / "metrics.jsonl", content))
                self._warn(f"all lines of {str(self._path)!r} are in {str(place / 'metrics.jsonl')!r}.")
            except RunFolderError:
                self._warn(f"{len(self._waiting)} lines of {str(self._path)!r} are lost: {self._trouble}.")
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._has_begun = False
        self._waiting.clear()

    def _end(self, event: events.RunEnded) -> None:
        self._write_waiting()
        event = self.complete(event)
        with suppress(OSError):  # the next line gives the reason
            self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / "summary.json", to_json(dict(event.summary), indent=1) + "\n")
        path = self._folder / "curves.svg"
        try:
            draw_curves(self._read_all(), path)
        except Exception as error:  # noqa: BLE001 - a picture, by a large library; the result does not depend on it
            self._warn(f"{str(path)!r} cannot be drawn: {error}. The result does not depend on it.")

    def _write_waiting(self) -> None:
        """Write the waiting lines, in order, as far as the disk allows."""
        if not self._has_begun:
            return
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except (OSError, RunFolderError) as error:
            cause = error.__cause__ if isinstance(error, RunFolderError) else error
            reason = getattr(cause, "strerror", None) or str(error)
            is_new, self._trouble = not self._trouble, reason
            if is_new:
                self._warn(
                    f"{str(self._path)!r} cannot be written ({reason}): training goes on, its lines wait in memory. "
                    "Free space, or make the place writable."
                )
            return
        if self._trouble:
            self._trouble = ""
            self._warn(f"{str(self._path)!r} is written again; all lines that waited are in it.")

    def _write(self, line: Line) -> None:
        """Write one line, unless it is there already. On an OSError nothing has changed."""
        if line["event"] == "RunStarted":
            self._begin(line)
        elif self._file is None:
            raise OSError(errno.EBADF, "not open")
        elif not self._present.has(line):
            self._append(self._file, _encode([line]))
            self._present.add(line)

    def _begin(self, started: Line) -> None:
        """Replace the file by the lines that stay and the line of a run that starts or resumes."""
        lines = resume(self._read_earlier(), started)
        self._replace(_encode(lines))
        self._present = Present(lines)

    def _append(self, file: int, line: bytes) -> None:
        """Write a line at the end, or nothing."""
        if not self._is_in_place(file):
            self._replace(self._read())
            assert self._file is not None
            file = self._file
        size = os.fstat(file).st_size
        if size < self._good_bytes:  # the file was cut from outside
            self._good_bytes = os.pread(file, size, 0).rfind(b"\n") + 1
        if size != self._good_bytes:  # half a line, which could not be taken back when it was written
            os.ftruncate(file, self._good_bytes)
        try:
            _write_all(file, line)
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, self._good_bytes)
            raise
        self._good_bytes += len(line)

    def _is_in_place(self, file: int) -> bool:
        """Whether the open file is the one at the path: it, or its folder, may have been removed or replaced."""
        try:
            there = self._path.stat()
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(file))

    def _replace(self, content: bytes) -> None:
        """Put a new file with this content at the path, and hold it open; on an OSError nothing has changed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = None
        try:
            with whole_file(self._path) as part:
                file = os.open(part, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o666)
                _write_all(file, content)
        except BaseException:
            if file is not None:
                os.close(file)
            raise
        if self._file is not None:
            os.close(self._file)
        self._file, self._good_bytes = file, len(content)

    def _read(self) -> bytes:
        """The whole lines of the open file, even if it was moved."""
        assert self._file is not None
        content = b""
        while part := os.pread(self._file, self._good_bytes - len(content), len(content)):
            content += part
        return content[: content.rfind(b"\n") + 1]

    def _read_earlier(self) -> list[Line]:
        """The lines that are on disk."""
        try:
            return _decode(self._read()) if self._file is not None else read_ledger(self._path)
        except FileNotFoundError:
            return []

    def _read_all(self) -> list[Line]:
        """The lines on disk, and those that wait to be written."""
        lines: list[Line] = []
        with suppress(OSError):  # the summary then has less, but it exists
            lines = self._read_earlier()
        present = Present(lines)
        for line in self._waiting:
            if line["event"] == "RunStarted":
                lines = resume(lines, line)
                present = Present(lines)
            elif not present.has(line):
                lines.append(line)
                present.add(line)
        return lines


class Present:
    """Which lines are written already, of those that may be reported twice."""

    def __init__(self, lines: Iterable[Line] = ()) -> None:
        self._step = 0
        self._others: set[tuple[str, int, str]] = set()
        for line in lines:
            self.add(line)

    def has(self, line: Line) -> bool:
        """Whether a line repeats one that was added. Steps are reported in order: after a step, all before it exist."""
        if line["event"] == "StepDone":
            return bool(line["step"] <= self._step)
        return self._name(line) in self._others

    def add(self, line: Line) -> None:
        """Remember a line."""
        if line["event"] == "StepDone":
            self._step = line["step"]
        elif line["event"] in ("Evaluated", "CheckpointWritten"):
            self._others.add(self._name(line))

    @staticmethod
    def _name(line: Line) -> tuple[str, int, str]:
        return line["event"], line.get("step", 0), line.get("split", "")


def resume(earlier: list[Line], started: Line) -> list[Line]:
    """The earlier lines that stay, and the new line of a run that starts, or goes on after its `start_step`.

    Lines of later steps are forgotten: they will be trained again, to the same bits. What happened to the run stays.
    """
    step = started["start_step"]
    kept: list[Line] = []
    wasted: list[float] = []
    for line in earlier:
        if line.get("step", 0) <= step or line["event"] in HISTORY:
            kept.append(line)
        elif line["event"] == "StepDone":
            wasted.append(line.get("seconds", 0.0))
    if not earlier:
        return [started]
    told = {"step": step, "dropped_steps": len(wasted), "wasted_seconds": round(sum(wasted), 6)}
    return [*kept, started, {"event": "Resumed", **told, "clock": started["clock"], "when": started["when"]}]


def read_ledger(path: Path) -> list[Line]:
    """The ledger's lines; one that was cut off by a crash is left out."""
    return _decode(path.read_bytes())


def _decode(content: bytes) -> list[Line]:
    lines = []
    for text in content.split(b"\n"):
        with suppress(ValueError):  # cut off, or no JSON
            line = json.loads(text)
            if isinstance(line, dict) and "event" in line:
                lines.append(_with_nan(line) if line["event"] in ("StepDone", "Evaluated") else line)
    return lines


def _with_nan(line: Line) -> Line:
    """The numbers that JSON does not have, as they were before `to_json`."""
    tables: list[Line] = [line, line.get("scores") or {}]
    for table in tables:
        for name, value in table.items():
            if value is None or value in ("Infinity", "-Infinity"):
                table[name] = math.nan if value is None else float(value)
    return line


def _encode(lines: Iterable[Line]) -> bytes:
    return "".join(to_json(line) + "\n" for line in lines).encode()


def _write_all(file: int, content: bytes) -> None:
    """Write all of it; after a short write, writing the rest fails with the reason."""
    left = memoryview(content)
    while left:
        written = os.write(file, left)
        if not written:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        left = left[written:]


def draw_curves(lines: list[Line], path: Path) -> None:
    """Draw the training loss of each step, and the loss and accuracy of each evaluation, against epochs."""
    from matplotlib.figure import Figure  # without pyplot, whose state belongs to the caller

    done = [line for line in lines if line["event"] == "StepDone"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(
        [line["epoch"] for line in done],
        [line["loss"] for line in done],
        color="#9ab",
        linewidth=0.8,
        label="training loss, each step",
    )
    axis.set(xlabel="epoch", ylabel="loss")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    right = None
    for split, color in (("validation", "#d60"), ("test", "#06a")):
        scored = [line for line in lines if line["event"] == "Evaluated" and line["split"] == split]
        epochs = [line["epoch"] for line in scored]
        for name, of, style in (("loss", axis, "o-"), ("accuracy", None, "s--")):
            if not scored or name not in scored[0]["scores"]:
                continue
            if of is None:
                of = right = right or axis.twinx()
                right.set(ylabel="accuracy", ylim=(0, 1))
            values = [line["scores"][name] for line in scored]
            of.plot(epochs, values, style, color=color, markersize=4, label=f"{split} {name}")
    handles = [handle for part in (axis, right) if part for handle in part.get_legend_handles_labels()[0]]
    axis.legend(handles=handles, loc="center right", fontsize=8)
    with whole_file(path) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})
