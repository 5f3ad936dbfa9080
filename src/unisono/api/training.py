"""Training, as a Python user calls it; the command line calls the same functions.

Owns the public signatures and the results that they return. The work is done in the packages below.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unisono.api.arguments import as_path, as_recipe, as_texts, refuse_overrides
from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.data.columns import hold
from unisono.data.ingest.frames import is_frame, take_columns
from unisono.data.items import Collate
from unisono.data.samplers import Sampler
from unisono.determinism import instruction_sets
from unisono.errors import RecipeError
from unisono.kernels.kernel import declared_kernels
from unisono.processes.fault_injection import parse
from unisono.processes.progress_table import PHASES
from unisono.runtime.launchers.launcher import (
    AUTO,
    Launcher,
    Training,
    choose,
    needs_supervisor,
    read_workers,
    refuse_within_import,
)
from unisono.runtime.launchers.rank_assignment import count_peers, restarted_by_torchrun
from unisono.runtime.logger_process import LoggerProcess
from unisono.runtime.runner import OpenInputs, Runner
from unisono.runtime.setup import Job, Resume, check_workers
from unisono.runtime.signals import noted
from unisono.storage import known_hashes
from unisono.storage.run_folder import choose_folder, complete, removed_if_empty
from unisono.tasks.kinds import OpenKind, find_kind, name_of
from unisono.tasks.own_inputs import OpenOwn
from unisono.tasks.task import Task
from unisono.tracking.delivery import Deliveries
from unisono.tracking.dispatcher import EventDispatcher, check_observers
from unisono.tracking.events import Observer
from unisono.tracking.logger import check as check_loggers
from unisono.tracking.reporter import Reporter
from unisono.tracking.terminal import print_now

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished run: its folder, and the content of summary.json."""

    folder: Path
    summary: Mapping[str, Any]
    task: Task | None = None

    @property
    def weights_sha256(self) -> str:
        """SHA-256 over the trained weights' names, dtypes, shapes and bytes in name order."""
        return str(self.summary["weights_sha256"])

    def module(self) -> nn.Module:
        """The trained module, in evaluation mode. For a text recipe see `unisono.load`."""
        from safetensors.torch import load_file

        if self.task is None:
            raise RecipeError("Trained.module() is for own tasks; for a text recipe call unisono.load(folder).")
        if self.task.backend != "torch":
            raise RecipeError(
                f"Trained.module() is for the backend 'torch', and this task's is {self.task.backend!r}. Read its "
                f"arrays from {str(self.folder / 'model' / 'model.safetensors')!r}."
            )
        module = self.task.build()
        module.load_state_dict(load_file(self.folder / "model" / "model.safetensors"))
        return module.eval()


def train(
    what: Task | Recipe | str | Path,
    data: Any = None,
    *,
    validation: Any = None,
    test: Any = None,
    collate: Collate | None = None,
    sampler: Sampler | None = None,
    workers: str | int = "auto",
    run: str | Path | None = None,
    name: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool | Literal["auto"] = False,
    accept_new_numerics: bool = False,
    allow_impure: bool = False,
    quiet: bool = False,
    as_json: bool = False,
    profile: bool = False,
    trace: Path | None = None,
    faults: Sequence[str] = (),
    observers: Sequence[Observer] = (),
    launcher: str | Launcher = "auto",
    **settings: Any,
) -> Trained:
    """Train on any number of workers; the weights' bits do not depend on it. Return the finished run.

    Args:
        what: a Task, with `data`; or a text Recipe, or the path of one, with `data` (a frame) or without.
        data, validation, test: for a task, columns, a frame of numbers, a dataset or (`data` alone) a stream of items,
            see docs/data.md; for a recipe, frames or lists with its text and label columns, instead of its files.
        collate: for a task, a function that makes one mapping of tensors from a list of a dataset's items.
        sampler: for a task, what each epoch visits: `unisono.weighted(weights)`, or a function (seed, epoch) → int64
            array of sample numbers. None: every sample once, in a new order.
        workers: a number, or "auto": all GPUs, else all cores, at most one per microbatch. Ignored under torchrun.
        run: the run folder, which must not exist unless `resume`; None: runs/NAME-001 and so on.
        name: of the run; None: the recipe's, or the task's class.
        overrides: "section.key=value", over the recipe.
        resume: continue from the folder's newest checkpoint; "auto": if there is a run that has not ended, else begin.
        accept_new_numerics, allow_impure: resume to other bits; train a model that is not pure, without the promise.
        quiet, as_json: print warnings only; print one JSON object per event.
        profile: write where the time went to the run folder. trace: a file for all digests, for `verify`.
        faults: faults to inject, to test that the run survives them: "kill(worker=1, step=7, phase=update)".
        observers: objects that receive each event of the run, and may request its end: see `unisono.Observer`.
        launcher: what starts workers; "auto": one worker is this process, more are forked. See docs/launchers.md.
        settings: keys of [train], such as epochs=3; "evaluate", "checkpoint", "recovery" and "tracking" take tables.

    Raises:
        UserError (an argument cannot be used), DivergedError, WorkerError, ObserverError, Interrupted, Preempted.
        Exception: if this process is the worker, whatever the task raises.
    """
    refuse_within_import()
    recipe = resolve(what, name, overrides, settings)
    inputs = _opener(what, recipe, {"train": data, "validation": validation, "test": test}, collate, sampler)
    with noted(), _place(recipe, run, resume) as (place, mode):
        if mode is not None:
            options = {"accept_new_numerics": accept_new_numerics, "allow_impure": allow_impure, "profile": profile}
            job = Job(recipe=recipe, folder=place, resume=mode, trace=trace and as_path("trace", trace), **options)
            begin = partial(run_job, reporter=Reporter(place, quiet=quiet, as_json=as_json), observers=observers)
            begin(job, inputs, workers=workers, faults=faults, launcher=launcher)
    return Trained(folder=place, summary=_read_summary(place), task=what if isinstance(what, Task) else None)


def _read_summary(place: Path) -> dict[str, Any]:
    """The files that worker 0 has written; another host can read them on shared storage only."""
    written = place / "summary.json"
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    return found


@contextmanager
def _place(
    recipe: Recipe, run: str | Path | None, resume: bool | Literal["auto"]
) -> Iterator[tuple[Path, Resume | None]]:
    """Within, the run has its folder, which is removed afterwards if nothing came into it; and how it begins."""
    place, mode = _choose_start(recipe, run, resume)
    with removed_if_empty(place):
        yield place, mode


def _choose_start(recipe: Recipe, run: str | Path | None, resume: bool | Literal["auto"]) -> tuple[Path, Resume | None]:
    """The run folder, and whether to resume its run; None if that has been trained to its end."""
    if resume not in (False, True, AUTO):
        raise RecipeError(f'resume = {resume!r}: allowed are True, False and "auto".')
    run = None if run is None else as_path("run", run)
    resume = resume or ("auto" if restarted_by_torchrun() else False)
    place = choose_folder(recipe.name, run, resume=resume, make=not count_peers())
    if resume == "auto" and (place / "summary.json").exists():
        print_now(
            f"{place} has been trained to its end: nothing is left to do. To train it longer, resume it with more "
            'train.epochs (not with "auto").'
        )
        return place, None
    return place, "auto" if resume == "auto" else "yes" if resume else "no"


def _opener(
    what: Task | Recipe | str | Path,
    recipe: Recipe,
    given: Mapping[str, Any],
    collate: Collate | None,
    sampler: Sampler | None,
) -> OpenInputs:
    """The function by which each worker opens its run inputs."""
    frames = {split: frame for split, frame in given.items() if frame is not None}
    if not isinstance(what, Task):
        for name, value in (("collate", collate), ("sampler", sampler)):
            if value is not None:
                raise RecipeError(
                    f"unisono.train(recipe, …, {name}=…): {name} is for a task of your own; a recipe's texts are put "
                    "together by its model. Leave it out."
                )
        kind = find_kind(recipe.task.kind)
        recipes.check_uses(recipe, kind.uses, recipe.task.kind)
        kind.warm()
        parts = {
            split: take_columns(frame, f"{split} frame") if is_frame(frame) else frame
            for split, frame in frames.items()
        }
        return OpenKind(recipe=recipe, frames=parts)
    if "train" not in frames:
        raise RecipeError(
            "unisono.train(task, data): a task needs data. Give columns, a frame of numbers or a torch dataset."
        )
    recipes.check_uses(recipe, frozenset(), recipe.task.kind)
    return OpenOwn(recipe=recipe, task=what, data=hold(frames), collate=collate, sampler=sampler)


def run_job(
    job: Job,
    open_inputs: OpenInputs,
    *,
    workers: str | int,
    reporter: Reporter,
    observers: Sequence[Observer] = (),
    faults: Sequence[str] = (),
    launcher: str | Launcher = AUTO,
) -> None:
    """Run a job in the workers that a launcher starts; "auto": see `launchers.launcher.choose`."""
    train = job.recipe.train
    check_observers(observers)
    check_loggers(job.recipe.tracking.loggers)
    instruction_sets.limit(train.numerics)  # workers inherit it
    if workers != AUTO:
        check_workers(job.recipe, read_workers(workers))
    declared_kernels()  # once, before workers are forked: otherwise each worker would import them
    given = as_texts("faults", "--fault", faults, "kill(worker=1, step=7)")
    injected = tuple(parse(fault, PHASES) for fault in given)
    chosen, count = choose(
        launcher,
        workers=workers,
        microbatches=train.microbatches,
        device=train.device,
        supervised=needs_supervisor(job.recipe, injected),
    )
    dispatcher = EventDispatcher(reporter, observers)

    def open_observer(may_fork: bool) -> EventDispatcher:
        if job.recipe.tracking.loggers:
            dispatcher.loggers = (LoggerProcess if may_fork else Deliveries)(job.recipe, dispatcher.warn)
        return dispatcher

    with known_hashes.unnamed_file() as hashes:
        chosen.train(
            Training(
                runner=Runner(job, open_inputs, hashes),
                recipe=job.recipe,
                folder=job.folder,
                workers=count,
                open_observer=open_observer,
                may_stop=bool(observers),
                faults=injected,
            )
        )


def resolve(
    what: Task | Recipe | str | Path, name: str | None, overrides: Sequence[str], settings: Mapping[str, Any]
) -> Recipe:
    """The recipe that the arguments of `train` describe.

    Raises:
        RecipeError: one of them cannot be used.
    """
    tables = {
        key: value for key, value in settings.items() if key in ("evaluate", "checkpoint", "recovery", "tracking")
    }
    train = {key: value for key, value in settings.items() if key not in tables}
    if isinstance(start := train.get("start_from"), str | Path) and str(start):
        train["start_from"] = str(Path(start).resolve())
    if isinstance(what, Task):
        refuse_overrides(as_texts("overrides", "--set", overrides, "train.epochs=3"), "a task")
        task = {"kind": name_of(what), **what.settings()}
        return recipes.check({"name": name or type(what).__name__, "task": task, "train": train, **tables})
    if not isinstance(what, (str, Path, Recipe)):
        raise RecipeError(_explain(what))
    what = as_recipe(what, overrides, "unisono.train")
    table = what.model_dump(mode="json", exclude_unset=True)
    for section, value in {"train": train, **tables}.items():
        table[section] = table.get(section, {}) | value
    return complete(recipes.check(table | ({"name": name} if name else {})))


def _explain(what: object) -> str:
    """Why a value cannot be trained, and what to do."""
    allowed = "allowed are a Task, a Recipe, or the path of one"
    if isinstance(what, type):
        return f"unisono.train({what.__name__}, …): a class; {allowed}. Make an instance: {what.__name__}()."
    if hasattr(what, "parameters") and hasattr(what, "forward"):
        return (
            f"unisono.train({type(what).__name__}(), …): a torch module; {allowed}. Write a Task whose build() returns "
            "the module and whose loss(module, microbatch) returns the sum of the losses and their number."
        )
    return f"unisono.train({type(what).__name__}, …): {allowed}."
