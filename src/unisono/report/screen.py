"""What a person, or a program reading our output, sees of a run.

Owns the wording on standard output. One class per way: a live terminal, plain lines, JSON lines, and quiet.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from unisono import events

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_REFRESHES = 0.1


def choose_screen(*, quiet: bool, as_json: bool) -> events.Observer:
    """The way that the options and standard output call for."""
    if as_json:
        return JsonLines()
    if quiet:
        return Quiet()
    return Live() if sys.stdout.isatty() else Lines()


class JsonLines:
    """Each event as a line of JSON, {"event": name, …}, on standard output."""

    def observe(self, event: events.Event) -> None:
        print(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}), flush=True)

    def close(self) -> None:
        return


class Quiet:
    """Warnings only, on standard error."""

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.Notice) and event.warning:
            print(f"warning: {event.message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        return


class Lines:
    """Plain lines, for logs: a step's line every few seconds."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._last = 0.0

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            self._pace.count(event)
            if time.monotonic() - self._last < SECONDS_BETWEEN_LINES:
                return
            self._last = time.monotonic()
        if isinstance(event, events.RunStarted):
            self._pace.begin(event)
        for line in tell(event, self._pace):
            print(line, flush=True)

    def close(self) -> None:
        return


class Live:
    """A terminal with a progress bar."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._pace = Pace()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            auto_refresh=False,
            transient=True,
        )
        self._task: TaskID | None = None
        self._last = 0.0

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.StepDone) and self._task is not None:
            self._pace.count(event)
            self._progress.update(
                self._task, completed=event.step, description=f"epoch {event.epoch:.2f}", facts=self._pace.facts(event)
            )
            if time.monotonic() - self._last > SECONDS_BETWEEN_REFRESHES:
                self._last = time.monotonic()
                self._progress.refresh()
            return
        if isinstance(event, events.RunEnded):
            self._progress.stop()
        for line in tell(event, self._pace):
            self._console.print(
                line, style="yellow" if isinstance(event, events.Notice) and event.warning else None, soft_wrap=True
            )
        if isinstance(event, events.RunStarted):
            self._pace.begin(event)
            self._task = self._progress.add_task("training", total=event.steps, completed=event.start_step, facts="")
            self._progress.start()

    def close(self) -> None:
        self._progress.stop()


class Pace:
    """Samples and tokens per second since the start, and the newest accuracy."""

    def __init__(self) -> None:
        self._samples = self._tokens = 0
        self._seconds = 0.0
        self._steps = 0
        self.accuracy: float | None = None

    def begin(self, event: events.RunStarted) -> None:
        self._steps = event.steps

    def count(self, event: events.StepDone) -> None:
        self._samples += event.samples
        self._tokens += event.tokens
        self._seconds += event.seconds

    def facts(self, event: events.StepDone) -> str:
        seconds = max(self._seconds, 1e-9)
        accuracy = f"  accuracy {self.accuracy:.1%}" if self.accuracy is not None else ""
        tokens = f"  {self._tokens / seconds:,.0f} tokens/s" if self._tokens > self._samples else ""
        speed = f"{self._samples / seconds:,.0f} samples/s{tokens}"
        return f"step {event.step}/{self._steps}  loss {event.loss:.4f}{accuracy}  {speed}"

    def time_left(self, event: events.StepDone) -> str:
        done = max(self._samples / max(event.samples, 1), 1)
        return f"{(self._steps - event.step) * self._seconds / done:,.0f} s left"


def tell(event: events.Event, pace: Pace) -> list[str]:
    """An event in words: no line, one, or a few."""
    match event:
        case events.RunStarted():
            each = event.microbatches_each
            microbatches = (
                f"{each[0]} microbatches each" if len(set(each)) == 1 else f"{'+'.join(map(str, each))} microbatches"
            )
            workers = "1 worker" if event.workers == 1 else f"{event.workers} workers"
            threads = "1 thread" if event.threads == 1 else f"{event.threads} threads"
            promise = "" if event.pure else "  WITHOUT the promise of equal bits (--allow-impure)"
            lines = [
                f"{event.name}: {workers} on {event.device}, {threads}, {microbatches}, {event.samples_per_step} "
                "samples per step, "
                f"fingerprint {event.fingerprint}{promise}",
                f"{event.train_samples:,} samples, {event.parameters:,} parameters, {event.steps:,} steps, run "
                f"folder {event.folder}",
            ]
            return lines + ([f"going on after step {event.start_step}"] if event.start_step else [])
        case events.StepDone():
            return [f"epoch {event.epoch:.2f}  {pace.facts(event)}  {pace.time_left(event)}"]
        case events.Evaluated():
            pace.accuracy = event.scores.get("accuracy", pace.accuracy)
            scores = "  ".join(f"{name} {_number(name, value)}" for name, value in event.scores.items())
            return [
                f"after step {event.step} (epoch {event.epoch:.2f})  {event.split}: "
                f"{scores}{'  best so far' if event.best else ''}"
            ]
        case events.Notice():
            return [f"warning: {event.message}" if event.warning else event.message]
        case events.RunEnded():
            return [
                *_tell_end(dict(event.summary)),
                f"run folder {event.folder}: curves.svg, metrics.jsonl, summary.json, model/",
            ]
    return []


def _tell_end(summary: dict[str, Any]) -> list[str]:
    lines = [f"{summary['steps']} steps in {summary['seconds']:.1f} s, {summary['samples_per_second']:,.0f} samples/s"]
    if summary["test"]:
        lines.append("test " + "  ".join(f"{name} {_number(name, value)}" for name, value in summary["test"].items()))
    return [*lines, f"weights   sha256 {summary['weights_sha256']}", f"optimizer sha256 {summary['optimizer_sha256']}"]


def _number(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4f}"
