"""Records: the text and the class of each row of the user's input.

Owns what counts as a text, as a class, and as a missing one. Places and formats are in `input_splits.py`; records are
judged in `screening/screen.py`. Each row becomes one record, in order; a row that cannot be used has its
reason in its record.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from unisono.config.sections import Data
from unisono.data.ingest.column_batch import (
    Column,
    ColumnBatch,
    FieldFault,
    Foreign,
    check_names,
    list_names,
    list_values,
    pick_column,
)
from unisono.data.ingest.delimited import NOT_JSON
from unisono.data.ingest.input_splits import find_input_splits, read_file, read_input_split
from unisono.data.ingest.lines import escape
from unisono.data.ingest.parquet import read_frame
from unisono.errors import DataError

NOT_A_TEXT = "not a text"
LABEL_LIST = "the label is a list, not one class"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A row of the user's input. Bytes that are not UTF-8 are written as backslash escapes."""

    file: str
    row: int
    """Number in its file, from 1; header and blank lines do not count."""
    text: str
    label: str | None
    fault: str = ""
    """Why it could not be read; empty if it could."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """The rows of a new file, all of them and in order, for prediction and evaluation."""

    texts: tuple[str, ...]
    labels: tuple[str | None, ...] | None
    """None where there is no such column."""
    faults: tuple[str, ...]
    """Why a row cannot be used; empty if it can."""
    columns: Mapping[str, Column]
    """The input's columns, one row per text."""

    @property
    def table(self) -> pa.Table:
        """The input's columns as Arrow's; lists are copied for it."""
        return pa.table({key: _as_arrow(column) for key, column in self.columns.items()})

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the rows without a fault: int64 [usable]."""
        return np.flatnonzero([not fault for fault in self.faults])

    @property
    def good_texts(self) -> list[str]:
        """The texts of the rows without a fault."""
        return [text for text, fault in zip(self.texts, self.faults, strict=True) if not fault]


def read_records(source: object, data: Data, name: str = "frame") -> list[Record]:
    """Return every row of a location (str or Path) or of a frame, in order. Messages call a frame `name`.

    Raises:
        DataError: the source cannot be read, is empty, or lacks the column of the texts or of the classes.
    """
    if not isinstance(source, (str, Path)):
        return list(take_records(read_frame(source, data, name), data))
    column_batches = (
        column_batch
        for input_split in find_input_splits(source, data)
        for column_batch in read_input_split(input_split, data)
    )
    records = list(_number(column_batches, data))
    if not records:
        read_file(source, data)  # says so
    return records


def _number(column_batches: Iterable[ColumnBatch], data: Data) -> Iterator[Record]:
    """Records of column batches, their rows numbered within each source."""
    name, row = "", 1
    wanted = (*data.texts, data.label)
    names: dict[str, list[object]] = {}
    faults: Mapping[int, FieldFault] = {}
    for column_batch in column_batches:
        name, row = column_batch.name, row if column_batch.name == name else 1
        names |= {column: [] for column in list_names(column_batch, wanted)}
        faults = faults or column_batch.faults
        yield from take_records(column_batch, data, first_row=row, lenient=True)
        row += column_batch.rows
    if name:
        read = ColumnBatch(name=name, rows=0, columns=names, faults=faults)
        for column in wanted:
            find_column(read, column, "label" if column == data.label else "text")


def take_records(
    column_batch: ColumnBatch, data: Data, *, first_row: int = 1, lenient: bool = False
) -> Iterator[Record]:
    """Every row of a column batch as a record, in order.

    Args:
        first_row: number of the column batch's first row in its source, from 1.
        lenient: a column that the column batch lacks is empty. In JSONL each row names its own columns, so only all
            column batches of a source together show whether a column is missing.

    Raises:
        DataError: the column of the texts or of the classes is missing, and not lenient.
    """
    texts = _take_texts(column_batch, data, lenient=lenient)
    labels = find_column(column_batch, data.label, "label", lenient=lenient)
    for row, ((text, text_fault), given_label) in enumerate(zip(texts, labels, strict=True)):
        file = column_batch.files[row] if column_batch.files else column_batch.name
        number = first_row + row
        if row in column_batch.faults:
            fault = column_batch.faults[row]
            yield Record(file=file, row=number, text=as_text(fault.raw)[0], label=None, fault=fault.reason)
            continue
        label, label_fault = as_text(given_label)
        if label_fault == NOT_A_TEXT:
            label_fault = LABEL_LIST if isinstance(given_label, list | tuple) else "the label is not a text"
        yield Record(file=file, row=number, text=text, label=label.strip() or None, fault=text_fault or label_fault)


def _take_texts(column_batch: ColumnBatch, data: Data, *, lenient: bool = False) -> Iterator[tuple[str, str]]:
    """The text of each row, of one column or of several, and what is wrong with it."""
    columns = [find_column(column_batch, name, "text", lenient=lenient) for name in data.texts]
    if len(columns) == 1:
        return map(as_text, columns[0])
    return map(_join_texts, zip(*columns, strict=True))


def _join_texts(values: Iterable[object]) -> tuple[str, str]:
    parts = [as_text(value) for value in values]
    return "\n\n".join(text for text, _ in parts if text.strip()), next((fault for _, fault in parts if fault), "")


def read_texts(source: object, data: Data, name: str = "frame") -> Texts:
    """Return every row of a location or frame to predict on; the column of classes may be missing.

    Raises:
        DataError: the source cannot be read, is empty, or lacks the column of the texts.
    """
    column_batch = read_file(source, data) if isinstance(source, (str, Path)) else read_frame(source, data, name)
    texts, faults = [], []
    for row, (text, fault) in enumerate(_take_texts(column_batch, data)):
        if row in column_batch.faults:
            text, fault = as_text(column_batch.faults[row].raw)[0], column_batch.faults[row].reason
        texts.append(text)
        faults.append(fault or ("" if text.strip() else "empty"))
    labels = None
    if pick_column(column_batch, data.label) is not None:
        labels = tuple(as_text(value)[0].strip() or None for value in find_column(column_batch, data.label, "label"))
    names = [escape(name) for name in column_batch.columns]
    check_names(column_batch.name, names)
    columns = dict(zip(names, column_batch.columns.values(), strict=True))
    return Texts(texts=tuple(texts), labels=labels, faults=tuple(faults), columns=columns)


def find_column(column_batch: ColumnBatch, name: str, key: str, *, lenient: bool = False) -> list[object]:
    """Return the values of a column, or of the field b of column a for a.b, named by data.`key`.

    Raises:
        DataError: there is none, and not `lenient`: then its values are None.
    """
    column = pick_column(column_batch, name)
    if column is None and lenient:
        return [None] * column_batch.rows
    if column is None:
        if column_batch.faults and not column_batch.columns:
            _refuse_unreadable(column_batch)
        names = list_names(column_batch, ())
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        folded = [other for other in names if other.casefold() == name.casefold()]
        guess = f" Did you mean {(folded or near)[0]!r}?" if folded or near else ""
        there = ", ".join(map(repr, names))
        message = f"{column_batch.name}: no column {name!r} (data.{key}).{guess} There are: {there}. Set data.{key}."
        raise DataError(message)
    return list_values(column)


def _refuse_unreadable(column_batch: ColumnBatch) -> None:
    """Raise DataError about lines of which none could be read."""
    row, fault = next(iter(column_batch.faults.items()))
    raw = f"{fault.raw[:80]!r}{'…' if len(fault.raw) > 80 else ''}"
    if fault.reason != NOT_JSON:
        raise DataError(f"{column_batch.name}: no record can be read. Row {row + 1}: {fault.reason}: {raw}.")
    raise DataError(
        f"{column_batch.name}: no line is JSON, for instance {raw}. JSONL has an object per line, and a JSON document "
        "is one array of objects. Mend the file, or set data.format to what it is."
    )


def as_text(value: object) -> tuple[str, str]:
    """Return a value as text, and what is wrong with it.

    None and NaN are empty. 3.0 is '3': a frame turns integers into floats when one of them is missing.
    """
    if isinstance(value, str):
        text = value
    elif isinstance(value, bytes):
        text = value.decode("utf-8", "surrogateescape")
    elif value is None or (isinstance(value, float) and math.isnan(value)):
        return "", ""
    elif isinstance(value, float) and value.is_integer():
        return str(int(value)), ""
    elif isinstance(value, (list, tuple, dict, Foreign)):
        return json.dumps(value, default=str), NOT_A_TEXT
    else:
        text = str(value)
    if text.isascii():
        return text, ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return escape(text), "not UTF-8"
    return text, ""


def _as_arrow(column: Column) -> pa.Array | pa.ChunkedArray:
    """A column as Arrow, whatever its values: mixed ones, and those that are not valid in Arrow, become text."""
    if not isinstance(column, list):
        try:
            column.validate(full=True)
            return column
        except pa.ArrowInvalid:
            column = list_values(column)
            return pa.array([None if value is None else as_text(value)[0] for value in column], pa.string())
    clean: Sequence[object] = [as_text(value)[0] if isinstance(value, str) else value for value in column]
    try:
        return pa.array(clean)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([None if value is None else as_text(value)[0] for value in clean], type=pa.string())
