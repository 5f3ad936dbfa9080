"""How a run continues from a checkpoint: with the same recipe, or beyond its end.

Owns the comparison of recipe, data and numerics with those of the checkpoint, and what may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unisono.config.recipe import Recipe, to_table
from unisono.config.sections import TEXT
from unisono.engine import numerics
from unisono.engine.state import TrainState
from unisono.errors import DamagedError, RunFolderError
from unisono.storage import checkpoints

LENGTHENING = {"train.epochs", "train.max_steps", "evaluate.patience"}
"""Keys that may change once a run has ended, so that it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """What is to continue: the recipe and numerics of now, the number of steps that they plan, and the run folder's
    name. accepts: whether other numerics are accepted."""

    recipe: Recipe
    fingerprint: Mapping[str, Any]
    total_steps: int
    folder: str
    accepts: bool


def resume(now: Resumption, state: TrainState, saved: checkpoints.Saved) -> list[str]:
    """Load a checkpoint into the state; return warnings.

    Raises:
        RunFolderError: it is one of another recipe, or of other data.
        NumericsError: it was computed with other numerics.
        DamagedError: it does not fit the model.
    """
    changed = _changed_keys(now.recipe, saved)
    longer = bool(changed) and changed.keys() <= LENGTHENING and _has_ended(saved)
    if changed and not longer:
        raise RunFolderError(
            f"--resume: the recipe has changed: {_list(changed)}. Resume with the recipe that began the run, or start "
            "a new run"
            + (
                "; a run may be made longer once it has ended."
                if changed.keys() <= LENGTHENING
                else ", with train.start_from if it should begin with these weights."
            )
        )
    warnings = _compare_numerics(now, saved)
    try:
        state.restore(checkpoints.read(saved))
    except (KeyError, RuntimeError) as error:
        raise DamagedError(
            f"{str(saved.folder)!r} does not fit this model: {error}. Resume with the recipe that began the run."
        ) from error
    if longer:
        warnings.append(_lengthen(now, state, saved, changed))
    return warnings


def _changed_keys(recipe: Recipe, saved: checkpoints.Saved) -> dict[str, tuple[Any, Any]]:
    """Key → (value now, value in the checkpoint), for each that differs."""
    known = decisive(Recipe())  # a key that is newer than the run had its default
    mine, theirs = known | decisive(recipe), known | saved.facts["recipe"]
    keys = sorted(mine.keys() | theirs.keys())
    return {key: (mine.get(key), theirs.get(key)) for key in keys if mine.get(key) != theirs.get(key)}


def _list(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{key} = {now!r} (was {before!r})" for key, (now, before) in changed.items())


def _has_ended(saved: checkpoints.Saved) -> bool:
    """Whether no step was left to do: the planned ones are done, patience is over, or an observer requested the end."""
    facts = saved.facts
    patience = facts["recipe"].get("evaluate.patience", 0)
    settled = bool(patience) and facts["evaluations_since_best"] >= patience
    return bool(facts["step"] >= facts["total_steps"] or settled or facts.get("finished"))


def _lengthen(now: Resumption, state: TrainState, saved: checkpoints.Saved, changed: dict[str, tuple[Any, Any]]) -> str:
    """Let a run that has ended go on to the end that its recipe has now; return the notice.

    Raises:
        RunFolderError: nothing is left to do, so the change would have no effect.
    """
    total, before = now.total_steps, int(saved.facts["total_steps"])
    patience = now.recipe.evaluate.patience
    if total <= state.step or (patience and state.evaluations_since_best >= patience):
        raise RunFolderError(
            f"--resume: the run has ended after step {state.step:,}, and with {_list(changed)} no step follows. "
            "Give more train.epochs or train.max_steps"
            + (f"; evaluate.patience = {patience} is over as well: raise it, or set it to 0." if patience else ".")
        )
    state.finished = False
    state.lineage = [*state.lineage, {"ended_after": state.step, "of": before, "goes_on_to": total}]
    told = f"going on after the run's end, step {state.step:,} of {before:,}, to step {total:,} ({_list(changed)})."
    train = now.recipe.train
    if train.schedule == "constant" and (train.warmup >= 1 or not train.warmup):
        return told
    return (
        f"{told} The learning rate is now that of a run of {total:,} steps, so the weights will not be those of a run "
        'that was planned for them. They are with schedule = "constant" and a warm-up in steps.'
    )


def _compare_numerics(now: Resumption, saved: checkpoints.Saved) -> list[str]:
    """Refuse other data and other numerics than the checkpoint's, unless they are accepted; return warnings."""
    theirs = saved.facts["fingerprint"]
    names = numerics.differences(now.fingerprint, theirs)
    if now.accepts:
        if not names:
            return []
        return [f"going on under new numerics ({', '.join(names)} differ): the bits are those of neither"]
    remedy = (
        "Resume where the run began, or give --accept-new-numerics (accept_new_numerics=True): it then goes on, to "
        "other bits."
    )
    if any(name.partition(".")[0] in ("dataset", "data") for name in names):
        remedy = (
            "The data has changed since the run began. Train these weights on other data in a new run: "
            f"train.start_from = {now.folder!r}, once this one has ended. {remedy}"
        )
    return numerics.compare(now.fingerprint, theirs, who="in the checkpoint", here="here", remedy=remedy)


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide a run's course; the dataset's hash stands for [data] and [encode], that of the
    first weights for `start_from`. A task that is no preset has its own keys in [task]."""
    dump = to_table(recipe)  # a run goes on with other credentials
    for key in ("device", "audit_every", "loader_workers", "start_from"):
        dump["train"].pop(key)
    dump["model"].pop("folder", None)
    sections = ("model" if recipe.task.kind == TEXT else "task", "train", "evaluate")
    return {f"{section}.{key}": value for section in sections for key, value in dump[section].items()}
