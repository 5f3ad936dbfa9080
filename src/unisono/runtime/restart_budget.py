"""Losses of workers: how they are described, how often a run may recover from them, and what each one cost.

Owns the rules of `[recovery]` (the budget, the attempts at one step, the back-off, when a fault counts as repeated) and
the wording. Pure bookkeeping: it handles no process.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unisono import errors
from unisono.config.run_sections import Recovery
from unisono.errors import CorruptionError, LostPeerError, UnisonoError, WorkerError
from unisono.processes.forking import describe_end
from unisono.tracking import events

MOST_BACKOFF_SECONDS = 60.0
MOST_FRAME_LINES = 12
MOST_CAUSE_CHARACTERS = 200
_HINTS: dict[int, str] = {
    signal.SIGKILL: " (out of memory? dmesg tells)",
    signal.SIGBUS: " (a file that it maps was made shorter, or /dev/shm is full?)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a worker ended: its exit code, or minus the signal that killed it. report: what it wrote of its exception, if
    any. stacks: what it wrote of a crash."""

    worker: int
    code: int
    report: Mapping[str, Any] | None = None
    stacks: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Workers that were lost at once. step: the last committed one, −1 before any. what: in words. cause: of an
    exception, which a deterministic program repeats; "" for others. trace: to show if this ends the run. frames: the
    part of it that says where it happened, to show if the run goes on."""

    step: int
    what: str
    cause: str = ""
    trace: str = ""
    frames: str = ""


def name_loss(ends: Sequence[End], step: int) -> Loss:
    """A loss in words: every worker that has ended."""
    told, trace, cause, frames = [], "", "", ""
    for end in ends:
        who = f"worker {end.worker}"
        if end.report and end.report["kind"] == CorruptionError.__name__:
            told.append(f"{who}: {end.report['message']}")
        elif end.report:
            limit = end.report.get("limit", "").removesuffix(".")
            cause = f"{end.report['kind']}: {end.report['message']}"
            told.append(f"{who} failed: {limit}" if limit else f"{who} failed ({_shorten(cause)})")
            found = "" if limit else str(end.report["traceback"])
            trace = trace or found
            frames = frames or "\n".join(found.rstrip().splitlines()[-MOST_FRAME_LINES:])
        elif end.code < 0:
            hint = _HINTS.get(-end.code, "")
            told.append(f"{who} {describe_end(end.code)}{hint}")
            trace = trace or end.stacks
            frames = frames or "\n".join(end.stacks.splitlines()[:MOST_FRAME_LINES])  # the innermost comes first
        else:
            told.append(f"{who} {describe_end(end.code)}")
    return Loss(step=step, what=", ".join(told), cause=cause, trace=trace, frames=frames)


def _shorten(cause: str) -> str:
    """The first line of an error, cut where it is long."""
    line = cause.strip().splitlines()[0]
    return line if len(line) <= MOST_CAUSE_CHARACTERS else line[:MOST_CAUSE_CHARACTERS] + " …"


def find_verdict(ends: Sequence[End]) -> Exception | None:
    """The error that a worker raised on purpose, if one did: the earliest. It ends the run, whichever other worker was
    lost."""
    spared = (CorruptionError.__name__, LostPeerError.__name__)  # they cost a worker, not the run
    reports = [end.report for end in ends if end.report and end.report["known"] and end.report["kind"] not in spared]
    for report in sorted(reports, key=lambda report: float(report["when"])):
        kind = getattr(errors, report["kind"], None)
        if isinstance(kind, type) and issubclass(kind, UnisonoError):
            return kind(report["message"])
        return WorkerError(report["message"])
    return None


class RestartBudget:
    """Counts a run's losses."""

    def __init__(self, rules: Recovery) -> None:
        self._rules = rules
        self._losses: list[Loss] = []

    def spend(self, loss: Loss) -> str:
        """Count a loss. Return why the run has to end now; "": it goes on."""
        before = self._losses[-1] if self._losses else None
        self._losses.append(loss)
        where = f"step {loss.step + 1}" if loss.step >= 0 else "the start"
        if loss.cause and loss.step < 0:
            return f"{loss.what} before anything was done"
        if loss.cause and before and (before.step, before.cause) == (loss.step, loss.cause):
            return f"{loss.what} twice with the same error at {where}: it would come again"
        if len(self._losses) > self._rules.restarts:
            return f"{loss.what}; this was loss {len(self._losses)}, and recovery.restarts = {self._rules.restarts}"
        if self.attempts >= self._rules.attempts:
            return f"{loss.what}; this was loss {self.attempts} in a row at {where}, so the fault repeats"
        return ""

    @property
    def attempts(self) -> int:
        """Losses in a row with no step committed in between."""
        count = 0
        for loss in reversed(self._losses):
            if loss.step != self._losses[-1].step:
                break
            count += 1
        return count

    @property
    def backoff_seconds(self) -> float:
        """How long to wait before the next attempt; the first one does not wait."""
        again = self.attempts - 1
        return min(self._rules.backoff_seconds * 2 ** (again - 1), MOST_BACKOFF_SECONDS) if again else 0.0


@dataclass(slots=True, kw_only=True)
class Change:
    """A loss or a resize from which the run has not recovered yet.

    since: seconds of the monotonic clock, from when no worker has trained. wasted: work on a step that was dropped.
    lost: the losses, in words; "" for none. frames: where an error was raised. before: the number of workers, where
    another was requested. assigned: all have got rank assignments since. stands_still: `since` is exact.
    """

    since: float
    wasted: float = 0.0
    lost: str = ""
    frames: str = ""
    before: int | None = None
    assigned: bool = False
    stands_still: bool = False

    def stand_still(self, now: float) -> None:
        """The first worker has left the group that is being resized: until then, training went on."""
        if not self.stands_still and not self.lost:
            self.since, self.stands_still = now, True

    def conclude(self, started: events.RunStarted, now: float) -> list[events.Event]:
        """The events that report it when a new group of workers has begun."""
        told: list[events.Event] = []
        seconds, step, workers = now - self.since, started.start_step, started.workers
        if self.lost:
            told.append(
                events.Recovered(
                    step=step,
                    what=self.lost,
                    workers=workers,
                    wasted_seconds=self.wasted,
                    seconds=seconds,
                    trace=self.frames,
                )
            )
        if self.before is not None:
            seconds = 0.0 if self.lost else seconds  # reported once
            told.append(events.Resized(step=step, before=self.before, workers=workers, seconds=seconds))
        return told
