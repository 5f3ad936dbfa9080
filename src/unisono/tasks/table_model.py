"""A trained model of a user's own task, used on tables.

Owns the form in which such a task's model folder is read, and the columns of its predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import nn

from unisono.config.recipe import Recipe
from unisono.config.wording import count, name_some
from unisono.data.columns import Columns
from unisono.data.ingest.frames import add_columns, is_frame, settle
from unisono.data.own_sources import open_source
from unisono.data.source import Source
from unisono.errors import DataError, ModelError
from unisono.exchange.protocol import Exchange
from unisono.storage.model_files import load_weights
from unisono.tasks.metrics import Results, confusion, directions, flat, per_class, summarise
from unisono.tasks.tables import RecordRows, read_rows, read_splits, samples_of
from unisono.tasks.task import Task
from unisono.tasks.trained_model import MeasureModel

MOST_CLASSES = 1_000
"""A confusion matrix of more classes has a million cells: nobody reads it, and for 200,000 no memory holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableModel:
    """A trained module with its task. `predict(frame)`, or `predict(columns)`, is enough for most uses."""

    module: nn.Module
    task: Task
    recipe: Recipe
    measure_model: MeasureModel

    def predict(self, data: Any) -> Any:
        """Return what the task predicts: for a frame, a frame of its kind with new columns; for a mapping of columns as
        the model reads them (arrays or tensors, one row per sample), a mapping of name → array.

        Raises:
            DataError: a column is missing or cannot be used.
            ContractError: the task does not define `predict`.
        """
        if is_frame(data):
            frame = settle(data)
            rows = self.read(frame)
            return add_columns(
                frame, self.new_columns(rows, self.measure_model(self, self.task.predict, self.samples(rows)))
            )
        return self.measure_model(self, self.task.predict, open_source(data, self.recipe.train.seed))

    def measure(self, data: Any) -> dict[str, float]:
        """Return the scores on labelled data: a frame, or a mapping of columns as the model reads them."""
        source = self.labelled(self.read(settle(data)))[0] if is_frame(data) else open_source(data)
        return summarise(self.measure_model(self, self.task.measure, source), self.task.metrics())

    def read(self, source: object) -> RecordRows:
        """The rows of a file or a frame."""
        needed = [name for name in self.task.columns if name not in self.task.targets]
        return read_rows(source, self.recipe.data.model_copy(update={"format": "auto"}), needed)

    def samples(self, rows: RecordRows, exchange: Exchange | None = None) -> Source:
        """The usable rows as samples, without the columns to be predicted."""
        return samples_of(self.task, rows.table.take(pa.array(rows.usable)), rows.name, predict=True)

    def labelled(self, rows: RecordRows, exchange: Exchange | None = None) -> tuple[Source, dict[str, int]]:
        """The rows as samples to be scored; and the number of rows left out, by reason."""
        targets = [name for name in self.task.targets if name in rows.table.column_names]
        left_out: dict[str, int] = {}
        kept: list[int] = []
        missing = [rows.table[name].is_null().to_numpy() for name in targets]
        for number, fault in enumerate(rows.faults):
            reason = fault or ("no label" if any(column[number] for column in missing) else "")
            if reason:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                kept.append(number)
        if not kept:
            told = ", ".join(f"{count(number, 'row')} ({reason})" for reason, number in left_out.items())
            raise DataError(
                f"{rows.name}: no row can be scored: {told}. Needed are {name_some(self.task.columns)} in a row."
            )
        return samples_of(self.task, rows.table.take(pa.array(kept)), rows.name), left_out

    def remark(self, samples: Source, usable: Sequence[int] | None = None) -> str:
        """Which columns hold numbers that are none."""
        found = samples.not_finite() if isinstance(samples, Columns) else {}
        return "; ".join(
            f"{name!r} holds NaN or infinity in {len(odd):,} of {len(samples):,} rows, the first is row "
            f"{(odd if usable is None else [usable[odd[0]]])[0] + 1}. Unless the task is made for it, their results "
            "mean nothing"
            for name, odd in found.items()
        )

    def own_test(self, run: Path) -> Source:
        """The test file that the recipe names, or the rows that it cuts off."""
        data = self.recipe.data
        if data.train and data.test_fraction:
            return read_splits(data, self.task, lambda line: None)["test"]
        if not data.test:
            raise DataError(
                f"the recipe of {str(run)!r} names no test file. Name labelled data: unisono evaluate RUN DATA."
            )
        return self.labelled(read_rows(data.test, data, self.task.columns))[0]

    def new_columns(self, rows: RecordRows, results: Results) -> dict[str, pa.Array]:
        """A column for each result with one number per sample; for rows of numbers, one column per number (NAME 0,
        NAME 1 …); and `unusable`, the reason why a row has no result. A row with NaN in one of them has none: the
        others, such as the largest of several NaN, mean nothing."""
        new: dict[str, pa.Array] = {}
        faults = list(rows.faults)
        for name, values in results.items():
            for row in rows.usable[np.isnan(values.reshape(len(values), -1)).any(1)].tolist():
                faults[row] = faults[row] or f"the model gives NaN as {name!r}"
        absent = np.array([bool(fault) for fault in faults])
        for name, values in results.items():
            wide = values[:, None] if values.ndim == 1 else values
            for place in range(wide.shape[1]):
                column = name if values.ndim == 1 else f"{name} {place}"
                new[column] = _spread(wide[:, place], rows.usable, absent)
        new["unusable"] = pa.array([fault or None for fault in faults], pa.string())
        return new

    def report(self, results: Results) -> dict[str, Any]:
        """The scores; for classes, where their numbers are not too large, also a table of them and the confusion
        matrix."""
        found: dict[str, Any] = summarise(results, self.task.metrics())
        if "predicted" in results and "label" in results:
            label, predicted = flat(results["label"]), flat(results["predicted"])
            if max(label.max(), predicted.max()) >= MOST_CLASSES:
                return found
            table = confusion(label, predicted)
            found["confusion"] = table.tolist()
            found["classes"] = [
                {"label": one.label, "precision": one.precision, "recall": one.recall, "f1": one.f1,
                 "samples": one.samples} for one in per_class(table)
            ]  # fmt: skip
        return found

    def describe(self, report: Mapping[str, Any]) -> list[str]:
        """One line for each score, with its direction where that is known."""
        known = directions(self.task.metrics())
        lines = [f"samples {report['samples']:,}"]
        for name, value in report.items():
            if isinstance(value, float):
                direction = {True: "  (more is better)", False: "  (less is better)"}.get(known.get(name, None), "")  # type: ignore[arg-type]
                lines.append(f"{name} {value:.6g}{direction}")
        return lines


def load(folder: Path, recipe: Recipe, task: Task, measure_model: MeasureModel) -> TableModel:
    """Build a task's module and load the weights of a model folder.

    Raises:
        ModelError: the module and the weights do not belong together.
        DamagedError: the weights are not readable, or no numbers.
    """
    if task.backend != "torch":
        raise ModelError(
            f"{str(folder)!r}: {type(task).__name__} is computed by {task.backend!r}; allowed here is 'torch'. "
            "Read the arrays from model.safetensors."
        )
    module = task.build()
    asked_by = f"the module that {type(task).__name__} builds with the settings of the run's recipe"
    load_weights(module, folder / "model.safetensors", asked_by)
    return TableModel(module=module.eval(), task=task, recipe=recipe, measure_model=measure_model)


def _spread(values: np.ndarray, usable: np.ndarray, absent: np.ndarray) -> pa.Array:
    """Values of the usable rows, null where `absent`."""
    spread = np.zeros(len(absent), dtype=values.dtype)
    spread[usable] = values
    return pa.array(spread, mask=absent)
