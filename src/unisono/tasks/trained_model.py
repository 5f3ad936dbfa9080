"""The interface of a trained model: what evaluation and prediction need from it, for any task.

Owns the interface. `text/classifier.py` and `table_model.py` implement it; `api/application.py` reads files, divides
the work among workers and writes the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from unisono.config.recipe import Recipe
from unisono.data.source import Source
from unisono.exchange.protocol import Exchange
from unisono.tasks.metrics import Results
from unisono.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow as pa

MeasureModel = Callable[..., dict[str, np.ndarray]]
"""(model, method of its task, source) → results of every sample. The caller gives it: tasks import no engine."""


class TableRows(Protocol):
    """The rows of a file or a frame, all of them and in order."""

    @property
    def table(self) -> pa.Table:
        """The input's columns."""
        ...

    @property
    def faults(self) -> Sequence[str]:
        """Why a row cannot be used; empty if it can."""
        ...

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the rows without a fault: int64 [usable]."""
        ...


class TrainedModel(Protocol):
    """module: in evaluation mode. recipe: of its run."""

    @property
    def module(self) -> Any: ...

    @property
    def task(self) -> Task: ...

    @property
    def recipe(self) -> Recipe: ...

    def read(self, source: object) -> TableRows:
        """The rows of a file or a frame, in the columns that the recipe names."""
        ...

    def samples(self, rows: Any, exchange: Exchange | None = None) -> Source:
        """The usable rows as samples, without the columns to be predicted. Workers that share an exchange may each
        encode a part."""
        ...

    def labelled(self, rows: Any, exchange: Exchange | None = None) -> tuple[Source, dict[str, int]]:
        """Rows as samples to be scored; the number left out, by reason. Raises DataError if none is left."""
        ...

    def remark(self, samples: Source, usable: Sequence[int] | None = None) -> str:
        """What a user should know of these samples, in a sentence; empty: nothing. usable: the number of each sample's
        row, from 0; None: not known."""
        ...

    def own_test(self, run: Path) -> Source:
        """The test samples of the model's own run. Raises DataError if there are none."""
        ...

    def new_columns(self, rows: Any, results: Results) -> dict[str, pa.Array]:
        """The columns that prediction adds to a table, one value per row, from `task.predict`'s results."""
        ...

    def report(self, results: Results) -> dict[str, Any]:
        """The scores, as plain values, from `task.measure`'s results."""
        ...

    def describe(self, report: Mapping[str, Any]) -> list[str]:
        """A report in lines of text."""
        ...
