"""Preparing a recipe's data ahead of training, and reporting what happened to the records.

Owns the wording. The work is done by `data/prepare.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.api.arguments import as_recipe, count_or_auto
from unisono.config.recipe import Recipe
from unisono.config.sections import TEXT
from unisono.data import prepare as stages
from unisono.errors import DataError, RecipeError
from unisono.processes.forking import count_cores
from unisono.storage.run_folder import complete
from unisono.tracking.terminal import print_now

if TYPE_CHECKING:
    from unisono.data.store import Dataset


def prepare(
    what: Recipe | str | Path,
    frames: Mapping[str, object] | None = None,
    *,
    workers: str | int = "auto",
    overrides: Sequence[str] = (),
) -> Dataset:
    """Read, screen and encode a recipe's data; open it if nothing has changed since. Prints what it does.

    Args:
        what: a recipe, or the path of one.
        frames: frames (pandas, Polars, Arrow) or lists by split (train, validation, test), instead of the recipe's
            files. The same content gives the same dataset, whatever holds it.
        workers: processes, or "auto": one per core. The dataset's bytes do not depend on it.

    Raises:
        UserError: the recipe or the data cannot be used.
    """
    recipe = as_recipe(what, overrides, "unisono.prepare")
    if recipe.task.kind != TEXT:
        raise RecipeError(
            f"'task.kind' = {recipe.task.kind!r}: prepare is for text recipes. A task of your own reads its data when "
            "training starts: unisono train."
        )
    recipe = complete(recipe)
    if frames is not None and not isinstance(frames, Mapping):
        raise DataError(
            f"frames is {type(frames).__name__}; allowed is a mapping of splits to frames, such as {{'train': frame}}."
        )
    count = count_or_auto(workers) or count_cores()
    dataset = stages.prepare(recipe, workers=count, frames=frames, notify=print_now, progress=None)
    print_now(
        f"{sum(dataset.counts.values()):,} samples: "
        + ", ".join(f"{number:,} {split}" for split, number in dataset.counts.items())
    )
    if dataset.quarantined:
        reasons = [
            f"{number:,} {reason} ({split})"
            for split, found in dataset.quarantined.items()
            for reason, number in found.items()
        ]
        print_now(f"quarantined: {', '.join(reasons)}; each is in {dataset.folder / 'quarantine.jsonl'}")
    print_now(f"report: {dataset.folder / stages.REPORT}")
    print_now(f"{len(dataset.labels)} classes, sha256 {dataset.sha256}")
    return dataset
