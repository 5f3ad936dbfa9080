"""What a run works on: a task, its samples, and what belongs beside the weights in `model/`.

Owns the two ways to it: a recipe for text, and a task with data from Python. Does not train.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.config.recipe import Recipe
from unisono.config.sections import Pretrained
from unisono.data.columns import Columns, open_source
from unisono.data.source import Source
from unisono.errors import RecipeError
from unisono.tasks.task import Task

if TYPE_CHECKING:
    from unisono.data.store import Dataset
    from unisono.tasks.text.classification import TextClassification


MEASURED = ("loss", "accuracy", "macro_f1")
"""What is measured of a classifier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """Everything that a run reads.

    data: names and hashes for the numerics fingerprint.
    labels: names of the classes; () where there are none.
    export: writes what else prediction needs into a folder that holds the weights.
    """

    task: Task
    train: Source
    validation: Source | None
    test: Source | None
    data: Mapping[str, str]
    labels: tuple[str, ...] = ()
    export: Callable[[Path], None] = field(default=lambda folder: None)

    def changed(self) -> bool:
        """Whether somebody has written into data that lies in memory since it was opened."""
        sources = (self.train, self.validation, self.test)
        return any(isinstance(source, Columns) and source.changed() for source in sources)

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that asks for a validation split which is not there, or for a metric that is not measured."""
        metric = recipe.evaluate.metric
        if self.labels and metric not in MEASURED:
            raise RecipeError(f"'evaluate.metric' = {metric!r}: allowed are {', '.join(MEASURED)}.")
        for key, value in (("patience", recipe.evaluate.patience), ("keep_best", recipe.evaluate.keep_best)):
            if value and self.validation is None:
                raise RecipeError(
                    f"'evaluate.{key}' = {value}: there are no validation samples, and choosing by the test "
                    "samples would make their scores "
                    "worthless. Set data.validation or data.validation_fraction = 0.1."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenText:
    """How a worker comes to the inputs of a text recipe: a function that can be sent. frames: instead of its files."""

    recipe: Recipe
    frames: Mapping[str, object]

    def __call__(self, workers: int, notify: Callable[[str], None]) -> RunInputs:
        return open_text(self.recipe, workers, notify, self.frames)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOwn:
    """How a worker comes to a user's task and data, by split: a function that can be sent."""

    recipe: Recipe
    task: Task
    data: Mapping[str, Any]

    def __call__(self, workers: int, notify: Callable[[str], None]) -> RunInputs:
        return open_own(self.recipe, self.task, **self.data)


def import_for_text() -> None:
    """Import what every worker of a text recipe needs. Before workers are forked, once is enough for all, and for those
    that replace lost ones."""
    import pyarrow.compute
    import tokenizers

    import unisono.data.prepare
    import unisono.tasks.text.classification

    assert tokenizers and pyarrow.compute and unisono.data.prepare


def open_text(
    recipe: Recipe, workers: int, notify: Callable[[str], None], frames: Mapping[str, object] | None = None
) -> RunInputs:
    """Prepare the dataset that the recipe describes, or open it if nothing has changed; make its task."""
    from unisono.data.prepare import prepare

    dataset = prepare(recipe, workers=workers, notify=notify, frames=frames)
    train = dataset.split("train")
    assert train is not None

    def export(folder: Path) -> None:
        dataset.encoder.save(folder)
        facts = {"labels": list(dataset.labels), "recipe": recipe.model_dump(mode="json"), "dataset": dataset.sha256}
        (folder / "unisono.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if isinstance(recipe.model, Pretrained):
            from unisono.tasks.text.pretrained import write_config

            write_config(Path(recipe.model.folder), folder, dataset.labels)

    return RunInputs(
        task=text_task(recipe, dataset, train),
        train=train,
        validation=dataset.split("validation"),
        test=dataset.split("test"),
        data={"dataset": dataset.sha256},
        labels=dataset.labels,
        export=export,
    )


def text_task(recipe: Recipe, dataset: Dataset, train: Any) -> TextClassification:
    """The text classifier of a recipe and its dataset."""
    import numpy as np

    from unisono.tasks.text.classification import TextClassification

    weights = recipe.train.class_weights
    if weights == "balanced":  # as scikit-learn: samples / (classes × samples of the class)
        counts = np.bincount(train.labels, minlength=len(dataset.labels))
        weights = tuple(float(len(train) / (len(counts) * max(count, 1))) for count in counts.tolist())
    return TextClassification(
        model=recipe.model,
        classes=len(dataset.labels),
        vocabulary_size=dataset.encoder.vocabulary_size,
        padding=dataset.encoder.padding,
        max_tokens=recipe.encode.max_tokens,
        label_smoothing=recipe.train.label_smoothing,
        class_weights=None if isinstance(weights, str) else weights,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
    )


def open_own(recipe: Recipe, task: Task, train: Any, validation: Any = None, test: Any = None) -> RunInputs:
    """Take a user's task and data as they are."""
    seed = recipe.train.seed
    sources = [None if data is None else open_source(data, seed) for data in (train, validation, test)]
    assert sources[0] is not None
    hashes = {
        f"data.{name}": source.sha256
        for name, source in zip(("train", "validation", "test"), sources, strict=True)
        if source
    }
    return RunInputs(task=task, train=sources[0], validation=sources[1], test=sources[2], data=hashes)
