"""Tables of records, for a user's own tasks: files and frames as Arrow tables, and their rows as samples.

Owns the types of columns that are read as text (CSV, TSV), the cut into splits by a hash of the content, and the check
of a task's columns.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from unisono.config.sections import Data
from unisono.data.columns import Columns
from unisono.data.ingest.column_batch import Column, ColumnBatch
from unisono.data.ingest.input_splits import read_file
from unisono.data.ingest.parquet import read_frame
from unisono.data.ingest.read import as_text
from unisono.data.own_sources import open_source
from unisono.data.source import Source
from unisono.errors import DataError, RecipeError
from unisono.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRows:
    """All rows of a file or a frame, in order. faults: why a row cannot be used; empty if it can."""

    name: str
    table: pa.Table
    faults: tuple[str, ...]

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the rows without a fault: int64 [usable]."""
        return np.flatnonzero([not fault for fault in self.faults])


def read_rows(source: object, data: Data, needed: Sequence[str] = (), name: str = "frame") -> RecordRows:
    """Read a file or a frame; columns of text in which every value is a number become numbers. A row that lacks a value
    in one of the `needed` columns cannot be used.

    Raises:
        DataError: it cannot be read, or has no rows.
    """
    batch = read_file(source, data, needed) if isinstance(source, (str, Path)) else read_frame(source, data, name)
    columns = {column: _as_numbers(values) for column, values in batch.columns.items()}
    table = pa.table(columns)
    return RecordRows(name=batch.name, table=table, faults=_faults(batch, table, needed))


def read_splits(data: Data, task: Task, notify: Callable[[str], None]) -> dict[str, Source]:
    """Read the splits that a recipe names, cut off the shares that it sets, and make samples of all of them.

    Raises:
        RecipeError: the recipe names no training data.
        DataError: a file cannot be read, has rows that cannot be used while data.strict is on, or lacks a column.
    """
    if not data.train:
        raise RecipeError("'data.train' is empty: a recipe needs data. Name a file, or call unisono.train(task, data).")
    tables: dict[str, pa.Table] = {}
    for split in ("train", "validation", "test"):
        if location := getattr(data, split):
            rows = read_rows(location, data, task.columns)
            tables[split] = _drop_faulty(rows, data, notify)
    for split, share in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        if share:
            if split in tables:
                raise RecipeError(f"'data.{split}_fraction' and 'data.{split}': allowed is one of both.")
            tables["train"], tables[split] = _cut(tables["train"], split, share)
    return {split: samples_of(task, table, f"{split} data") for split, table in tables.items()}


def samples_of(task: Task, table: pa.Table, name: str, *, predict: bool = False) -> Source:
    """The rows of a table as the task encodes them. `predict`: `targets` may be missing.

    Raises:
        DataError: a column is missing, or `encode` returns anything except columns of numbers.
    """
    for column in task.columns:
        if column not in table.column_names and not (predict and column in task.targets):
            near = difflib.get_close_matches(column, table.column_names, n=1, cutoff=0.5)
            guess = f" Did you mean {near[0]!r}?" if near else ""
            there = ", ".join(map(repr, table.column_names))
            raise DataError(
                f"{name}: no column {column!r}, which the task {type(task).__name__} needs.{guess} There are: {there}."
            )
    if not table.num_rows:
        raise DataError(f"{name}: there is no row that can be used. Give at least one.")
    spared = set(task.targets) if predict else set()
    wanted = [column for column in task.columns or table.column_names if column in table.column_names]
    encoded = task.encode(table.select([column for column in wanted if column not in spared]))
    if not isinstance(encoded, Mapping):
        raise DataError(
            f"{type(task).__name__}.encode returned {type(encoded).__name__}; allowed is a mapping of names to columns."
        )
    try:
        source = open_source(dict(encoded))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if isinstance(source, Columns) and len(source) != table.num_rows:
        raise DataError(
            f"{type(task).__name__}.encode made {len(source)} samples of {table.num_rows} rows; allowed is one of each."
        )
    return source


def _drop_faulty(rows: RecordRows, data: Data, notify: Callable[[str], None]) -> pa.Table:
    bad = [(number, fault) for number, fault in enumerate(rows.faults, start=1) if fault]
    if not bad:
        return rows.table
    number, fault = bad[0]
    first = (
        f"{len(bad):,} of {len(rows.faults):,} rows of {rows.name} cannot be used, the first is row {number}: {fault}"
    )
    if data.strict:
        raise DataError(f"{first}. Mend it, or set data.strict = false.")
    notify(f"{first}; they are left out")
    return rows.table.take(pa.array(rows.usable))


def _cut(table: pa.Table, split: str, share: float) -> tuple[pa.Table, pa.Table]:
    """Cut a share off by a hash of each row's content, so that equal rows stay together and the order does not
    matter."""
    apart = np.array([_draw(split, row) < share for row in table.to_pylist()])
    if apart.all() or not apart.any():
        raise DataError(
            f"'data.{split}_fraction' = {share}: of {table.num_rows} rows {int(apart.sum())} would be {split} rows. "
            "Give more rows, or a file of their own."
        )
    return table.filter(pa.array(~apart)), table.filter(pa.array(apart))


def _draw(split: str, row: Mapping[str, Any]) -> float:
    content = json.dumps([split, row], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64


def _as_numbers(column: Column) -> pa.Array | pa.ChunkedArray:
    """A column; where all its texts are numbers, the numbers (int64, else float64)."""
    if not isinstance(column, list):
        return column
    try:
        found = pa.array([as_text(value)[0] if isinstance(value, (str, bytes)) else value for value in column])
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([None if value is None else as_text(value)[0] for value in column], pa.string())
    if not pa.types.is_string(found.type):
        return found
    filled = pa.array([value or None for value in found.to_pylist()], pa.string())
    for kind in (pa.int64(), pa.float64()):
        try:
            return filled.cast(kind)
        except pa.ArrowInvalid:
            continue
    return found


def _faults(batch: ColumnBatch, table: pa.Table, needed: Sequence[str]) -> tuple[str, ...]:
    faults = [batch.faults[row].reason if row in batch.faults else "" for row in range(batch.rows)]
    for name in needed:
        if name in table.column_names and table[name].null_count:
            for row in np.flatnonzero(table[name].is_null().to_numpy()).tolist():
                faults[row] = faults[row] or f"no value in {name!r}"
    return tuple(faults)
