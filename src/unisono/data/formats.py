"""Files and frames as columns of what stands in them.

Owns the formats: CSV (quoting as in RFC 4180), TSV (cut at tabs alone, no quoting), JSONL, Parquet, a folder
per class, and what Python holds in memory. Knows nothing of texts and classes: `data/read.py` picks those
columns.

Text files are UTF-8. A byte that is not becomes a lone surrogate, as in `os.fsdecode`, so that it spoils its
own field only. A row that cannot be cut into fields stays a row, with a fault. Blank lines are no rows.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

import pyarrow as pa

from unisono.errors import DataError
from unisono.sections import Data

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}

Column: TypeAlias = list[object] | pa.ChunkedArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a row could not be cut into fields, and the row as it stood."""

    reason: str
    raw: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The rows of one file or frame, as columns of equal length."""

    name: str
    rows: int
    columns: Mapping[str, Column]
    faults: Mapping[int, Fault] = field(default_factory=dict)
    """By row number from 0; such a row's fields are filled with None."""
    files: Sequence[str] | None = None
    """The file of each row, where rows come from many."""


def find_format(path: Path, data: Data) -> str:
    """Return csv, tsv, jsonl, parquet or folder for an existing path.

    Raises:
        DataError: there is no such file, or its name does not tell its format.
    """
    if not path.exists():
        raise DataError(f"{str(path)!r}: no such file. Paths in a recipe are relative to its folder.")
    if path.is_dir():
        return "folder"
    if data.format == "folder":
        raise DataError(
            f"{str(path)!r} is a file, but data.format = 'folder'. Give a folder with one folder per class."
        )
    if data.format != "auto":
        return data.format
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise DataError(f"{str(path)!r}: known are {known} and folders. Rename it, or set data.format.")
    return SUFFIXES[path.suffix.lower()]


def read_file(path: Path, data: Data) -> Sheet:
    """Read a file or a folder of any format.

    Raises:
        DataError: it is missing, unreadable, empty or damaged, or its header is not what the recipe says.
    """
    kind = find_format(path, data)
    try:
        if kind == "folder":
            sheet = _read_folder(path, data)
        elif kind == "parquet":
            sheet = _read_parquet(path)
        else:
            with path.open("rb") as file:
                _refuse_utf16(path, file)
                sheet = _read_jsonl(path, file) if kind == "jsonl" else _read_rows(path, file, kind, data)
    except OSError as error:
        raise DataError(f"{str(path)!r}: cannot be read: {error.strerror or error}.") from None
    if not sheet.rows:
        raise DataError(f"{str(path)!r}: there is no record in it. Give a file with at least one.")
    return sheet


def read_frame(frame: object, data: Data, name: str) -> Sheet:
    """Read a pandas or Polars frame, an Arrow table (anything with `__arrow_c_stream__`), or lists.

    Lists are a mapping of column names to lists, a list of mappings, a list of texts, or a pair (texts,
    labels).

    Raises:
        DataError: it is none of these, its lists differ in length, or it is empty.
    """
    columns: dict[str, Column]
    if isinstance(frame, Mapping):
        columns = {str(key): list(values) for key, values in frame.items()}
    elif isinstance(frame, (list, tuple)) and all(isinstance(row, Mapping) for row in frame):
        columns = _transpose(frame)
    elif isinstance(frame, (list, tuple)) and all(isinstance(text, str) for text in frame):
        columns = {data.text: list(frame)}
    elif isinstance(frame, tuple) and len(frame) == 2:
        columns = {data.text: list(frame[0]), data.label: list(frame[1])}
    else:
        columns = _arrow_columns(frame, name)
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}: columns of different lengths: {lengths}. Give all the same.")
    rows = max(lengths.values(), default=0)
    if not rows:
        raise DataError(f"{name}: there is no record in it. Give at least one row.")
    return Sheet(name=name, rows=rows, columns=columns)


def _arrow_columns(frame: object, name: str) -> dict[str, Column]:
    try:
        table = frame if isinstance(frame, pa.Table) else pa.table(frame)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{name}: {type(frame).__name__} is no table: {error}. "
            "Give a pandas or Polars frame, an Arrow table, a dict of lists, a list of dicts, or a pair."
        ) from None
    _check_names(name, table.column_names)
    return dict(zip(table.column_names, table.columns, strict=True))


def _read_folder(path: Path, data: Data) -> Sheet:
    """One record per file; its class is its first folder below `path`. Hidden files are no records."""
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    files.sort(key=lambda file: file.parts)
    names: list[object] = [file.as_posix() for file in files]
    columns: dict[str, Column] = {
        "file": names,
        data.text: [(path / file).read_bytes().decode("utf-8-sig", "surrogateescape") for file in files],
        data.label: [file.parts[0] if len(file.parts) > 1 else None for file in files],
    }
    return Sheet(name=path.name, rows=len(files), columns=columns, files=[str(name) for name in names])


def _read_parquet(path: Path) -> Sheet:
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise DataError(f"{str(path)!r}: not readable as Parquet: {error}.") from None
    _check_names(str(path), table.column_names)
    columns = dict(zip(table.column_names, table.columns, strict=True))
    return Sheet(name=path.name, rows=table.num_rows, columns=columns)


def _read_jsonl(path: Path, file: BinaryIO) -> Sheet:
    rows: list[Mapping[object, object]] = []
    faults: dict[int, Fault] = {}
    for line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            faults[len(rows)] = Fault(reason="not JSON", raw=line)
            row = {}
        rows.append(row)
    return Sheet(name=path.name, rows=len(rows), columns=_transpose(rows), faults=faults)


def _read_rows(path: Path, file: BinaryIO, kind: str, data: Data) -> Sheet:
    """Read CSV or TSV: header lines, then rows that must have as many fields as there are names."""
    cut = _cut_csv(path, file) if kind == "csv" else _cut_tsv(file)
    header = [row for _, row in zip(range(data.header_lines), cut, strict=False)]
    if not header and data.header_lines:
        raise DataError(f"{str(path)!r} is empty. Give a file with at least one record.")
    if len(header) < data.header_lines:
        raise DataError(
            f"{str(path)!r} has {len(header)} lines, but data.header_lines = {data.header_lines}. "
            "Set it to the number of lines before the first record."
        )
    names = _name_columns(path, header, data)
    rows: list[Sequence[str | None]] = []
    faults: dict[int, Fault] = {}
    for row in cut:
        if isinstance(row, Fault):
            faults[len(rows)] = row
        elif not row:
            continue
        elif len(row) != len(names):
            raw = ("," if kind == "csv" else "\t").join(row)
            faults[len(rows)] = Fault(reason=f"{len(row)} fields, not {len(names)}", raw=raw)
        else:
            rows.append(row)
            continue
        rows.append([None] * len(names))
    fields = zip(*rows, strict=True) if rows else ([] for _ in names)
    columns: dict[str, Column] = {name: list(values) for name, values in zip(names, fields, strict=True)}
    return Sheet(name=path.name, rows=len(rows), columns=columns, faults=faults)


def _name_columns(path: Path, header: Sequence[list[str] | Fault], data: Data) -> list[str]:
    if data.columns:
        names = list(data.columns)
    elif not header:
        raise DataError(f"{str(path)!r}: with data.header_lines = 0 no line names the columns. Set data.columns.")
    elif isinstance(header[0], Fault):
        reason = header[0].reason
        raise DataError(f"{str(path)!r}: the first line does not name columns: {reason}. Set data.columns.")
    else:
        names = [name.strip() or f"column {number}" for number, name in enumerate(header[0], 1)]
    _check_names(str(path), names)
    return names


def _check_names(name: str, columns: Sequence[str]) -> None:
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{name}: two columns are named {twice[0]!r}. Rename one, or set data.columns.")


def _lines(file: BinaryIO) -> Iterator[str]:
    """Lines without their ends (\\n, \\r\\n), whatever bytes they hold."""
    for number, line in enumerate(file):
        encoding = "utf-8" if number else "utf-8-sig"
        yield line.removesuffix(b"\n").removesuffix(b"\r").decode(encoding, "surrogateescape")


def _cut_tsv(file: BinaryIO) -> Iterator[list[str] | Fault]:
    for line in _lines(file):
        yield line.split("\t") if line else []


def _cut_csv(path: Path, file: BinaryIO) -> Iterator[list[str] | Fault]:
    """Cut CSV into rows, a bad one into a fault. A quote that never closes swallows the rest: an error."""
    consumed: list[str] = []
    lines = _keep(_csv_lines(file), consumed)
    csv.field_size_limit(sys.maxsize)  # by default it is 131,072 characters; there is no limit per reader
    reader = csv.reader(lines, strict=True)
    while True:
        consumed.clear()
        start = reader.line_num + 1
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                message = f"{str(path)!r}: a quote in the row from line {start} never closes. Close or double it."
                raise DataError(message) from None
            yield Fault(reason="not CSV", raw="".join(consumed).rstrip("\r\n"))


def _csv_lines(file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file):
        yield line.decode("utf-8" if number else "utf-8-sig", "surrogateescape")


def _keep(lines: Iterable[str], consumed: list[str]) -> Iterator[str]:
    for line in lines:
        consumed.append(line)
        yield line


def _transpose(rows: Sequence[Mapping]) -> dict[str, Column]:
    """Turn mappings into columns, named in order of first appearance; what a row lacks is None."""
    names = dict.fromkeys(key for row in rows for key in row)
    return {str(name): [row.get(name) for row in rows] for name in names}


def _refuse_utf16(path: Path, file: BinaryIO) -> None:
    if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{str(path)!r} is UTF-16. Save it as UTF-8.")
    file.seek(0)
