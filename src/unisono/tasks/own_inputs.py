"""Run inputs from a user's own data: columns, frames, datasets and streams from Python, tables in files.

Owns the checks of `collate` and `sampler`, and the files that a user's own task writes beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisono.config.recipe import Recipe, to_table, unused_tables
from unisono.data.items import Collate, Items
from unisono.data.own_sources import is_stream, open_source
from unisono.data.samplers import EpochSamples, Sampler
from unisono.data.streams import SampleStream
from unisono.errors import DataError, RecipeError
from unisono.tasks.run_inputs import RunInputs, write_facts
from unisono.tasks.tables import read_splits
from unisono.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOwn:
    """Opens a user's task and data, by split, in a worker: a function that can be sent."""

    recipe: Recipe
    task: Task
    data: Mapping[str, Any]
    collate: Collate | None = None
    sampler: Sampler | None = None

    def __call__(self, workers: int, notify: Callable[[str], None]) -> RunInputs:
        return open_own(self.recipe, self.task, **self.data, collate=self.collate, sampler=self.sampler, notify=notify)


def open_tables(recipe: Recipe, task: Task, notify: Callable[[str], None]) -> RunInputs:
    """Read the tables that the recipe's [data] names, for a user's own task.

    Raises:
        RecipeError: the recipe names no data.
        DataError: it cannot be read, or lacks a column.
    """
    tables: dict[str, Any] = dict(read_splits(recipe.data, task, notify))
    return open_own(recipe, task, **tables, notify=notify)


def open_own(
    recipe: Recipe,
    task: Task,
    train: Any,
    validation: Any = None,
    test: Any = None,
    *,
    collate: Collate | None = None,
    sampler: Sampler | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> RunInputs:
    """Make run inputs from a user's task and data.

    collate: makes a microbatch from items; None: the task's method `collate`, if it has one, else they are stacked.
    sampler: chooses the training samples of each epoch; None: all of them, once.

    Raises:
        DataError: some of it cannot be used.
    """
    seed = recipe.train.seed
    chosen: Collate | None = collate if collate is not None else getattr(task, "collate", None)
    if chosen is not None and not callable(chosen):
        raise DataError(f"collate is {type(chosen).__name__}; allowed is a function of a list of items.")
    given = {"train": train, "validation": validation, "test": test}
    sources = {
        split: _open_stream(recipe, data, chosen, sampler, notify)
        if split == "train" and is_stream(data)
        else open_source(data, seed, chosen)
        for split, data in given.items()
        if data is not None
    }
    if collate is not None and not any(isinstance(source, Items | SampleStream) for source in sources.values()):
        raise DataError(
            "collate is for datasets that give items one by one; this data is columns already. Leave it out, or do in "
            "the task's loss what it should do."
        )
    for split, source in sources.items():
        if isinstance(source, Items | SampleStream) and source.left_out:
            names = ", ".join(map(repr, source.left_out))
            notify(f"{split}: {names} of the items is text, and left out; collate= would get it.")
    hashes = {f"data.{split}": source.sha256 for split, source in sources.items()}
    sampled = None if sampler is None else EpochSamples(sampler, len(sources["train"]), seed)
    if sampled is not None:
        hashes["data.sampler"] = sampled.sha256
    unused = unused_tables(frozenset())

    def export(folder: Path) -> None:
        write_facts(folder, {"recipe": to_table(recipe, unused), "data": hashes})
        task.export(folder)

    return RunInputs(
        task=task,
        train=sources["train"],
        validation=sources.get("validation"),
        test=sources.get("test"),
        data=hashes,
        sampled=sampled,
        export=export,
        unused=unused,
    )


def _open_stream(
    recipe: Recipe, data: Any, collate: Collate | None, sampler: Sampler | None, notify: Callable[[str], None]
) -> SampleStream:
    """Take a stream to train on; refuse settings that need its length."""
    train = recipe.train
    if not train.max_steps:
        raise RecipeError(
            f"{type(data).__name__} is a stream, and its length is unknown; the learning rate's "
            "schedule needs the number of steps. Set train.max_steps; epochs are not counted."
        )
    if sampler is not None:
        raise DataError("sampler chooses samples by their numbers, which a stream's do not have. Leave it out.")
    if train.loader_workers:
        raise RecipeError(
            f"'train.loader_workers' = {train.loader_workers}: a stream is read in order, by each worker itself. "
            "Allowed is 0."
        )
    samples = train.max_steps * train.samples_per_step
    stream = SampleStream(data, train.seed, collate, samples=samples, samples_per_step=train.samples_per_step)
    if not stream.has_state:
        notify(
            "the stream has no state_dict() and load_state_dict(), so a resumed run reads it again from the beginning, "
            "up to the samples that it has not trained on."
        )
    return stream
