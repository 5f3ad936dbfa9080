"""Preparing a recipe's data ahead of training, and reporting what happened to the records.

Owns the wording. The work is done by `data/prepare.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.config.sections import TEXT
from unisono.data import prepare as stages
from unisono.errors import RecipeError
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
    recipe = recipes.load(what, tuple(overrides)) if isinstance(what, str | Path) else what
    if recipe.task.kind != TEXT:
        raise RecipeError(
            f"'task.kind' = {recipe.task.kind!r}: prepare is for text recipes. A task of your own reads its data when "
            "training starts: unisono train."
        )
    recipe = complete(recipe)
    count = count_cores() if workers == "auto" else int(workers)
    dataset = stages.prepare(recipe, workers=count, frames=frames, notify=print_now, progress=None)
    print(
        f"{sum(dataset.counts.values()):,} samples: "
        + ", ".join(f"{number:,} {split}" for split, number in dataset.counts.items())
    )
    if dataset.quarantined:
        reasons = [
            f"{number} {reason} ({split})"
            for split, found in dataset.quarantined.items()
            for reason, number in found.items()
        ]
        print(f"quarantined: {', '.join(reasons)}; each is in {dataset.folder / 'quarantine.jsonl'}")
    print(f"report: {dataset.folder / stages.REPORT}")
    print(f"{len(dataset.labels)} classes, sha256 {dataset.sha256}")
    return dataset
