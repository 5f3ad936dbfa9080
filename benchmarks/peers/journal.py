"""What is read from what a run has written: how fast its steps were, when the first one ended, or why it failed.

Owns the two forms of a journal, the peers' lines and unisono's `metrics.jsonl`, and what is read from them. Starts
nothing and measures nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

REASON = re.compile(r"^(?:\[\w+\]:)?\s*([\w.]*(?:Error|Exception|Refused)\b.*)$", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A finished step, counted from 1. time: unix seconds at its end, in the worker that finished it last."""

    number: int
    time: float


def read_peer(content: str) -> list[Step]:
    """Read `RANK STEP TIME` lines; a last line that has not arrived in full is left out."""
    lines = [line.split() for line in content[: content.rfind("\n") + 1].splitlines()]
    return _collect((int(step), float(when)) for _, step, when in lines)


def read_unisono(content: str) -> list[Step]:
    """Read the StepDone events of a `metrics.jsonl`."""
    return _collect((event["step"], event["when"]) for event in _events(content))


def mean_loss(content: str) -> float:
    """The mean of the losses in a `metrics.jsonl`."""
    losses = [event["loss"] for event in _events(content)]
    return float(sum(losses) / len(losses))


def samples_per_second(steps: Sequence[Step], *, warm_up: int, samples_per_step: int) -> float:
    """From the end of step `warm_up` to the end of the last one.

    Raises:
        ValueError: there is no step after the warm-up.
    """
    if len(steps) <= warm_up or warm_up < 1:
        raise ValueError(f"{len(steps)} steps, {warm_up} of them to warm up: nothing is left to be timed")
    return (len(steps) - warm_up) * samples_per_step / (steps[-1].time - steps[warm_up - 1].time)


def explain(output: str, code: int | str) -> str:
    """What a failed command said: its last error, or its last line."""
    errors = [found for found in REASON.findall(output) if "ChildFailedError" not in found]
    lines = output.strip().splitlines()
    said = errors[-1] if errors else lines[-1] if lines else "it said nothing"
    return f"ended with {code}: {said[:300]}"


def _collect(found: Iterable[tuple[int, float]]) -> list[Step]:
    ends: dict[int, float] = {}
    for number, when in found:
        ends[number] = max(when, ends.get(number, when))
    if sorted(ends) != list(range(1, len(ends) + 1)):
        raise ValueError(f"steps are missing: {sorted(ends)}")
    return [Step(number=number, time=ends[number]) for number in sorted(ends)]


def _events(content: str) -> list[dict]:
    lines = content[: content.rfind("\n") + 1].splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "StepDone"]
