"""Rows of JSONL, TSV and CSV: from lines to column batches of bounded size.

Owns the text formats: CSV (quoting as in RFC 4180), TSV (cut at tabs alone, no quoting), JSONL. Does not know
where lines come from (`lines.py`) or what columns mean (`read.py`).

A byte that is not UTF-8 becomes a lone surrogate, as in `os.fsdecode`, so that it spoils its own field only. A
row that cannot be cut into fields stays a row, with a fault. Blank lines are no rows.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from unisono.config.sections import Data
from unisono.data.ingest.column_batch import (
    COLUMN_BATCH_BYTES,
    COLUMN_BATCH_ROWS,
    Column,
    ColumnBatch,
    FieldFault,
    check_names,
    transpose,
)
from unisono.data.ingest.lines import Long, decode, decode_head
from unisono.errors import DataError

TOO_LARGE = "larger than data.max_record_bytes"
TOO_DEEP = "nested deeper than data.max_depth"
COLUMN_BATCH_CELLS = 64 * COLUMN_BATCH_ROWS
"""Objects of all different keys would make columns of their number squared."""
SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def read_jsonl(lines: Iterable[bytes | Long], name: str, data: Data) -> Iterator[ColumnBatch]:
    """Column batches of rows, one from each line's object."""
    rows: list[Mapping[object, object]] = []
    faults: dict[int, FieldFault] = {}
    names: set[object] = set()
    size, depth = 0, data.max_depth
    for line in lines:
        if isinstance(line, Long):
            row: Any = FieldFault(reason=TOO_LARGE, raw=decode_head(line.head))
        else:
            text = decode(line)
            if not text or text.isspace():
                continue
            size += len(line)
            if text.count("{") + text.count("[") > depth and measure_depth(text) > depth:
                row = FieldFault(reason=TOO_DEEP, raw=text)
            else:
                row = _parse(text)
        if isinstance(row, FieldFault):
            faults[len(rows)] = row
            row = {}
        rows.append(row)
        names.update(row)
        if size >= COLUMN_BATCH_BYTES or len(rows) >= COLUMN_BATCH_ROWS or len(rows) * len(names) >= COLUMN_BATCH_CELLS:
            yield ColumnBatch(name=name, rows=len(rows), columns=transpose(rows), faults=faults)
            rows, faults, names, size = [], {}, set(), 0
    if rows:
        yield ColumnBatch(name=name, rows=len(rows), columns=transpose(rows), faults=faults)


def _parse(text: str) -> dict[object, object] | FieldFault:
    """Parse an object, as json.loads does, which spends a third of its time on the spaces around it."""
    try:
        row, end = SCAN(text, 0)
    except (ValueError, RecursionError, StopIteration):
        end = -1
    if end != len(text):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
    return row if isinstance(row, dict) else FieldFault(reason="not JSON", raw=text)


def measure_depth(text: str) -> int:
    """The largest number of brackets that are open at once, outside strings."""
    codes = np.frombuffer(STRING.sub("", text).encode("utf-8", "surrogatepass"), np.uint8)
    opened = (codes == ord("{")).astype(np.int32) + (codes == ord("["))
    closed = (codes == ord("}")).astype(np.int32) + (codes == ord("]"))
    return int(np.cumsum(opened - closed).max(initial=0))


def read_tsv(lines: Iterable[bytes | Long], name: str, columns: Sequence[str]) -> Iterator[ColumnBatch]:
    """Column batches of rows that must have as many fields as there are columns; without the header lines."""
    return _read_fields(cut_tsv(lines), name, columns, "\t")


def read_csv(lines: Iterable[bytes | Long], name: str, told: str, data: Data) -> Iterator[ColumnBatch]:
    """Column batches of CSV, from its header on. Raises DataError for a bad header and a quote that never closes."""
    rows = cut_csv(lines, told, data)
    columns = read_header((row for row, _ in rows), told, data)
    return _read_fields(rows, name, columns, ",")


def read_header(rows: Iterable[Sequence[str] | FieldFault], told: str, data: Data) -> list[str]:
    """Take the header lines off rows, and return the columns' names. Raises DataError."""
    header = list(islice(rows, data.header_lines))
    if not header and data.header_lines:
        raise DataError(f"{told} is empty. Give a file with at least one record.")
    if len(header) < data.header_lines:
        raise DataError(
            f"{told} has {len(header)} lines, but data.header_lines = {data.header_lines}. "
            "Set it to the number of lines before the first record."
        )
    if data.columns:
        names = list(data.columns)
    elif not header:
        raise DataError(f"{told}: with data.header_lines = 0 no line names the columns. Set data.columns.")
    elif isinstance(header[0], FieldFault):
        raise DataError(f"{told}: the first line does not name columns: {header[0].reason}. Set data.columns.")
    else:
        names = [name.strip() or f"column {number}" for number, name in enumerate(header[0], 1)]
    check_names(told, names)
    return names


def _read_fields(
    cut: Iterable[tuple[Sequence[str] | FieldFault, int]], name: str, columns: Sequence[str], separator: str
) -> Iterator[ColumnBatch]:
    rows: list[Sequence[str | None]] = []
    faults: dict[int, FieldFault] = {}
    size, width = 0, len(columns)
    blank = [None] * width
    for row, row_bytes in cut:
        if isinstance(row, FieldFault):
            faults[len(rows)] = row
            rows.append(blank)
        elif not row:
            continue
        elif len(row) != width:
            faults[len(rows)] = FieldFault(reason=f"{len(row)} fields, not {width}", raw=separator.join(row))
            rows.append(blank)
        else:
            rows.append(row)
        size += row_bytes
        if size >= COLUMN_BATCH_BYTES or len(rows) >= COLUMN_BATCH_ROWS:
            yield _stand(rows, faults, name, columns)
            rows, faults, size = [], {}, 0
    if rows:
        yield _stand(rows, faults, name, columns)


def _stand(
    rows: list[Sequence[str | None]], faults: Mapping[int, FieldFault], name: str, columns: Sequence[str]
) -> ColumnBatch:
    fields: dict[str, Column] = {
        column: list(values) for column, values in zip(columns, zip(*rows, strict=True), strict=True)
    }
    return ColumnBatch(name=name, rows=len(rows), columns=fields, faults=faults)


def cut_tsv(lines: Iterable[bytes | Long]) -> Iterator[tuple[list[str] | FieldFault, int]]:
    """Rows, each with its size in bytes; a blank line is an empty row."""
    for line in lines:
        if isinstance(line, Long):
            yield FieldFault(reason=TOO_LARGE, raw=decode_head(line.head)), 0
        else:
            text = decode(line)
            yield text.split("\t") if text else [], len(line)


class _Large(Exception):
    """A row of CSV has grown beyond the limit."""


class _Feed:
    """Lines for csv.reader, with those of the row in progress, and the end of a row that is too large."""

    def __init__(self, lines: Iterable[bytes | Long], limit: int) -> None:
        self._lines = iter(lines)
        self._limit = limit
        self.number = 0
        self.size = 0
        self.consumed: list[bytes] = []

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if isinstance(line, Long):
            self.skip(line.quotes)
            self.consumed.append(line.head)
            raise _Large
        self.consumed.append(line)
        self.size += len(line)
        if self.size > self._limit:
            self.skip(0)
            raise _Large
        return line.decode("utf-8", "surrogateescape") + "\n"

    def skip(self, quotes: int) -> None:
        """Skip to the end of a row that is too large: the line after which every quote is closed."""
        quotes += sum(line.count(b'"') for line in self.consumed)
        while quotes % 2:
            line = next(self._lines, None)
            if line is None:
                raise csv.Error("unexpected end of data")
            self.number += 1
            quotes += line.quotes if isinstance(line, Long) else line.count(b'"')

    def begin_row(self) -> None:
        self.consumed.clear()
        self.size = 0


def cut_csv(lines: Iterable[bytes | Long], told: str, data: Data) -> Iterator[tuple[list[str] | FieldFault, int]]:
    """Cut CSV into rows, each with its size in bytes; a bad row becomes a fault.

    Raises:
        DataError: a quote never closes, so that the rest of the file would be one field.
    """
    feed = _Feed(lines, data.max_record_bytes)
    csv.field_size_limit(sys.maxsize)  # by default it is 131,072 characters; there is no limit per reader
    reader = csv.reader(feed, strict=True)
    while True:
        feed.begin_row()
        start = feed.number + 1
        try:
            yield next(reader), feed.size
        except StopIteration:
            return
        except _Large:
            yield FieldFault(reason=TOO_LARGE, raw=decode_head(b"\n".join(feed.consumed))), 0
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                message = f"{told}: a quote in the row from line {start} never closes. Close or double it."
                raise DataError(message) from None
            raw = b"\n".join(feed.consumed).decode("utf-8", "surrogateescape").rstrip("\r\n")
            yield FieldFault(reason="not CSV", raw=raw), feed.size
