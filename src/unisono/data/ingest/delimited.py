"""Rows of JSONL, TSV and CSV: from lines to column batches of bounded size.

Owns the text formats: fields with quotes (as in RFC 4180) or an escape character, fields cut at the delimiter alone,
JSONL. Does not know where lines come from (`lines.py`), which dialect they have (`dialects.py`), or what columns mean
(`read.py`).

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
from unisono.data.ingest.dialects import Dialect
from unisono.data.ingest.documents import SCAN, cut_document
from unisono.data.ingest.lines import HEAD_BYTES, Long, decode, decode_head
from unisono.errors import DataError

TOO_LARGE = "larger than data.max_record_bytes"
TOO_DEEP = "nested deeper than data.max_depth"
NOT_JSON = "not JSON"
COLUMN_BATCH_CELLS = 64 * COLUMN_BATCH_ROWS
"""Objects of all different keys would make columns of their number squared."""
COMMAS, QUOTED = Dialect(), Dialect(quote='"')
STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


def read_jsonl(lines: Iterable[bytes | Long], name: str, data: Data) -> Iterator[ColumnBatch]:
    """Column batches of rows, one from each line's object."""
    return _stand_rows(_cut_jsonl(lines, data), name)


def read_document(blocks: Iterator[bytes], name: str, told: str, data: Data) -> Iterator[ColumnBatch]:
    """Column batches of the objects of a JSON document. Raises DataError: see `cut_document`."""

    def cut() -> Iterator[tuple[dict[object, object] | FieldFault, int]]:
        for value, text in cut_document(blocks, told, data.max_record_bytes):
            if len(text) > data.max_record_bytes:
                value = FieldFault(reason=TOO_LARGE, raw=decode_head(text[:HEAD_BYTES].encode(errors="replace")))
            elif text.count("{") + text.count("[") > data.max_depth and measure_depth(text) > data.max_depth:
                value = FieldFault(reason=TOO_DEEP, raw=text)
            yield value if isinstance(value, dict | FieldFault) else FieldFault(reason="no object", raw=text), len(text)

    return _stand_rows(cut(), name)


def _cut_jsonl(lines: Iterable[bytes | Long], data: Data) -> Iterator[tuple[dict[object, object] | FieldFault, int]]:
    """The object of each line, with the line's bytes."""
    depth = data.max_depth
    for line in lines:
        if isinstance(line, Long):
            yield FieldFault(reason=TOO_LARGE, raw=decode_head(line.head)), 0
            continue
        text = decode(line)
        if not text or text.isspace():
            continue
        if text.count("{") + text.count("[") > depth and measure_depth(text) > depth:
            yield FieldFault(reason=TOO_DEEP, raw=text), len(line)
        else:
            yield _parse(text), len(line)


def _stand_rows(cut: Iterable[tuple[dict[object, object] | FieldFault, int]], name: str) -> Iterator[ColumnBatch]:
    rows: list[Mapping[object, object]] = []
    faults: dict[int, FieldFault] = {}
    names: set[object] = set()
    size = 0
    for row, row_bytes in cut:
        size += row_bytes
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
    """Parse an object, as json.loads does, which spends a third of its time on the spaces around it.

    A comma after the object is no part of it: lines of an array's inside have one.
    """
    try:
        row, end = SCAN(text, 0)
    except (ValueError, RecursionError, StopIteration):
        end = -1
    if end != len(text):
        try:
            row = json.loads(text.rstrip().removesuffix(","))
        except (ValueError, RecursionError):
            row = None
    return row if isinstance(row, dict) else FieldFault(reason=NOT_JSON, raw=text)


def measure_depth(text: str) -> int:
    """The largest number of brackets that are open at once, outside strings."""
    codes = np.frombuffer(STRING.sub("", text).encode("utf-8", "surrogatepass"), np.uint8)
    opened = (codes == ord("{")).astype(np.int32) + (codes == ord("["))
    closed = (codes == ord("}")).astype(np.int32) + (codes == ord("]"))
    return int(np.cumsum(opened - closed).max(initial=0))


def read_plain(
    lines: Iterable[bytes | Long], name: str, columns: Sequence[str], dialect: Dialect
) -> Iterator[ColumnBatch]:
    """Column batches of rows without quotes, as many fields each as there are columns; without the header lines."""
    return _read_fields(cut_plain(lines, dialect), name, columns, dialect)


def read_csv(
    lines: Iterable[bytes | Long], name: str, told: str, data: Data, dialect: Dialect = QUOTED
) -> Iterator[ColumnBatch]:
    """Column batches of fields in lines, from the header on.

    Raises:
        DataError: a bad header, or a quote that does not close, or not within data.max_lines.
    """
    if dialect.separator_line:
        lines = islice(lines, 1, None)
    rows = cut_csv(lines, told, data, dialect) if dialect.quote or dialect.escape else cut_plain(lines, dialect)
    columns = read_header((row for row, _ in rows), told, data)
    return _read_fields(rows, name, columns, dialect)


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
    cut: Iterable[tuple[Sequence[str] | FieldFault, int]], name: str, columns: Sequence[str], dialect: Dialect
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
            raw = dialect.delimiter.join(row)
            if not dialect.quote_seen and any(field.startswith('"') for field in row):
                raise DataError(
                    f"{name}: a row has {len(row)} fields, not {width}, and a quote opens in it: {raw[:80]!r}. Set "
                    "data.quote = '\"' if quotes enclose fields, or data.quote = 'none' if they are text."
                )
            faults[len(rows)] = FieldFault(reason=f"{len(row)} fields, not {width}", raw=raw)
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


def cut_plain(lines: Iterable[bytes | Long], dialect: Dialect = COMMAS) -> Iterator[tuple[list[str] | FieldFault, int]]:
    """Rows cut at the delimiter alone, each with its size in bytes; a blank line is an empty row."""
    comment = dialect.comment.encode()
    for line in lines:
        content = line.head if isinstance(line, Long) else line
        if comment and content.startswith(comment):
            continue
        if isinstance(line, Long):
            yield FieldFault(reason=TOO_LARGE, raw=decode_head(line.head)), 0
        else:
            text = decode(line)
            yield text.split(dialect.delimiter) if text else [], len(line)


class _Large(Exception):
    """A row of CSV has grown beyond the limit."""


class _Feed:
    """Lines for csv.reader, with those of the row in progress, and the end of a row that is too large."""

    def __init__(self, lines: Iterable[bytes | Long], told: str, data: Data, dialect: Dialect) -> None:
        self._lines = iter(lines)
        self._told = told
        self._limit = data.max_record_bytes
        self._most_lines = data.max_lines
        self._dialect = dialect
        self._quote = dialect.quote.encode()
        self._comment = dialect.comment.encode()
        self.number = int(dialect.separator_line)
        self.start = 0
        self.size = 0
        self.consumed: list[bytes] = []

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if self.consumed:
            self._count_lines()
        elif self._comment:
            while (line.head if isinstance(line, Long) else line).startswith(self._comment):
                line = next(self._lines)
                self.number += 1
            self.start = self.number
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
        if self._dialect.escape:
            raise DataError(
                f"{self._told}: the row from line {self.start} is larger than data.max_record_bytes = {self._limit}; "
                "with data.escape its end is not certain. Raise the limit, or mend the row."
            )
        quotes += sum(line.count(self._quote) for line in self.consumed)
        while quotes % 2:
            line = next(self._lines, None)
            if line is None:
                raise csv.Error("unexpected end of data")
            self.number += 1
            self._count_lines()
            quotes += line.quotes if isinstance(line, Long) else line.count(self._quote)

    def begin_row(self) -> None:
        self.consumed.clear()
        self.size = 0
        self.start = self.number + 1

    def _count_lines(self) -> None:
        if self.number - self.start >= self._most_lines:
            raise DataError(
                f"{self._told}: the record from line {self.start} has more than data.max_lines = {self._most_lines} "
                "lines: most likely a quote in it does not close. Close or double it, or raise data.max_lines."
            )


def cut_csv(
    lines: Iterable[bytes | Long], told: str, data: Data, dialect: Dialect = QUOTED
) -> Iterator[tuple[list[str] | FieldFault, int]]:
    """Cut fields with quotes or an escape character into rows, each with its size in bytes; a bad row becomes a fault.

    Raises:
        DataError: a quote never closes, so that the rest of the file would be one field, or not in data.max_lines.
    """
    feed = _Feed(lines, told, data, dialect)
    csv.field_size_limit(sys.maxsize)  # by default it is 131,072 characters; there is no limit per reader
    reader = csv.reader(
        feed,
        strict=True,
        delimiter=dialect.delimiter,
        quotechar=dialect.quote or None,
        quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
        escapechar=dialect.escape or None,
    )
    while True:
        feed.begin_row()
        try:
            yield next(reader), feed.size
        except StopIteration:
            return
        except _Large:
            yield FieldFault(reason=TOO_LARGE, raw=decode_head(b"\n".join(feed.consumed))), 0
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                message = f"{told}: a quote in the row from line {feed.start} never closes. Close or double it."
                raise DataError(message) from None
            raw = b"\n".join(feed.consumed).decode("utf-8", "surrogateescape").rstrip("\r\n")
            lines_of = f", lines {feed.start} to {feed.number}" if feed.number > feed.start else ""
            yield FieldFault(reason=f"not CSV{lines_of}", raw=raw), feed.size
