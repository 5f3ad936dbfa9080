"""Where the time of a run's steps went: the workers' spans side by side, as shares, a table and a trace.

Waiting is separated from exchanging by comparing workers: until the last worker reaches a call, all others wait; from
then on they exchange. The clocks of one host are one clock. Another host's clock is shifted so that calls end, in the
median, when worker 0's calls end; so between hosts the separation is as exact as the time of a message.

Owns the figures and their wording; `engine/profile.py` owns the spans.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from unisono.engine.profile import PHASES, Span
from unisono.processes.progress_table import CALLS
from unisono.storage.files import to_json, write_text

Told = Mapping[str, Any]
"""One worker's report, plain values: "host", "steps", "flop", "peak", "memory", "problems"."""
MEMORY = {
    "parameters": "parameters and buffers",
    "tree": "gradients: the tree's buffers",
    "gradients": "gradients: one microbatch's own",
    "optimiser": "optimiser state, its shard",
    "activations": "activations of its largest microbatch",
    "peak_resident": "peak resident set",
    "peak_device": "peak on the device",
    "snapshot": "snapshot, one for all workers of the host",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShare:
    """One worker's part of one step. `told`: number of the worker's report; `first`: the group's first step."""

    rank: int
    told: int
    workers: int
    first: bool
    spans: list[Span]


Steps = dict[int, list[StepShare]]
"""Step → its parts, in order of rank; calls of the exchange are split into wait and exchange."""


def merge(reports: Sequence[Told]) -> Steps:
    """Put the workers' spans side by side."""
    steps: Steps = {}
    for number, told in enumerate(reports):
        for step, one in told["steps"].items():
            spans = [(str(phase), int(place), int(start), int(end)) for phase, place, start, end in one["spans"]]
            part = StepShare(rank=one["rank"], told=number, workers=one["workers"], first=one["first"], spans=spans)
            steps.setdefault(int(step), []).append(part)
    behind = _clocks([told["host"] for told in reports], steps)
    return {
        step: _split(sorted((_shift(part, behind[part.told]) for part in parts), key=lambda part: part.rank))
        for step, parts in sorted(steps.items())
    }


def _clocks(hosts: Sequence[str], steps: Steps) -> list[int]:
    """The nanoseconds by which each worker's clock is ahead of worker 0's."""
    ends: list[dict[tuple[int, int], int]] = [{} for _ in hosts]
    for step, parts in steps.items():
        for part in parts:
            ends[part.told].update({(step, place): end for place, (_, end) in enumerate(_calls(part))})
    ahead = []
    for host, mine in zip(hosts, ends, strict=True):
        common = [mine[call] - ends[0][call] for call in mine.keys() & ends[0].keys()]
        ahead.append(round(median(common)) if common and host != hosts[0] else 0)
    return ahead


def _calls(part: StepShare) -> list[tuple[int, int]]:
    """Start and end of each call of the exchange."""
    return [(start, end) for phase, _, start, end in part.spans if phase in CALLS]


def _shift(part: StepShare, ahead: int) -> StepShare:
    spans = [(phase, place, start - ahead, end - ahead) for phase, place, start, end in part.spans]
    return StepShare(rank=part.rank, told=part.told, workers=part.workers, first=part.first, spans=spans)


def _split(parts: list[StepShare]) -> list[StepShare]:
    """Cut each call at the time when the last worker reached it. If workers are missing, or made different calls, their
    calls cannot be compared, and count as exchange."""
    calls = [_calls(part) for part in parts]
    comparable = len(parts) == parts[0].workers and len({len(one) for one in calls}) == 1
    arrived = [max(start for start, _ in together) for together in zip(*calls, strict=False)] if comparable else []
    result = []
    for part in parts:
        spans: list[Span] = []
        coming = iter(arrived)
        for phase, place, start, end in part.spans:
            if phase not in CALLS:
                spans.append((phase, place, start, end))
                continue
            all_there = min(max(next(coming, start), start), end)
            spans += [("wait", place, start, all_there)] if all_there > start else []
            spans.append(("exchange", place, all_there, end))
        result.append(StepShare(rank=part.rank, told=part.told, workers=part.workers, first=part.first, spans=spans))
    return result


def whole_steps(steps: Steps) -> Steps:
    """The steps that the figures describe: all workers have reported them. A group's first step, which touches memory
    for the first time, is used only if there is no other."""
    whole = {step: parts for step, parts in steps.items() if len(parts) == parts[0].workers}
    later = {step: parts for step, parts in whole.items() if not any(part.first for part in parts)}
    return later or whole or steps


def summarise(reports: Sequence[Told], facts: Mapping[str, Any]) -> dict[str, Any]:
    """All figures, plain values: what profile.json holds. `facts` come first.

    "phases": name → "seconds" per step (each worker's median over steps, then the mean over workers), "lowest" and
    "highest" (the least and greatest of these medians), and "share" of the steps' wall time. The shares add up to 1.
    """
    steps = whole_steps(merge(reports))
    if not steps:
        return {**facts, "steps": [], "problems": ["no step was recorded"]}
    spent = {step: [_add_up(part) for part in parts] for step, parts in steps.items()}
    wall = sum(sum(one.values()) for parts in spent.values() for one in parts)
    phases = {}
    for phase in PHASES:
        workers: dict[int, list[float]] = {}
        for step, parts in steps.items():
            for part, one in zip(parts, spent[step], strict=True):
                workers.setdefault(part.rank, []).append(one[phase] / 1e9)
        each = [median(seconds) for seconds in workers.values()]
        phases[phase] = {
            "seconds": _mean(each),
            "lowest": min(each),
            "highest": max(each),
            "share": sum(one[phase] for parts in spent.values() for one in parts) / wall,
        }
    return {
        **facts,
        "steps": [step + 1 for step in steps],
        "workers": next(reversed(steps.values()))[0].workers,
        "step_seconds": median(_mean(sum(one.values()) / 1e9 for one in parts) for parts in spent.values()),
        "phases": phases,
        "model": _rate(reports, steps, spent),
        "memory": [told["memory"] for told in reports],
        "problems": [problem for told in reports for problem in told["problems"]],
    }


def _add_up(part: StepShare) -> dict[str, int]:
    """Nanoseconds of each phase; the time after the step is not in any of them."""
    found = dict.fromkeys(PHASES, 0)
    for phase, _, start, end in part.spans:
        if phase in found:
            found[phase] += end - start
    return found


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given)


def _rate(reports: Sequence[Told], steps: Steps, spent: Mapping[int, list[dict[str, int]]]) -> dict[str, Any] | None:
    """The model's speed beside the machine's, per worker; None if either was not measured, or no flop were counted."""
    rows = [
        (reports[part.told]["flop"].get(str(step), 0), one)
        for step, parts in steps.items()
        for part, one in zip(parts, spent[step], strict=True)
    ]
    flop = sum(count for count, _ in rows)
    peaks = [told["peak"] for told in reports if told["peak"]]
    if not flop or not peaks:
        return None
    peak = {dtype: _mean(one[dtype] for one in peaks) for dtype in peaks[0]}
    taken = max(peak, key=lambda dtype: peak[dtype])
    per_second = flop / sum(sum(one.values()) for _, one in rows) * 1e9
    computing = sum(one["forward"] + one["backward"] + one["assist"] for _, one in rows)
    return {
        "flop_per_step": flop / len(steps),
        "flop_per_second": per_second,
        "flop_per_second_computing": flop / max(computing, 1) * 1e9,
        "peak": peak,
        "peak_taken": taken,
        "utilisation": per_second / peak[taken],
    }


def tell(summary: Mapping[str, Any]) -> str:
    """The figures as Markdown: what profile.md holds."""
    name, workers = summary["name"], summary.get("workers", 0)
    lines = [f"# Where the time went: {name}", ""]
    if summary["steps"]:
        first, last, count = summary["steps"][0], summary["steps"][-1], len(summary["steps"])
        lines += [
            f"{workers} {'worker' if workers == 1 else 'workers'} on {summary['device']}, threads each: "
            f"{summary['threads']}. {count} {'step' if count == 1 else 'steps'} from {first} to {last}, "
            f"{summary['step_seconds']:.4g} s each in the median.",
            "",
            *_tell_phases(summary["phases"]),
            *_tell_model(summary["model"]),
            "",
            *_tell_memory(summary["memory"]),
        ]
    lines += [f"\nNot measured: {problem}" for problem in dict.fromkeys(summary["problems"])]
    lines += ["", "trace.json shows every step: open it in ui.perfetto.dev or chrome://tracing."]
    return "\n".join(lines) + "\n"


def _tell_phases(phases: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = [
        "| phase     | s per step | least to most, by worker |   share |",
        "|-----------|-----------:|-------------------------:|--------:|",
    ]
    for phase, one in phases.items():
        spread = f"{one['lowest']:.4f} to {one['highest']:.4f}"
        lines.append(f"| {phase:<9} | {one['seconds']:>10.4f} | {spread:>24} | {one['share']:>7.1%} |")
    return [*lines, ""]


def _tell_model(model: Mapping[str, Any] | None) -> list[str]:
    if model is None:
        return []
    peaks = ", ".join(f"{dtype} {_size(speed / 1e9)}" for dtype, speed in model["peak"].items())
    return [
        f"Model: {_size(model['flop_per_step'] / 1e9)} GFLOP per step. A worker does "
        f"{_size(model['flop_per_second'] / 1e9)} GFLOP/s over the whole step, "
        f"{_size(model['flop_per_second_computing'] / 1e9)} in forward and backward.",
        f"torch.mm, with all workers at it, does in GFLOP/s: {peaks}. The step reaches {model['utilisation']:.1%} "
        f"of {model['peak_taken']}'s.",
    ]


def _tell_memory(memory: Sequence[Mapping[str, int]]) -> list[str]:
    lines = [
        "| memory of a worker, the most of all       |        MB |",
        "|-------------------------------------------|----------:|",
    ]
    for kind, wording in MEMORY.items():
        sizes = [one[kind] for one in memory if kind in one]
        if sizes:
            lines.append(f"| {wording:<41} | {_size(max(sizes) / 1e6):>9} |")
    return lines


def _size(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def trace(reports: Sequence[Told]) -> str:
    """The Trace Event Format, which chrome://tracing and Perfetto show: one row per worker, a complete event per span,
    with step (from 1) and microbatch (where there is one) in its arguments. Times in microseconds since the first."""
    steps = merge(reports)
    begun = min((part.spans[0][2] for parts in steps.values() for part in parts if part.spans), default=0)
    ranks = sorted({part.rank for parts in steps.values() for part in parts})
    found: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": rank, "args": {"name": f"worker {rank}"}} for rank in ranks
    ]
    for step, parts in steps.items():
        for part in parts:
            for phase, place, start, end in part.spans:
                arguments = {"step": step + 1, **({"microbatch": place} if place >= 0 else {})}
                times = {"ts": (start - begun) / 1e3, "dur": (end - start) / 1e3}
                found.append({"ph": "X", "name": phase, "pid": 0, "tid": part.rank, **times, "args": arguments})
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": found}, separators=(",", ":")) + "\n"


def write(folder: Path, reports: Sequence[Told], facts: Mapping[str, Any]) -> str:
    """Write profile.md, profile.json and trace.json; return the text of the first, for the screen."""
    summary = summarise(reports, facts)
    told = tell(summary)
    write_text(folder / "profile.md", told)
    write_text(folder / "profile.json", to_json(summary, indent=1) + "\n")
    write_text(folder / "trace.json", trace(reports))
    return told
