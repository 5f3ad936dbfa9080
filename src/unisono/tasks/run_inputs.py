"""A run's inputs: a task, its samples, and the files that belong beside the weights in `model/`.

Owns the checks of a recipe against them. `own_inputs.py` opens them, and `text/text_inputs.py` for texts. Does not
train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisono.config.recipe import Recipe
from unisono.data.columns import Columns
from unisono.data.samplers import EpochSamples
from unisono.data.samples import EncodedSamples
from unisono.data.source import Source
from unisono.errors import RecipeError
from unisono.storage.files import WatchedFile
from unisono.storage.model_files import write_model_facts
from unisono.storage.run_folder import FACTS
from unisono.tasks.metrics import directions
from unisono.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """Everything that a run reads.

    data: names and hashes for the numerics fingerprint.
    labels: names of the classes; () where there are none.
    export: writes what else prediction needs into a folder that holds the weights.
    unused: tables of the recipe that have no effect on the task.
    sampled: the training samples of each epoch, where a sampler chooses them.
    """

    task: Task
    train: Source
    validation: Source | None
    test: Source | None
    data: Mapping[str, str]
    labels: tuple[str, ...] = ()
    export: Callable[[Path], None] = field(default=lambda folder: None)
    unused: Sequence[str] = ()
    sampled: EpochSamples | None = None

    @property
    def samples_per_epoch(self) -> int:
        return len(self.train) if self.sampled is None else self.sampled.per_epoch

    def changed(self) -> bool:
        """Whether data has changed since it was opened, in memory or in the dataset's files. Reads all data in
        memory."""
        return self.overwritten() or any(isinstance(source, Columns) and source.changed() for source in self._sources)

    def overwritten(self) -> bool:
        """Whether a file of the dataset was written into since it was opened. Reads those that were touched."""
        return any(file.changed() for file in self._files)

    def touched(self) -> bool:
        """Whether a file of the dataset may have been written into. Cheap enough for each step."""
        return any(file.touched() for file in self._files)

    @property
    def _files(self) -> list[WatchedFile]:
        mapped = [source.file for source in self._sources if isinstance(source, EncodedSamples)]
        return [file for file in mapped if file is not None]

    @property
    def _sources(self) -> tuple[Source | None, ...]:
        return self.train, self.validation, self.test

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that needs what these inputs do not have: items to load, a whole step, a validation split,
        a metric, or a metric's direction."""
        train = recipe.train
        if train.loader_workers and all(source is None or source.prefetchable for source in self._sources):
            raise RecipeError(
                f"'train.loader_workers' = {train.loader_workers}: the data lies in memory or in encoded files, and is "
                "read ahead by a thread. Allowed is 0; more are for datasets with __getitem__."
            )
        if train.drop_last and self.samples_per_epoch < train.samples_per_step:
            raise RecipeError(
                f"'train.drop_last' = true: an epoch has {self.samples_per_epoch:,} samples, fewer than a step of "
                f"{train.samples_per_step:,}, so nothing would be left. Set it to false, or train.samples_per_step to "
                f"{self.samples_per_epoch:,} at most."
            )
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

    def higher_is_better(self, recipe: Recipe) -> bool | None:
        """The direction of the metric by which evaluations are compared; None: not known, so they are not compared."""
        chosen = recipe.evaluate
        return chosen.mode == "max" if chosen.mode != "auto" else directions(self.task.metrics()).get(chosen.metric)


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts about a model that `unisono.load` reads first; after all other files, whose hashes they hold."""
    write_model_facts(folder / FACTS, facts)
