"""What a Python user calls; the command line calls the same functions.

Owns the public signatures and what each hands back. The work is done below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.data.columns import hold
from unisono.data.ingest.frames import is_frame, take_columns
from unisono.errors import RecipeError
from unisono.processes.fault_injection import parse
from unisono.processes.progress_table import PHASES
from unisono.runtime.launchers.launcher import (
    AUTO,
    Launcher,
    Training,
    choose,
    needs_supervisor,
    refuse_within_import,
)
from unisono.runtime.launchers.rank_assignment import restarted_by_torchrun
from unisono.runtime.run import OpenInputs, Runner
from unisono.runtime.run_inputs import OpenOwn, OpenText, import_for_text
from unisono.runtime.setup import Job, Resume, check_workers
from unisono.storage.run_folder import choose_folder
from unisono.tasks.task import Task
from unisono.tracking.reporter import Reporter
from unisono.tracking.terminal import print_now

if TYPE_CHECKING:
    from torch import nn


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
    launcher: str | Launcher = "auto",
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
        trace: a folder for the digests of contributions, which `verify` compares.
        faults: faults to inject, to see the run survive them: "kill(worker=1, step=7, phase=update)".
        launcher: what starts workers; "auto": one worker is this process, more are forked. See docs/launchers.md.
        settings: keys of [train], such as epochs=3; "evaluate", "checkpoint" and "recovery" take tables.

    Returns:
        The finished run. Under torchrun every process returns one.

    Raises:
        UserError (what was given cannot be used), DivergedError, WorkerError, Interrupted, Preempted: see errors.
        Exception: of a worker that is this process, what the task raises.
    """
    refuse_within_import()
    recipe = resolve(what, name, overrides, settings)
    open_inputs = _opener(what, recipe, {"train": data, "validation": validation, "test": test})
    place, mode = _choose_start(recipe, run, resume)
    if mode is not None:
        job = Job(
            recipe=recipe, folder=place, resume=mode, accept_new_numerics=accept_new_numerics,
            allow_impure=allow_impure, trace=trace, profile=profile,
        )  # fmt: skip
        run_job(job, open_inputs, workers=workers, quiet=quiet, as_json=as_json, faults=faults, launcher=launcher)
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
        return OpenText(recipe=recipe, frames=parts)
    if "train" not in frames:
        raise RecipeError(
            "unisono.train(task, data): a task needs data. Give columns, a frame of numbers or a torch dataset."
        )
    check_own_sections(recipe)
    return OpenOwn(recipe=recipe, task=what, data=hold(frames))


def run_job(
    job: Job,
    open_inputs: OpenInputs,
    *,
    workers: str | int,
    quiet: bool,
    as_json: bool,
    faults: Sequence[str] = (),
    launcher: str | Launcher = AUTO,
) -> None:
    """Run a job in the workers that a launcher starts; "auto": see `launchers.launcher.choose`."""
    train = job.recipe.train
    if workers != AUTO:
        check_workers(job.recipe, int(workers))
    injected = tuple(parse(fault, PHASES) for fault in faults)
    chosen, count = choose(
        launcher,
        workers=workers,
        microbatches=train.microbatches,
        device=train.device,
        supervised=needs_supervisor(job.recipe, injected),
    )
    chosen.train(
        Training(
            runner=Runner(job, open_inputs),
            recipe=job.recipe,
            folder=job.folder,
            workers=count,
            new_observer=lambda: Reporter(job.folder, quiet=quiet, as_json=as_json),
            faults=injected,
        )
    )


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
