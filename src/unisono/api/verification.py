"""Verification: train under several numbers of workers and compare every bit.

Owns the comparison of traces and hashes, and its table. Each training is an ordinary one, with a trace.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisono.api.arguments import as_counts
from unisono.api.training import Trained, resolve, train
from unisono.config.recipe import Recipe
from unisono.data.ingest.frames import settle
from unisono.data.items import Collate
from unisono.data.samplers import Sampler
from unisono.runtime.launchers.launcher import AUTO, Launcher
from unisono.runtime.setup import check_workers
from unisono.tasks.task import Task
from unisono.tracking.terminal import print_now


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first place where two runs differ. `microbatch` is None where all contributions agree and the new weights
    do not."""

    workers: tuple[int, int]
    step: int
    microbatch: int | None
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        where = (
            f"microbatch {self.microbatch}"
            if self.microbatch is not None
            else "after the exchange, every contribution being equal"
        )
        names = ", ".join(self.parameters[:5]) + (
            f" and {len(self.parameters) - 5} more" if len(self.parameters) > 5 else ""
        )
        return f"{self.workers[0]} and {self.workers[1]} workers first differ at step {self.step}, {where}: {names}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result: number of workers → the hashes of weights and optimiser state; the first difference, if there is
    one."""

    hashes: dict[int, tuple[str, str]]
    difference: Difference | None

    def __bool__(self) -> bool:
        """Whether every bit was equal."""
        return self.difference is None and len(set(self.hashes.values())) == 1


def verify(
    what: Task | Recipe | str | Path,
    data: Any = None,
    *,
    collate: Collate | None = None,
    sampler: Sampler | None = None,
    workers: Sequence[int] = (1, 2, 3),
    steps: int = 0,
    overrides: Sequence[str] = (),
    launcher: str | Launcher = AUTO,
    say: Callable[[str], None] = print_now,
    **settings: Any,
) -> Verdict:
    """Train under each number of workers and compare contributions, weights and optimiser state bit for bit.

    Args:
        what, data, collate, sampler, overrides, launcher, settings: as for `unisono.train`.
        workers: the numbers to compare; the others are compared with the first.
        steps: stop after this number of steps; 0: train to the end.

    Raises:
        UserError: what was given cannot be used.
    """
    if steps:
        settings["max_steps"] = steps
    workers = as_counts(workers)
    recipe = resolve(what, None, overrides, settings)
    for count in workers:
        check_workers(recipe, count)
    data = settle(data)  # a stream can be read once only
    with tempfile.TemporaryDirectory(prefix="unisono-verify-") as scratch:
        runs: dict[int, Trained] = {}
        for count in workers:
            folder = Path(scratch) / f"workers-{count}"
            folder.mkdir()
            subject = what if isinstance(what, Task) else recipe
            given = dict(settings) if isinstance(what, Task) else {}
            given |= {"collate": collate, "sampler": sampler, "trace": folder, "launcher": launcher}
            runs[count] = train(subject, data, workers=count, run=folder / "run", quiet=True, **given)
            seconds = runs[count].summary["seconds"]
            say(f"{count} worker{'s' if count > 1 else ''}: {runs[count].summary['steps']} steps in {seconds:.1f} s")
        traces = {count: _read(Path(scratch) / f"workers-{count}") for count in runs}
        first = workers[0]
        differences = [
            found for count in workers[1:] if (found := compare(traces[first], traces[count], (first, count)))
        ]
    hashes = {count: (run.weights_sha256, str(run.summary["optimizer_sha256"])) for count, run in runs.items()}
    verdict = Verdict(hashes=hashes, difference=min(differences, key=lambda found: found.step, default=None))
    for line in table(verdict):
        say(line)
    return verdict


def table(verdict: Verdict) -> list[str]:
    """The hashes, one line per number of workers, and the result."""
    lines = ["", "workers  weights           optimizer"]
    lines += [f"{count:>7}  {weights[:16]}  {optimizer[:16]}" for count, (weights, optimizer) in verdict.hashes.items()]
    return [
        *lines,
        "",
        "equal, bit for bit" if verdict else f"NOT EQUAL: {verdict.difference or 'the final hashes differ'}",
    ]


Trace = dict[tuple[int, int | None], dict[str, str]]
"""(step, microbatch, or None for the weights after the step) → name → digest."""


def compare(one: Trace, other: Trace, workers: tuple[int, int]) -> Difference | None:
    """The first difference of two traces: earliest step, contributions before the new weights."""
    for step, microbatch in sorted(one.keys() | other.keys(), key=lambda key: (key[0], key[1] is None, key[1] or 0)):
        left, right = one.get((step, microbatch), {}), other.get((step, microbatch), {})
        names = tuple(name for name in dict.fromkeys([*left, *right]) if left.get(name) != right.get(name))
        if names:
            named = tuple(name for name in names if name != "loss") or names
            return Difference(workers=workers, step=step, microbatch=microbatch, parameters=named)
    return None


def _read(folder: Path) -> Trace:
    trace: Trace = {}
    for path in sorted(folder.glob("trace-*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if "weights" in line:
                trace[(line["step"], None)] = line["weights"]
            else:
                trace[(line["step"], line["microbatch"])] = {"loss": line["loss"], **line["parts"]}
    return trace
