"""Loggers: observers that record a run in a tool outside of its folder, found by name.

Owns the interface, what a logger is given, the registry, and the numbers and sentences that all loggers record.
`delivery.py` delivers each step to a logger once; each tool's needs are in a module of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

from unisono.config.offers import load_offer
from unisono.errors import RecipeError
from unisono.tracking import events

GROUP = "unisono.loggers"
"""The entry point group in which an installed package names its loggers."""


class Cursor:
    """Which events have been passed on. Those of one stream (steps, evaluations of a split, checkpoints) come in the
    order of their steps, so the last step of each stream is enough.

    passed: stream → its last step.
    """

    def __init__(self, passed: Mapping[str, int] | None = None) -> None:
        self.passed = dict(passed or {})

    def admit(self, event: events.Event) -> bool:
        """Whether an event is new; it counts as passed on from now on. Events without a stream always are new."""
        stream = find_stream(event)
        if stream is None:
            return True
        step = event.step  # type: ignore[union-attr]
        if step <= self.passed.get(stream, 0):
            return False
        self.passed[stream] = step
        return True

    def reach(self, stream: str, step: int) -> None:
        """Note that a log already holds a stream up to a step."""
        self.passed[stream] = max(step, self.passed.get(stream, 0))

    @property
    def step(self) -> int:
        """The last step of training that was passed on; 0: none."""
        return self.passed.get("train", 0)


def find_stream(event: events.Event) -> str | None:
    """The stream of an event that may be repeated after a loss; None: it occurs once."""
    match event:
        case events.StepDone():
            return "train"
        case events.Evaluated():
            return event.split
        case events.CheckpointWritten():
            return "checkpoints"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerContext:
    """What a logger is opened with.

    recipe: plain values, section by section. run_folder: of the run. folder: for the logger's own files; not made yet.
    is_shared: whether other runs use `folder` too. project: of the recipe's [tracking]. cursor: what the log holds for
    certain; all later events are passed on again. A tool with exact knowledge calls `cursor.reach`. memory: text
    that is kept with the run, such as the tool's name for it; empty when the run is new.
    """

    recipe: Mapping[str, Any]
    run_folder: Path
    folder: Path
    is_shared: bool
    project: str
    cursor: Cursor
    memory: dict[str, str]


class Logger(Protocol):
    """Records a run in a tool. It gets each step, evaluation and checkpoint once, in order, RunStarted first. If it
    raises, it is switched off, with a warning; the run goes on.

    Events reach it in a process of its own (under torchrun: in worker 0's), so it may be slow and use threads.
    """

    def observe(self, event: events.Event) -> None: ...

    def flush(self) -> None:
        """Return when all observed events are stored where they survive the process. Called about once a second."""
        ...

    def close(self) -> None:
        """The run has ended (RunEnded was observed), or stops here and may be resumed later."""
        ...


OpenLogger = Callable[[LoggerContext], Logger]


@dataclass(frozen=True, slots=True, kw_only=True)
class _BuiltIn:
    """module: its `open_logger` makes the logger. packages: what it imports; the extra has the logger's name."""

    module: str
    packages: tuple[str, ...]


_BUILT_IN = {
    "tensorboard": _BuiltIn(module="unisono.tracking.tensorboard", packages=("tensorboard",)),
    "wandb": _BuiltIn(module="unisono.tracking.wandb", packages=("wandb",)),
    "mlflow": _BuiltIn(module="unisono.tracking.mlflow", packages=("mlflow", "sqlalchemy", "alembic")),
}
_registered: dict[str, OpenLogger] = {}


def register(name: str, open_logger: OpenLogger) -> None:
    """Offer a logger under a name, in this process. A package does it with an entry point instead."""
    _registered[name] = open_logger


def allowed_names() -> list[str]:
    """The names allowed in [tracking] loggers."""
    return sorted({*_BUILT_IN, *_registered, *(point.name for point in entry_points(group=GROUP))})


def check(names: Iterable[str]) -> None:
    """Refuse loggers that cannot be opened. Those of this package are not imported for it.

    Raises:
        RecipeError: a name is unknown or is given twice, or a package is not installed or is broken.
    """
    seen: set[str] = set()
    for name in names:
        known = allowed_names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else "Name one of them, or install the package that offers it."
            raise RecipeError(f"'tracking.loggers' has {name!r}: allowed are {', '.join(known)}. {hint}")
        if name in seen:
            raise RecipeError(f"'tracking.loggers' has {name!r} twice. Name each logger once.")
        seen.add(name)
        if name in _registered:
            continue
        built_in = _BUILT_IN.get(name)
        if built_in is None:
            _load_offered(name)
        elif missing := [package for package in built_in.packages if find_spec(package) is None]:
            remedy = f"pip install 'unisono[{name}]'"
            raise RecipeError(
                f"'tracking.loggers' has {name!r}, which needs {', '.join(missing)}: not installed. Install it ("
                f"{remedy}), or leave {name!r} out."
            )


def find(name: str) -> OpenLogger:
    """The function that opens the logger of this name. The name was checked before."""
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        found: OpenLogger = import_module(_BUILT_IN[name].module).open_logger
        return found
    return _load_offered(name)


def _load_offered(name: str) -> OpenLogger:
    """The function that an installed package offers under this name."""
    found = load_offer(entry_points(group=GROUP), name, "logger", RecipeError)
    if not callable(found):
        raise RecipeError(
            f"logger {name!r}: an installed package offers {type(found).__name__} {found!r}; allowed is a function "
            "that opens a logger, as docs/tracking.md describes. Repair or uninstall the package."
        )
    return cast("OpenLogger", found)


def measure(event: events.Event) -> dict[str, float]:
    """The numbers of a step or an evaluation, by the name that all loggers give them; empty for other events."""
    if isinstance(event, events.Evaluated):
        return {f"{event.split}/{name}": float(value) for name, value in event.scores.items()}
    if not isinstance(event, events.StepDone):
        return {}
    found = {
        "train/loss": event.loss,
        "train/gradient_norm": event.gradient_norm,
        "train/learning_rate": event.learning_rate,
        "train/epoch": event.epoch,
        "train/tokens": float(event.tokens),
    }
    if event.seconds > 0:  # unknown for a step whose worker was lost before it reported
        found["train/samples_per_second"] = event.samples / event.seconds
        found["train/tokens_per_second"] = event.tokens / event.seconds
    return found


def describe(event: events.Event) -> tuple[str, str, int] | None:
    """What happened to the run, in words: (kind, sentence, step); None for other events."""
    match event:
        case events.Recovered():
            lost = event.wasted_seconds + event.seconds
            return "recovery", f"{event.what}; {event.workers} workers went on, {lost:.1f} s lost", event.step
        case events.Resized():
            return "resize", f"{event.before} → {event.workers} workers, in {event.seconds:.2f} s", event.step
        case events.Corrupted():
            suspects = " or ".join(map(str, event.workers))
            return "corruption", f"worker {suspects} computed wrong bits for microbatch {event.microbatch}", event.step
        case events.CheckpointWritten():
            return "checkpoint", event.path, event.step
    return None


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """{"train": {"epochs": 3}} → {"train.epochs": 3}. Lists become text; None is left out."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return found
