"""From a recipe for texts to a task and its samples, and from a model folder to a classifier.

Owns the default kind of task, for recipes that name none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unisono.config.recipe import Recipe, to_table
from unisono.config.sections import Pretrained
from unisono.data.encoding.tokens import SubwordEncoder
from unisono.errors import RecipeError
from unisono.tasks.kinds import TaskKind
from unisono.tasks.run_inputs import RunInputs, write_facts
from unisono.tasks.text.classification import TextClassification
from unisono.tasks.text.classifier import load_classifier

if TYPE_CHECKING:
    from unisono.data.store import Dataset


def import_for_text() -> None:
    """Import what every worker of a text recipe needs. If this is done before workers are forked, one import serves all
    workers, and those that replace lost ones."""
    import pyarrow.compute
    import tokenizers

    import unisono.data.prepare

    assert tokenizers and pyarrow.compute and unisono.data.prepare


def open_text(
    recipe: Recipe, workers: int, notify: Callable[[str], None], frames: Mapping[str, object] | None = None
) -> RunInputs:
    """Prepare the dataset that the recipe describes, or open it if nothing has changed; make its task."""
    from unisono.data.prepare import prepare

    refuse_settings(recipe)
    dataset = prepare(recipe, workers=workers, notify=notify, frames=frames)
    train = dataset.split("train")
    assert train is not None

    def export(folder: Path) -> None:
        dataset.encoder.save(folder)
        if isinstance(recipe.model, Pretrained):
            from unisono.tasks.text.pretrained import write_config

            write_config(recipe.model, folder, dataset.labels)
            if isinstance(dataset.encoder, SubwordEncoder):
                dataset.encoder.describe(folder)
        facts = {"labels": list(dataset.labels), "recipe": to_table(recipe), "dataset": dataset.sha256}
        write_facts(folder, facts)

    return RunInputs(
        task=text_task(recipe, dataset, train),
        train=train,
        validation=dataset.split("validation"),
        test=dataset.split("test"),
        data={"dataset": dataset.sha256},
        labels=dataset.labels,
        export=export,
    )


def refuse_settings(recipe: Recipe) -> None:
    """Refuse keys in [task] besides `kind`."""
    if recipe.task.settings:
        raise RecipeError(
            f"'task.{next(iter(recipe.task.settings))}': no such key. Text classification has none in [task]; see "
            "[model], [encode] and [train]."
        )


def text_task(recipe: Recipe, dataset: Dataset, train: Any) -> TextClassification:
    """The text classifier of a recipe and its dataset."""
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


KIND = TaskKind(
    task=TextClassification,
    open=open_text,
    load=load_classifier,
    warm=import_for_text,
    uses=frozenset(
        ("model", "encode", "screen", "train.label_smoothing", "train.class_weights", "train.gradient_checkpointing")
    ),
    check=refuse_settings,
)
