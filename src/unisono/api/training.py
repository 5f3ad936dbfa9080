"""What a Python user calls; the command line calls the same functions.

Owns the public signatures and what each hands back. The work is done below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.data.columns import hold
from unisono.data.ingest.frames import is_frame, take_columns
from unisono.errors import Interrupted, Preempted, RecipeError
from unisono.processes.fault_injection import parse
from unisono.processes.progress_table import PHASES
from unisono.runtime.launchers import assignment_from_torchrun, count_workers, join_torchrun, restarted_by_torchrun
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.run import OpenInputs, Runner
from unisono.runtime.run_inputs import import_for_text, open_own, open_text
from unisono.runtime.setup import Job, Resume, check_workers
from unisono.runtime.supervisor import Supervisor
from unisono.runtime.supervisor_client import UnsupervisedClient
from unisono.runtime.worker import Stop
from unisono.storage.run_folder import choose_folder
from unisono.tasks.task import Task
from unisono.tracking.reporter import Reporter
from unisono.tracking.terminal import print_now

if TYPE_CHECKING:
    from torch import nn

    from unisono.exchange.protocol import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished run: its folder, and what summary.json holds."""

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
        module = self.task.build()
        module.load_state_dict(load_file(self.folder / "model" / "model.safetensors"))
        return module.eval()


def train(
    what: Task | Recipe | str | Path,
    data: Any = None,
    *,
    validation: Any = None,
    test: Any = None,
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
    **settings: Any,
) -> Trained:
    """Train on any number of workers; the weights' bits do not depend on it.

    Args:
        what: a Task, with `data`; or a text Recipe, or the path of one, with `data` (a frame) or without.
        data, validation, test: for a task, a mapping of columns, a frame of numbers or a map-style torch dataset; for a
            recipe, frames or lists with its text and label columns, instead of its files. See docs/frames.md.
        workers: a number, or "auto": all GPUs, else all cores, at most one per microbatch. Ignored under torchrun.
        run: the run folder, which must not exist unless `resume`; None: runs/NAME-001 and so on.
        name: of the run; None: the recipe's, or the task's class.
        overrides: "section.key=value", over the recipe.
        resume: go on from the folder's newest checkpoint; "auto": if there is a run that has not ended, else begin.
        accept_new_numerics: resume although the numerics fingerprint differs, to other bits.
        allow_impure: train a model that fails the purity probe, without the promise.
        quiet, as_json: print warnings only; print one JSON object per event.
        profile: write where the time went: profile.md, profile.json and trace.json in the run folder.
        trace: a folder for the digests of every contribution, which `verify` compares.
        faults: faults to inject, to see the run survive them: "kill(worker=1, step=7, phase=update)".
        settings: keys of [train], such as epochs=3; "evaluate", "checkpoint" and "recovery" take tables.

    Returns:
        The finished run. Under torchrun every process returns one.

    Raises:
        UserError (what was given cannot be used), DivergedError, WorkerError, Interrupted, Preempted: see errors.
    """
    recipe = resolve(what, name, overrides, settings)
    open_inputs = _opener(what, recipe, {"train": data, "validation": validation, "test": test})
    place, mode = _choose_start(recipe, run, resume)
    if mode is not None:
        job = Job(
            recipe=recipe,
            folder=place,
            resume=mode,
            accept_new_numerics=accept_new_numerics,
            allow_impure=allow_impure,
            trace=trace,
            profile=profile,
        )
        run_job(job, open_inputs, workers=workers, quiet=quiet, as_json=as_json, faults=faults)
    return Trained(folder=place, summary=_read_summary(place), task=what if isinstance(what, Task) else None)


def _read_summary(place: Path) -> dict[str, Any]:
    """What worker 0 has written; another host sees it on shared storage only."""
    written = place / "summary.json"
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    return found


def _choose_start(recipe: Recipe, run: str | Path | None, resume: bool | Literal["auto"]) -> tuple[Path, Resume | None]:
    """The run folder, and whether to resume what is in it; None where it has been trained to its end."""
    resume = resume or ("auto" if restarted_by_torchrun() else False)
    place = choose_folder(recipe.name, run, resume=resume)
    if resume == "auto" and (place / "summary.json").exists():
        print_now(f"{place} has been trained to its end: nothing is left to do.")
        return place, None
    return place, "auto" if resume == "auto" else "yes" if resume else "no"


def _opener(what: Task | Recipe | str | Path, recipe: Recipe, given: Mapping[str, Any]) -> OpenInputs:
    """How each worker comes to what it trains on."""
    frames = {split: frame for split, frame in given.items() if frame is not None}
    if not isinstance(what, Task):
        import_for_text()
        parts = {
            split: take_columns(frame, f"{split} frame") if is_frame(frame) else frame
            for split, frame in frames.items()
        }
        return lambda workers, notify: open_text(recipe, workers, notify, parts)
    if "train" not in frames:
        raise RecipeError(
            "unisono.train(task, data): a task needs data. Give columns, a frame of numbers or a torch dataset."
        )
    check_own_sections(recipe)
    held = hold(frames)
    return lambda workers, notify: open_own(recipe, what, **held)


def run_job(
    job: Job,
    open_inputs: OpenInputs,
    *,
    workers: str | int,
    quiet: bool,
    as_json: bool,
    faults: Sequence[str] = (),
) -> None:
    """Run a job in local workers under a supervisor, or as one of torchrun's workers."""
    train = job.recipe.train
    if workers != "auto":
        check_workers(job.recipe, int(workers))
    runner = Runner(job, open_inputs)
    assignment = assignment_from_torchrun()
    if assignment is not None:
        _run_alone(job, runner, assignment, quiet=quiet, as_json=as_json)
        return
    reporter = Reporter(job.folder, quiet=quiet, as_json=as_json)
    try:
        Supervisor(
            runner,
            recipe=job.recipe,
            folder=job.folder,
            observer=reporter,
            workers=count_workers(workers, train.microbatches, train.device),
            faults=[parse(fault, PHASES) for fault in faults],
        ).run()
    finally:
        reporter.close()


def _run_alone(job: Job, runner: Runner, assignment: RankAssignment, *, quiet: bool, as_json: bool) -> None:
    """Be one of torchrun's workers."""

    def act(assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop) -> None:
        observers = [Reporter(job.folder, quiet=quiet, as_json=as_json)] if assignment.rank == 0 else []
        client = UnsupervisedClient(observers, stop)
        try:
            rank, workers = assignment.local_rank, assignment.local_workers
            runner.train(exchange, device, client, local_rank=rank, local_workers=workers, again=False)
        except Interrupted as error:  # torchrun passes on only what wants the machine back
            raise Preempted(str(error)) from None
        finally:
            client.close()

    join_torchrun(assignment, act, threads=job.recipe.train.threads, device=job.recipe.train.device)


def resolve(
    what: Task | Recipe | str | Path, name: str | None, overrides: Sequence[str], settings: Mapping[str, Any]
) -> Recipe:
    """The recipe that the arguments of `train` describe."""
    tables = {key: value for key, value in settings.items() if key in ("evaluate", "checkpoint", "recovery")}
    train = {key: value for key, value in settings.items() if key not in tables}
    if isinstance(what, Task):
        return recipes.check({"name": name or type(what).__name__, "train": train, **tables})
    if isinstance(what, str | Path):
        what = recipes.load(what, tuple(overrides))
    table = what.model_dump(mode="json")
    table["train"] |= train
    for section, value in tables.items():
        table[section] |= value
    return recipes.check(table | ({"name": name} if name else {}))


def check_own_sections(recipe: Recipe) -> None:
    """Refuse keys of [train] that only the text presets heed: for an own task they would do nothing."""
    for key, meaningless in (("label_smoothing", 0.0), ("class_weights", "none"), ("gradient_checkpointing", False)):
        if getattr(recipe.train, key) != meaningless:
            raise RecipeError(
                f"'train.{key}' is for text recipes; in a task of your own it is a matter of your loss or module. "
                "Leave it out."
            )
