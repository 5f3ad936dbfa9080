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
from unisono.data.columns import Columns
from unisono.data.items import Collate, Items
from unisono.data.own_sources import is_stream, open_source
from unisono.data.samplers import EpochSamples, Sampler
from unisono.data.source import Source
from unisono.data.streams import SampleStream
from unisono.errors import DataError, RecipeError
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
    sampled: the training samples of each epoch, where a sampler chooses them.
    """

    task: Task
    train: Source
    validation: Source | None
    test: Source | None
    data: Mapping[str, str]
    labels: tuple[str, ...] = ()
    export: Callable[[Path], None] = field(default=lambda folder: None)
    sampled: EpochSamples | None = None

    @property
    def samples_per_epoch(self) -> int:
        return len(self.train) if self.sampled is None else self.sampled.per_epoch

    def changed(self) -> bool:
        """Whether somebody has written into data that lies in memory since it was opened."""
        return any(isinstance(source, Columns) and source.changed() for source in self._sources)

    @property
    def _sources(self) -> tuple[Source | None, ...]:
        return self.train, self.validation, self.test

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that asks for what these inputs do not have: a validation split, a metric, items to load, a
        whole step."""
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
    """Take a user's task and data as they are.

    collate: puts items together; None: the task's method `collate`, if it has one, else they are stacked. sampler:
    chooses the training samples of each epoch; None: all of them, once.

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
    return RunInputs(
        task=task,
        train=sources["train"],
        validation=sources.get("validation"),
        test=sources.get("test"),
        data=hashes,
        sampled=sampled,
    )


def _open_stream(
    recipe: Recipe, data: Any, collate: Collate | None, sampler: Sampler | None, notify: Callable[[str], None]
) -> SampleStream:
    """Take a stream to train on; refuse what needs to know how much there is."""
    train = recipe.train
    if not train.max_steps:
        raise RecipeError(
            f"{type(data).__name__} is a stream, of which nobody knows how much there is, and the learning rate's "
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
