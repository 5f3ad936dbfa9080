"""Delivery of events to loggers: each step once, whatever happens to the workers, the run or this process.

Events repeat after a loss, and a resumed run trains the steps after its checkpoint again. `RUN/loggers/NAME.json` notes
what a logger has received; when a run is resumed, what the logger lacks is read from the ledger, `metrics.jsonl`. So a
logger that failed, or is new to the run, gets the whole history. Steps that it has are not delivered again: they are
the same.

Owns these files, and that a failing logger is switched off. Loggers themselves only receive the events.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unisono.config.recipe import Recipe, to_table
from unisono.errors import RunFolderError
from unisono.storage.files import write_text
from unisono.tracking import events
from unisono.tracking.ledger import read_ledger
from unisono.tracking.logger import Cursor, Logger, LoggerContext, find

FLUSH_SECONDS = 1.0
HELD_SECONDS = 60.0  # for the loggers of a killed run to write their last lines
LOCK = "lock"
BEFALLEN = ("Recovered", "Resized", "Corrupted")


class Deliveries:
    """All loggers of a recipe, as one observer.

    Args:
        warn: called once for each logger that is switched off.
    """

    def __init__(self, recipe: Recipe, warn: Callable[[str], None]) -> None:
        self._deliveries = [Delivery(name, recipe, warn) for name in recipe.tracking.loggers]
        self._flushed_at = time.monotonic()
        self._lock = -1

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted) and self._lock < 0:
            self._lock = _hold(Path(event.folder) / "loggers")
        for delivery in self._deliveries:
            delivery.observe(event)
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Flush what was observed to safe storage."""
        self._flushed_at = time.monotonic()
        for delivery in self._deliveries:
            delivery.flush()

    def close(self) -> None:
        for delivery in self._deliveries:
            delivery.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _hold(folder: Path) -> int:
    """Wait until no other process writes this run's logs; return the open lock. Without file locks, continue."""
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    deadline = time.monotonic() + HELD_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:  # the other process hangs; lines written twice are better than lost ones
                return file
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return file


class Delivery:
    """One logger and what it has received. It is opened when the run starts."""

    def __init__(self, name: str, recipe: Recipe, warn: Callable[[str], None]) -> None:
        self._name = name
        self._recipe = recipe
        self._warn = warn
        self._logger: Logger | None = None
        self._is_off = False
        self._early: list[events.Event] = []
        self._cursor = Cursor()
        self._befallen = 0  # events about what happened to the run that were passed on
        self._memory: dict[str, str] = {}
        self._path = Path()
        self._is_dirty = False

    def observe(self, event: events.Event) -> None:
        """Pass an event on, unless the logger has it already."""

        def act() -> None:
            if self._logger is not None:
                if not isinstance(event, events.RunStarted):  # repeated where a run is resumed within a process
                    self._pass(self._logger, event)
            elif isinstance(event, events.RunStarted):
                self._open(event)
            else:
                self._early.append(event)

        self._try(act)

    def flush(self) -> None:
        """Flush what the logger has received, and note it."""

        def act() -> None:
            if self._logger is not None and self._is_dirty:
                self._logger.flush()
                self._save()

        self._try(act)

    def close(self) -> None:
        """The last flush, and the end."""

        def act() -> None:
            if self._logger is not None:
                self._logger.close()
                self._save()

        self._try(act)
        self._logger, self._is_off = None, True

    def _try(self, act: Callable[[], None]) -> None:
        """Call the logger; a failure ends the logger, not the run."""
        if self._is_off:
            return
        try:
            act()
        except Exception as error:  # noqa: BLE001 - any tool, any network, any disk
            logger, self._logger, self._is_off = self._logger, None, True
            told = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            also = ""
            if logger is not None:
                try:
                    logger.close()
                except Exception as second:  # noqa: BLE001 - it has failed already
                    also = f", nor could it be closed ({type(second).__name__})"
            self._warn(
                f"the logger {self._name} failed ({told}){also}: training goes on without it. metrics.jsonl has "
                "everything; resume the run, and the logger gets what it lacks."
            )

    def _open(self, started: events.RunStarted) -> None:
        run_folder = Path(started.folder)
        self._path = run_folder / "loggers" / f"{self._name}.json"
        self._load(goes_on=started.start_step > 0)
        tracking = self._recipe.tracking
        context = LoggerContext(
            recipe=to_table(self._recipe),
            run_folder=run_folder,
            folder=(Path(tracking.folder) if tracking.folder else run_folder) / self._name,
            is_shared=bool(tracking.folder),
            project=tracking.project,
            cursor=self._cursor,
            memory=self._memory,
        )
        self._logger = find(self._name)(context)
        self._save()
        self._logger.observe(started)
        for event in (*self._read_missing(run_folder, started.start_step), *self._early):
            self._pass(self._logger, event)
        self._early.clear()

    def _pass(self, logger: Logger, event: events.Event) -> None:
        if not self._cursor.admit(event):
            return
        self._befallen += type(event).__name__ in BEFALLEN
        every = self._recipe.tracking.every_steps
        if isinstance(event, events.StepDone) and event.step % every and event.step != 1:
            return
        logger.observe(event)
        self._is_dirty = True

    def _read_missing(self, run_folder: Path, start_step: int) -> Iterator[events.Event]:
        """The ledger's lines from before this start."""
        if not start_step:
            return
        try:
            lines = read_ledger(run_folder / "metrics.jsonl")
        except OSError as error:
            raise RunFolderError(f"what was logged before cannot be read: {error}") from error
        starts = [place for place, line in enumerate(lines) if line["event"] == "RunStarted"]
        skipped = self._befallen
        for line in lines[: starts[-1] if starts else 0]:
            fields = {name: value for name, value in line.items() if name not in ("event", "clock", "when", "since")}
            if line["event"] in BEFALLEN:
                skipped -= 1
                if skipped < 0:
                    yield getattr(events, line["event"])(**fields)
            elif line["event"] in ("StepDone", "Evaluated", "CheckpointWritten") and line["step"] <= start_step:
                yield getattr(events, line["event"])(**fields)

    def _load(self, *, goes_on: bool) -> None:
        """The notes on this logger. A run of another recipe that begins anew in the same folder has a log of its
        own."""
        if not self._path.exists():
            return
        noted = json.loads(self._path.read_text(encoding="utf-8"))
        if goes_on or noted["recipe"] == self._digest():
            self._cursor = Cursor(noted["passed"])
            self._befallen, self._memory = noted["befallen"], noted["memory"]

    def _save(self) -> None:
        noted: dict[str, Any] = {
            "passed": self._cursor.passed,
            "befallen": self._befallen,
            "memory": self._memory,
            "recipe": self._digest(),
        }
        write_text(self._path, json.dumps(noted) + "\n")
        self._is_dirty = False

    def _digest(self) -> str:
        """The hash of what decides the numbers in a log."""
        sections = ("data", "screen", "encode", "model", "train", "evaluate")
        table = {name: part for name, part in to_table(self._recipe).items() if name in sections}
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()[:16]
