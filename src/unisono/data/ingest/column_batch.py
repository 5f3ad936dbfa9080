"""Column batches: some rows of a source, as columns of equal length.

Owns what readers return, and how column batches are cut and joined. Depends on no format and no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unisono.errors import DataError

COLUMN_BATCH_BYTES = 2 * 2**20
"""A column batch that is read from a file ends with the row that reaches this size."""
COLUMN_BATCH_ROWS = 65_536

Column: TypeAlias = list[object] | pa.ChunkedArray


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldFault:
    """Why a row could not be cut into fields, and the row as it was (of a very large row, its beginning)."""

    reason: str
    raw: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """A value that Python cannot hold: a date after the year 9999, a list in which a text is not UTF-8."""

    kind: str

    def __str__(self) -> str:
        return f"<{self.kind}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnBatch:
    """Some rows of one source, as columns of equal length."""

    name: str
    rows: int
    columns: Mapping[str, Column]
    """JSONL: those that some row of the column batch has, in order of first appearance."""
    faults: Mapping[int, FieldFault] = field(default_factory=dict)
    """By row number from 0; such a row's fields are filled with None."""
    files: Sequence[str] | None = None
    """The file of each row, where rows come from many."""


def cut_column_batch(column_batch: ColumnBatch, rows: int = COLUMN_BATCH_ROWS) -> Iterator[ColumnBatch]:
    """Cut into column batches of at most `rows` rows, in order. Arrow columns are not copied, lists by reference."""
    for start in range(0, column_batch.rows, rows):
        yield _slice(column_batch, start, min(start + rows, column_batch.rows))


def _slice(column_batch: ColumnBatch, start: int, stop: int) -> ColumnBatch:
    return ColumnBatch(
        name=column_batch.name,
        rows=stop - start,
        columns={name: column[start:stop] for name, column in column_batch.columns.items()},
        faults={row - start: fault for row, fault in column_batch.faults.items() if start <= row < stop},
        files=column_batch.files[start:stop] if column_batch.files else None,
    )


def pick_column(column_batch: ColumnBatch, name: str) -> Column | None:
    """The column `name`, or the field b of a column a for the name a.b; None where there is neither.

    A column of exactly that name has priority. In JSONL that holds for each row, as each row has its own columns.
    """
    column = column_batch.columns.get(name)
    if "." not in name or isinstance(column, pa.ChunkedArray):
        return column
    for root, values in column_batch.columns.items():
        if name.startswith(f"{root}.") and (nested := _pick_field(values, name[len(root) + 1 :])) is not None:
            if column is None:
                return nested
            both = zip(column, list_values(nested), strict=True)
            return [below if value is None else value for value, below in both]
    return column


def _pick_field(column: Column, path: str) -> Column | None:
    if isinstance(column, list):
        values = [_descend(value, path) for value in column]
        return None if all(value is None for value in values) else values
    while path:
        names = [one.name for one in column.type] if pa.types.is_struct(column.type) else []
        name = next((one for one in names if path == one or path.startswith(f"{one}.")), None)
        if name is None:
            return None
        column, path = pc.struct_field(column, names.index(name)), path[len(name) + 1 :]
    return column


def _descend(value: object, path: str) -> object:
    if not isinstance(value, Mapping) or path in value:
        return value.get(path) if isinstance(value, Mapping) else None
    name, _, rest = path.partition(".")
    return _descend(value.get(name), rest) if rest else None


def is_wanted(column: str, wanted: Sequence[str]) -> bool:
    """Whether a column is among those that are wanted, or holds one of them as a field."""
    return any(name == column or name.startswith(f"{column}.") for name in wanted)


def list_names(column_batch: ColumnBatch, wanted: Sequence[str]) -> list[str]:
    """The names of the columns, and of their fields as a.b; of JSONL's, those that are wanted or stand first."""
    names = dict.fromkeys(column_batch.columns)
    for name, column in column_batch.columns.items():
        if isinstance(column, list):
            below = next((value for value in islice(column, 100) if isinstance(value, Mapping)), {})
            names |= {f"{name}.{key}": None for key in below}
        elif pa.types.is_struct(column.type):
            names |= {f"{name}.{one.name}": None for one in column.type}
    found = (name for name in wanted if name not in names and pick_column(column_batch, name) is not None)
    return [*names, *found]


def cut_by_size(
    column_batch: ColumnBatch, names: Sequence[str], size_bytes: int = COLUMN_BATCH_BYTES
) -> Iterator[ColumnBatch]:
    """Cut a column batch after each row with which the texts of the columns `names` reach `size_bytes` as UTF-8.

    So the same content is cut in the same places, whatever holds it.
    """
    sizes = [_measure(column) for name in names if (column := pick_column(column_batch, name)) is not None]
    ends = np.cumsum(sum(sizes[1:], sizes[0])) if sizes else np.empty(0, np.int64)
    start = reached = 0
    while start < column_batch.rows:
        stop = (
            min(int(np.searchsorted(ends, reached + size_bytes)) + 1, column_batch.rows)
            if len(ends)
            else column_batch.rows
        )
        yield _slice(column_batch, start, stop)
        start, reached = stop, int(ends[stop - 1]) if len(ends) else 0


def _measure(column: Column) -> np.ndarray:
    """Bytes of each text, int64 [rows]; 0 for a value that is no text."""
    if isinstance(column, list):
        return np.fromiter(map(_count_bytes, column), np.int64, len(column))
    return np.concatenate([np.empty(0, np.int64), *map(_measure_chunk, column.chunks)])


def _measure_chunk(chunk: pa.Array) -> np.ndarray:
    kind = chunk.type
    if not len(chunk):
        return np.empty(0, np.int64)
    if pa.types.is_dictionary(kind):
        words = pa.array(_measure_chunk(chunk.dictionary))
        return pc.fill_null(words.take(chunk.indices), 0).to_numpy()
    if pa.types.is_string_view(kind):  # no kernel measures views; the first of a view's four numbers is its length
        views = np.frombuffer(chunk.buffers()[1], np.int32)[4 * chunk.offset :: 4][: len(chunk)]
        return np.where(chunk.is_valid(), views, 0).astype(np.int64)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.fill_null(pc.binary_length(chunk), 0).to_numpy().astype(np.int64)
    return np.zeros(len(chunk), np.int64)


def _count_bytes(value: object) -> int:
    if not isinstance(value, str):
        return 0
    return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))


def join_column_batches(column_batches: Sequence[ColumnBatch], name: str) -> ColumnBatch:
    """Join column batches, one after the other. Where one of them lacks a column, its values are None."""
    if len(column_batches) == 1:
        return column_batches[0]
    names = dict.fromkeys(column for column_batch in column_batches for column in column_batch.columns)
    faults: dict[int, FieldFault] = {}
    files: list[str] = []
    rows = 0
    for column_batch in column_batches:
        faults.update({rows + row: fault for row, fault in column_batch.faults.items()})
        files += column_batch.files or [column_batch.name] * column_batch.rows
        rows += column_batch.rows
    many = len({column_batch.name for column_batch in column_batches}) > 1 or any(
        column_batch.files for column_batch in column_batches
    )
    columns = {
        column: _join([column_batch.columns.get(column) for column_batch in column_batches], column_batches)
        for column in names
    }
    return ColumnBatch(name=name, rows=rows, columns=columns, faults=faults, files=files if many else None)


def _join(parts: Sequence[Column | None], column_batches: Sequence[ColumnBatch]) -> Column:
    kinds = {part.type if isinstance(part, pa.ChunkedArray) else None for part in parts}
    if len(kinds) == 1 and None not in kinds:
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], kinds.pop())  # type: ignore[union-attr]
    joined: list[object] = []
    for part, column_batch in zip(parts, column_batches, strict=True):
        joined += [None] * column_batch.rows if part is None else list_values(part)
    return joined


def list_values(column: Column) -> list[object]:
    """Python values of a column. Arrow strings come as bytes: Arrow does not check that they are UTF-8."""
    if isinstance(column, list):
        return column
    values: list[object] = []
    for chunk in column.chunks:
        kind = chunk.type
        if pa.types.is_dictionary(kind):
            words = list_values(pa.chunked_array([chunk.dictionary]))
            values += [None if index is None else words[index] for index in chunk.indices.to_pylist()]
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            values += chunk.cast(pa.large_binary()).to_pylist()
        else:
            values += _list_others(chunk)
    return values


def _list_others(chunk: pa.Array) -> list[object]:
    def read(scalar: pa.Scalar) -> object:
        try:
            return scalar.as_py()
        except (ValueError, OverflowError, pa.ArrowException):
            return Foreign(str(scalar.type))

    try:
        values: list[object] = chunk.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        values = [read(scalar) for scalar in chunk]
    return values


def transpose(rows: Sequence[Mapping]) -> dict[str, Column]:
    """Turn mappings into columns, named in order of first appearance; a value that a row lacks is None."""
    names = dict.fromkeys(key for row in rows for key in row)
    return {str(name): [row.get(name) for row in rows] for name in names}


def check_names(name: str, columns: Sequence[str]) -> None:
    """Raise DataError if two columns have one name."""
    twice = [column for column, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{name}: two columns are named {twice[0]!r}. Rename one, or set data.columns.")
