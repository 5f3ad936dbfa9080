"""What a run works on: a task, its samples, and what belongs beside the weights in `model/`.

Owns the two ways to it for a task of a user's own: data from Python, and tables in files. Texts have a way of their own
(`text/text_inputs.py`). Does not train.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisono.config.recipe import Recipe, unused_tables
from unisono.data.columns import Columns, open_source
from unisono.data.source import Source
from unisono.errors import RecipeError
from unisono.storage.run_folder import FACTS
from unisono.tasks.metrics import directions
from unisono.tasks.tables import read_splits
from unisono.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """Everything that a run reads.

    data: names and hashes for the numerics fingerprint.
    labels: names of the classes; () where there are none.
    export: writes what else prediction needs into a folder that holds the weights.
    unused: tables of the recipe that do nothing for the task.
    """

    task: Task
    train: Source
    validation: Source | None
    test: Source | None
    data: Mapping[str, str]
    labels: tuple[str, ...] = ()
    export: Callable[[Path], None] = field(default=lambda folder: None)
    unused: Sequence[str] = ()

    def changed(self) -> bool:
        """Whether somebody has written into data that lies in memory since it was opened."""
        sources = (self.train, self.validation, self.test)
        return any(isinstance(source, Columns) and source.changed() for source in sources)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that asks for a validation split which is not there, or compares by a metric that is not
        computed, or of which nobody says whether more is better."""
        chosen = recipe.evaluate
        known = directions(self.task.metrics())
        if self.labels and chosen.metric not in known:
            raise RecipeError(f"'evaluate.metric' = {chosen.metric!r}: allowed are {', '.join(known)}.")
        for key, value in (("patience", chosen.patience), ("keep_best", chosen.keep_best)):
            if value and self.validation is None:
                raise RecipeError(
                    f"'evaluate.{key}' = {value}: there are no validation samples, and choosing by the test "
                    "samples would make their scores "
                    "worthless. Set data.validation or data.validation_fraction = 0.1."
                )
            if value and chosen.mode == "auto" and chosen.metric not in known:
                raise RecipeError(
                    f"'evaluate.{key}' = {value}: whether more of the metric {chosen.metric!r} is better is not known. "
                    'Set evaluate.mode = "min" or "max", or return a Metric of this name from the task\'s metrics().'
                )

    def higher_is_better(self, recipe: Recipe) -> bool:
        """The direction of the metric by which evaluations are compared."""
        chosen = recipe.evaluate
        return (
            chosen.mode == "max" if chosen.mode != "auto" else directions(self.task.metrics()).get(chosen.metric, True)
        )


def open_own(recipe: Recipe, task: Task, train: Any, validation: Any = None, test: Any = None) -> RunInputs:
    """Take a user's task and data as they are."""
    seed = recipe.train.seed
    sources = [None if data is None else open_source(data, seed) for data in (train, validation, test)]
    return _own_inputs(recipe, task, sources)


def open_tables(recipe: Recipe, task: Task, notify: Callable[[str], None]) -> RunInputs:
    """Read the tables that the recipe's [data] names, for a task of a user's own.

    Raises:
        RecipeError: the recipe names no data.
        DataError: it cannot be read, or lacks a column.
    """
    tables = read_splits(recipe.data, task, notify)
    return _own_inputs(recipe, task, [tables.get(split) for split in ("train", "validation", "test")])


def _own_inputs(recipe: Recipe, task: Task, sources: list[Source | None]) -> RunInputs:
    train, validation, test = sources
    assert train is not None
    hashes = {
        f"data.{name}": source.sha256
        for name, source in zip(("train", "validation", "test"), sources, strict=True)
        if source
    }

    def export(folder: Path) -> None:
        write_facts(folder, {"recipe": recipe.model_dump(mode="json"), "data": hashes})
        task.export(folder)

    return RunInputs(
        task=task,
        train=train,
        validation=validation,
        test=test,
        data=hashes,
        export=export,
        unused=unused_tables(frozenset()),
    )


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what `unisono.load` reads of a model first."""
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
