"""A run's output, for people and for programs that read it.

Owns the wording on standard output, and that no text controls the terminal. There is one class per form: a live
terminal, plain lines, JSON lines, and quiet.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from unisono.config.wording import readable
from unisono.processes.forking import flush_output, is_terminal
from unisono.storage.files import to_json
from unisono.tracking import events

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_REFRESHES = 0.1
SECONDS_WORTH_TELLING = 0.05
PARAMETERS_NAMED = 3


def choose_screen(*, quiet: bool, as_json: bool) -> events.Observer:
    """The form that the options and standard output need."""
    if as_json:
        return JsonLines()
    if quiet:
        return Quiet()
    return Live() if is_terminal(sys.stdout) else Lines()


def print_now(line: str) -> None:
    """Print a line at once, without buffering."""
    print(readable(line))
    flush_output()


def warn_now(message: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {readable(message)}", file=sys.stderr, flush=True)


class JsonLines:
    """Each event as a line of JSON, {"event": name, …}, on standard output."""

    def observe(self, event: events.Event) -> None:
        print_now(to_json({"event": type(event).__name__, **dataclasses.asdict(event)}))

    def close(self) -> None:
        return


class Quiet:
    """Warnings only, on standard error."""

    def observe(self, event: events.Event) -> None:
        if message := find_warning(event):
            warn_now(message)

    def close(self) -> None:
        return


class Lines:
    """Plain lines, for logs: a step's line every few seconds."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._last = 0.0

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            if not self._pace.count(event) or time.monotonic() - self._last < SECONDS_BETWEEN_LINES:
                return
            self._last = time.monotonic()
        if isinstance(event, events.RunStarted):
            self._pace.begin(event)
        for line in tell(event, self._pace):
            print_now(line)

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
            if not self._pace.count(event):
                return
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
            style = "yellow" if find_warning(event) else None
            # names may hold brackets and colons
            self._console.print(readable(line), style=style, soft_wrap=True, markup=False, emoji=False)
        if isinstance(event, events.RunStarted):
            self._pace.begin(event)
            if self._task is None:
                self._task = self._progress.add_task("training", total=event.steps, facts="")
                self._progress.start()
            self._progress.update(self._task, total=event.steps, completed=event.start_step)

    def close(self) -> None:
        self._progress.stop()


class Pace:
    """Samples and tokens per second since the start, and the newest accuracy. An event that is repeated counts once."""

    def __init__(self) -> None:
        self._samples = self._tokens = 0
        self._seconds = 0.0
        self._steps = 0
        self._last_step = 0
        self._evaluated: set[tuple[int, str]] = set()
        self.accuracy: float | None = None

    def begin(self, event: events.RunStarted) -> None:
        self._steps = event.steps
        self._last_step = event.start_step
        self._evaluated.clear()

    def count(self, event: events.StepDone) -> bool:
        """Count a step; return whether it is a new one."""
        if event.step <= self._last_step:
            return False
        self._last_step = event.step
        self._samples += event.samples
        self._tokens += event.tokens
        self._seconds += event.seconds
        return True

    def judge(self, event: events.Evaluated) -> bool:
        """Take over the accuracy; return whether this evaluation is a new one."""
        self.accuracy = event.scores.get("accuracy", self.accuracy)
        is_new = (event.step, event.split) not in self._evaluated
        self._evaluated.add((event.step, event.split))
        return is_new

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
    """An event in words: zero or more lines."""
    match event:
        case events.RunStarted():
            return _tell_start(event)
        case events.StepDone():
            return [f"epoch {event.epoch:.2f}  {pace.facts(event)}  {pace.time_left(event)}"]
        case events.Evaluated():
            if not pace.judge(event):
                return []
            scores = "  ".join(f"{name} {_number(name, value)}" for name, value in event.scores.items())
            return [
                f"after step {event.step} (epoch {event.epoch:.2f})  {event.split}: "
                f"{scores}{'  best so far' if event.best else ''}"
            ]
        case events.Recovered():
            return [_tell_recovery(event)]
        case events.Resized():
            return [
                f"going on from step {event.step} with {_count(event.workers, 'worker')} instead of {event.before}, "
                f"after {event.seconds:.1f} s"
            ]
        case events.Corrupted():
            return [f"warning: {_tell_corruption(event)}"]
        case events.Notice():
            return [f"warning: {event.message}" if event.warning else event.message]
        case events.RunEnded():
            return [
                *_tell_end(dict(event.summary)),
                f"run folder {event.folder}: curves.svg, metrics.jsonl, summary.json, model/",
            ]
    return []


def find_warning(event: events.Event) -> str | None:
    """The warning that an event needs, or None."""
    match event:
        case events.Notice(warning=True):
            return event.message
        case events.Recovered():
            return _tell_recovery(event)
        case events.Corrupted():
            return _tell_corruption(event)
    return None


def _tell_start(event: events.RunStarted) -> list[str]:
    each = event.microbatches_each
    microbatches = f"{each[0]} microbatches each" if len(set(each)) == 1 else f"{'+'.join(map(str, each))} microbatches"
    workers, threads = _count(event.workers, "worker"), _count(event.threads, "thread")
    promise = "" if event.pure else "  WITHOUT the promise of equal bits (--allow-impure)"
    lines = [
        f"{event.name}: {workers} on {event.device}, {threads}, {microbatches}, {event.samples_per_step} "
        "samples per step, "
        f"fingerprint {event.fingerprint}{promise}",
        f"{event.train_samples:,} samples, {event.parameters:,} parameters, {event.steps:,} steps, run "
        f"folder {event.folder}",
    ]
    return lines + ([f"going on after step {event.start_step}"] if event.start_step else [])


def _tell_recovery(event: events.Recovered) -> str:
    lost = event.wasted_seconds + event.seconds
    workers = _count(event.workers, "worker")
    told = f"{event.what}: going on from step {event.step} with {workers}, {lost:.1f} s lost"
    return "\n    ".join([told, *event.trace.splitlines()])


def _tell_corruption(event: events.Corrupted) -> str:
    named = event.parameters[:PARAMETERS_NAMED]
    more = len(event.parameters) - len(named)
    workers = "worker " + " or ".join(map(str, event.workers))
    return (
        f"{workers} computed wrong bits for microbatch {event.microbatch} of step {event.step}, in "
        f"{', '.join(named)}{f' and {more} more' if more else ''}; the step was not committed"
    )


def _tell_end(summary: dict[str, Any]) -> list[str]:
    steps = summary.get("timed_steps", summary["steps"])
    of = f" of {summary['steps']}" if "timed_steps" in summary else ""
    lines = [f"{steps}{of} steps in {summary['seconds']:.1f} s, {summary['samples_per_second']:,.0f} samples/s"]
    if "goodput" in summary:
        lines.append(_tell_goodput(summary))
    if summary["test"]:
        lines.append("test " + "  ".join(f"{name} {_number(name, value)}" for name, value in summary["test"].items()))
    return [*lines, f"weights   sha256 {summary['weights_sha256']}", f"optimizer sha256 {summary['optimizer_sha256']}"]


def _tell_goodput(summary: dict[str, Any]) -> str:
    """The share of steps that counted, and other work that took a noticeable time."""
    told = [
        f"{kind} {seconds:.1f} s"
        for kind, seconds in summary["goodput"]["seconds"].items()
        if kind != "steps" and seconds >= SECONDS_WORTH_TELLING
    ]
    counts = [
        _count(summary[name], one, several)
        for name, one, several in (("recoveries", "recovery", "recoveries"), ("resumes", "resume", "resumes"))
        if summary.get(name)
    ]
    line = f"goodput {summary['goodput']['share'] * 100:.1f} %"
    return line + (f": {', '.join(told)}" if told else "") + (f" ({', '.join(counts)})" if counts else "")


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def _number(name: str, value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2%}" if name == "accuracy" else f"{value:.4f}"
