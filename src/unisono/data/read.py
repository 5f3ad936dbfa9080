"""Records: the text and the class of each row of the user's input.

Owns what counts as a text, a class and their absence. Does not know the formats (`data/formats.py`) and does
not judge the records (`data/screen.py`): each row becomes one record, in order, and what cannot be used says
why.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from unisono.data.formats import Column, Sheet, read_file, read_frame
from unisono.errors import DataError
from unisono.sections import Data


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A row of the user's input. Bytes that are not UTF-8 stand in it as backslash escapes."""

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
    table: pa.Table
    """The input's columns, one row per text."""

    @property
    def usable(self) -> np.ndarray:
        """Numbers of the rows without a fault: int64 [usable]."""
        return np.flatnonzero([not fault for fault in self.faults])


def read_sheet(source: object, data: Data, name: str = "frame") -> Sheet:
    """Read a path (str or Path) or a frame, whose `name` stands in messages. Raises DataError."""
    return read_file(Path(source), data) if isinstance(source, (str, Path)) else read_frame(source, data, name)


def read_records(source: object, data: Data, name: str = "frame") -> list[Record]:
    """Return every row of a file or frame as a record, in order.

    Raises:
        DataError: the source cannot be read, is empty, or lacks the column of the texts or of the classes.
    """
    sheet = read_sheet(source, data, name)
    texts, labels = _column(sheet, data.text, "text"), _column(sheet, data.label, "label")
    records = []
    for row, (given_text, given_label) in enumerate(zip(texts, labels, strict=True)):
        file = sheet.files[row] if sheet.files else sheet.name
        if row in sheet.faults:
            fault = sheet.faults[row]
            records.append(Record(file=file, row=row + 1, text=_as_text(fault.raw)[0], label=None, fault=fault.reason))
            continue
        text, text_fault = _as_text(given_text)
        label, label_fault = _as_text(given_label)
        fault_ = text_fault or label_fault
        records.append(Record(file=file, row=row + 1, text=text, label=label.strip() or None, fault=fault_))
    return records


def read_texts(source: object, data: Data, name: str = "frame") -> Texts:
    """Return every row of a file or frame to predict on; the column of classes may be missing.

    Raises:
        DataError: the source cannot be read, is empty, or lacks the column of the texts.
    """
    sheet = read_sheet(source, data, name)
    texts, faults = [], []
    for row, value in enumerate(_column(sheet, data.text, "text")):
        text, fault = _as_text(value)
        if row in sheet.faults:
            text, fault = _as_text(sheet.faults[row].raw)[0], sheet.faults[row].reason
        texts.append(text)
        faults.append(fault or ("" if text.strip() else "empty"))
    labels = None
    if data.label in sheet.columns:
        labels = tuple(_as_text(value)[0].strip() or None for value in _column(sheet, data.label, "label"))
    table = pa.table({key: _as_arrow(column) for key, column in sheet.columns.items()})
    return Texts(texts=tuple(texts), labels=labels, faults=tuple(faults), table=table)


def _column(sheet: Sheet, name: str, key: str) -> list[object]:
    if name not in sheet.columns:
        names = list(sheet.columns)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        folded = [other for other in names if other.casefold() == name.casefold()]
        guess = f" Did you mean {(folded or near)[0]!r}?" if folded or near else ""
        there = ", ".join(map(repr, names))
        message = f"{sheet.name}: no column {name!r} (data.{key}).{guess} There are: {there}. Set data.{key}."
        raise DataError(message)
    return _values(sheet.columns[name])


def _values(column: Column) -> list[object]:
    """Python values of a column. Arrow strings come as bytes: Arrow does not check that they are UTF-8."""
    if isinstance(column, list):
        return column
    values: list[object] = []
    for chunk in column.chunks:
        kind = chunk.type
        if pa.types.is_dictionary(kind):
            words = _values(pa.chunked_array([chunk.dictionary]))
            values += [None if index is None else words[index] for index in chunk.indices.to_pylist()]
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            values += chunk.cast(pa.large_binary()).to_pylist()
        else:
            values += chunk.to_pylist()
    return values


def _as_text(value: object) -> tuple[str, str]:
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
    elif isinstance(value, (list, tuple, dict)):
        return json.dumps(value, default=str), "not a text"
    else:
        text = str(value)
    if text.isascii():
        return text, ""
    try:
        text.encode()
    except UnicodeEncodeError:
        return _escape(text), "not UTF-8"
    return text, ""


def _escape(text: str) -> str:
    r"""Write what is not UTF-8 as `\xff` (a byte) or `\ud800` (half a character, as JSON can hold)."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def _as_arrow(column: Column) -> pa.Array | pa.ChunkedArray:
    """A column as Arrow, whatever its values: mixed ones become text."""
    if not isinstance(column, list):
        return column
    clean: Sequence[object] = [_as_text(value)[0] if isinstance(value, str) else value for value in column]
    try:
        return pa.array(clean)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return pa.array([None if value is None else _as_text(value)[0] for value in clean], type=pa.string())
