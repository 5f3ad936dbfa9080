"""Goodput: which share of a run's wall time went into steps that counted, and where the rest went.

Owns the accounting, a pure function over the ledger's lines. `ledger.py` owns the lines themselves.

The time between a line and the one before belongs to the work that the later line ends:

    RunStarted                    start: since the session's beginning, which the line gives as `since`
    StepDone                      data, as far as the step waited for it; the rest steps
    Evaluated                     evaluation; so is what follows the last line (the last test, the export)
    CheckpointWritten             saving, as far as training waited; writing itself happens in the background
    Recovered, Resized            recovery for their `seconds`; the rest waste: work that was not finished
    Corrupted                     waste: its step was not committed
    Resumed                       waste: what the forgotten steps had taken, in an earlier session
    Notice                        nothing: it ends no work

If a line claims more than its own interval, that time was spent before a step that was reported in between. It is taken
from what the steps' intervals hold beyond the steps' own seconds, and no further. The time between two sessions does
not count: the run was not running.

Times are read from `clock`, seconds since the session's beginning that no change of the date can alter. A ledger of an
earlier version has dates only, in `when`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("steps", "start", "data", "evaluation", "saving", "recovery", "waste")


def goodput(lines: Iterable[Mapping[str, Any]], *, until: float | None = None) -> dict[str, Any]:
    """Where the wall time of a run went.

    Args:
        lines: the ledger's, in its order, every event once.
        until: the end of the last session, in seconds since its beginning; None: its last line.

    Returns:
        {"wall_seconds", "share", "seconds": {kind: seconds}}. The kinds add up to the wall time, all rounded to
        milliseconds; `share` is that of the steps.
    """
    exact = dict.fromkeys(KINDS, 0.0)
    sessions = list(_follow(list(lines)))
    if sessions and until is not None:
        sessions[-1].evaluation += sessions[-1].pass_until(until)
    for session in sessions:
        for kind, amount in session.share_out().items():
            exact[kind] += amount
    seconds = {kind: round(amount, 3) for kind, amount in exact.items()}
    wall = round(sum(seconds.values()), 3)
    share = min(seconds["steps"] / wall, 1.0) if wall else 0.0
    return {"wall_seconds": wall, "share": round(share, 4), "seconds": seconds}


def measure_speed(lines: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Any]:
    """How fast the steps in these lines were trained: {"seconds", "samples_per_second"}, over all sessions.

    seconds: from the beginning of the first step of each session to the end of its last, with what lies between steps:
    evaluations, checkpoints, recoveries. Where the lines do not have all `steps` of the run, "timed_steps" is their
    number.
    """
    done = [place for place, line in enumerate(lines) if line["event"] == "StepDone"]
    found = goodput(lines[: done[-1] + 1] if done else ())
    seconds = round(found["wall_seconds"] - found["seconds"]["start"], 3)
    samples = sum(lines[place].get("samples", 0) for place in done)
    speed = {"seconds": seconds, "samples_per_second": round(samples / seconds, 2) if seconds else 0.0}
    return speed if len(done) == steps else {**speed, "timed_steps": len(done)}


@dataclass(slots=True)
class _Session:
    """The time of one session, in pools of intervals; and what its lines claim from them. All in seconds."""

    since: float  # its beginning, as a date: it tells sessions apart
    now: float  # since its beginning; up to here, time lies in a pool
    start: float = 0.0
    training: float = 0.0  # intervals that a step ended
    evaluation: float = 0.0
    saving: float = 0.0
    standing: float = 0.0  # intervals that a loss, a new number of workers or a corruption ended
    forgotten: float = 0.0  # of an earlier session
    stepping: float = 0.0  # claims of the steps, `waiting` among them
    waiting: float = 0.0
    saved: float = 0.0
    recovering: float = 0.0
    wasted: float = 0.0

    def pass_until(self, when: float, at_most: float = math.inf) -> float:
        """Seconds until `when` that are in no pool yet. If the clock was set back, it is 0."""
        passed = max(0.0, min(when - self.now, at_most))
        self.now += passed
        return passed

    def share_out(self) -> dict[str, float]:
        """Give every second in a pool to one kind."""
        claimed = self.recovering + self.wasted
        slack = max(0.0, self.training - self.stepping)
        borrowed = min(slack, max(0.0, claimed - self.standing))
        standing, training = self.standing + borrowed, self.training - borrowed
        recovery = min(self.recovering, standing)
        data = min(self.waiting, training)
        saving = min(self.saved, training - data)
        return {
            "steps": training - data - saving,
            "start": self.start,
            "data": data,
            "evaluation": self.evaluation,
            "saving": self.saving + saving,
            "recovery": recovery,
            "waste": standing - recovery + self.forgotten,
        }


def _follow(lines: list[Mapping[str, Any]]) -> Iterable[_Session]:
    """The sessions that the lines describe, their time in pools."""
    session: _Session | None = None
    for line, is_forgotten in zip(lines, _after_what_was_forgotten(lines), strict=True):
        event = line["event"]
        if event == "RunStarted" or session is None:
            if session is not None:
                yield session
            since = line.get("since", line.get("when", 0.0))
            # If it is reported twice in one session, the time since the beginning must count once.
            again = session is not None and session.since == since
            session = _Session(since=since, now=session.now if session is not None and again else 0.0)
        _put(session, event, line, is_forgotten)
    if session is not None:
        yield session


def _put(session: _Session, event: str, line: Mapping[str, Any], is_forgotten: bool) -> None:
    """Put the interval that a line ends into its pool, and note what the line claims."""
    when = line.get("clock", line.get("when", session.since + session.now) - session.since)

    def read(name: str) -> float:
        return max(0.0, line.get(name, 0.0))

    match event:
        case "RunStarted":
            session.start += session.pass_until(when)
        case "StepDone":
            session.training += session.pass_until(when)
            session.stepping += read("seconds")
            session.waiting += min(read("data_seconds"), read("seconds"))
        case "Evaluated":
            session.evaluation += session.pass_until(when)
        case "CheckpointWritten":  # reported while other work goes on: only the waiting counts here
            waited = read("waited_seconds")
            here = session.pass_until(when, at_most=waited)
            session.saving += here
            session.saved += waited - here
        case "Recovered" | "Resized" | "Corrupted":
            claims = 0.0 if event == "Corrupted" else read("wasted_seconds") + read("seconds")
            passed = session.pass_until(when)
            session.standing += min(passed, claims) if is_forgotten else passed
            session.recovering += read("seconds")
            session.wasted += read("wasted_seconds")
        case "Resumed":
            session.forgotten += read("wasted_seconds")


def _after_what_was_forgotten(lines: list[Mapping[str, Any]]) -> list[bool]:
    """Which lines follow steps that a later session forgot: `Resumed` gives their time, not the interval."""
    found, floor = [], math.inf
    for line in reversed(lines):
        if line["event"] == "Resumed":
            floor = min(floor, line["step"])
        found.append(line.get("step", 0) > floor)
    return found[::-1]
