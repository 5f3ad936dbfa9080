"""Tables of typed columns: Parquet files and frames, as column batches.

Owns what depends on Arrow. Columns stay Arrow columns, not copied; `read.py` turns their values into Python's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from unisono.config.sections import Data
from unisono.data.ingest.column_batch import (
    COLUMN_BATCH_BYTES,
    COLUMN_BATCH_ROWS,
    Column,
    ColumnBatch,
    FieldFault,
    check_names,
    is_wanted,
    transpose,
)
from unisono.data.ingest.delimited import TOO_LARGE
from unisono.data.ingest.frames import take_column, take_columns
from unisono.errors import DataError

BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Neighbouring row groups of a Parquet file, and a share of the file's bytes, which identifies them.

    All shares together are the file. Where a group lies is not read: where the facts of a column are damaged, pyarrow
    ends the process.
    """

    first: int
    last: int
    """One past the last group."""
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """The facts in a Parquet file's footer."""

    columns: tuple[str, ...]
    sha256: str
    groups: tuple[Groups, ...]


def read_footer(file: BinaryIO, told: str, input_split_bytes: int) -> Footer:
    """Read the footer of a Parquet file, and cut its row groups into runs of about `input_split_bytes` unpacked bytes.

    Raises:
        DataError: the file is no Parquet, its numbers of rows do not add up, or two columns have one name.
    """
    facts = _open(file, told).metadata
    columns = tuple(facts.schema.to_arrow_schema().names)
    check_names(told, columns)
    size = file.seek(0, 2)
    file.seek(size - facts.serialized_size - 8)
    sha256 = hashlib.sha256(file.read(facts.serialized_size)).hexdigest()
    lasts: list[int] = []
    rows, unpacked = facts.num_rows, 0
    for number in range(facts.num_row_groups):
        rows -= facts.row_group(number).num_rows
        unpacked += facts.row_group(number).total_byte_size
        if unpacked >= input_split_bytes or number + 1 == facts.num_row_groups:
            lasts.append(number + 1)
            unpacked = 0
    if rows:
        raise DataError(f"{told}: damaged: its groups have {facts.num_rows - rows} rows, not {facts.num_rows}.")
    groups = tuple(
        Groups(first=first, last=last, start=size * number // len(lasts), stop=size * (number + 1) // len(lasts))
        for number, (first, last) in enumerate(pairwise([0, *lasts]))
    )
    return Footer(columns=columns, sha256=sha256, groups=groups)


def read_parquet(
    file: BinaryIO, name: str, told: str, data: Data, groups: range, columns: Sequence[str] | None = None
) -> Iterator[ColumnBatch]:
    """Column batches of some row groups, of all columns or those in `columns`. Raises DataError if damaged."""
    parquet = _open(file, told)
    facts = parquet.metadata
    names = None if columns is None else [one for one in parquet.schema_arrow.names if is_wanted(one, columns)]
    for group in groups:
        rows, size = facts.row_group(group).num_rows, facts.row_group(group).total_byte_size
        step = max(1, min(COLUMN_BATCH_ROWS, rows * COLUMN_BATCH_BYTES // max(size, 1)))
        try:
            for batch in parquet.iter_batches(step, row_groups=[group], columns=names, use_threads=False):
                rows -= batch.num_rows
                yield from cut_table(pa.table(batch), name, data)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{told}: damaged, not readable as Parquet: {error}. Fetch it again.") from None
        if rows:  # where the facts of a group are damaged, they can hide all its content
            raise DataError(f"{told}: damaged: group {group} of Parquet lacks {rows} rows. Fetch it again.")


def _open(file: BinaryIO, told: str) -> Any:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns may not be UTF-8
        raise DataError(f"{told}: not readable as Parquet: {error}.") from None


def cut_table(table: pa.Table, name: str, data: Data) -> Iterator[ColumnBatch]:
    """Cut an Arrow table into column batches of bounded size, without copying; a too large row becomes a fault."""
    if table.num_rows > COLUMN_BATCH_ROWS or (table.num_rows > 1 and table.nbytes > 2 * COLUMN_BATCH_BYTES):
        half = min(COLUMN_BATCH_ROWS, table.num_rows // 2) or 1
        yield from cut_table(table.slice(0, half), name, data)
        yield from cut_table(table.slice(half), name, data)
    elif table.num_rows:
        yield _stand(table, name, data)


def _stand(table: pa.Table, name: str, data: Data) -> ColumnBatch:
    columns = dict(zip(table.column_names, table.columns, strict=True))
    faults = {}
    if table.nbytes > data.max_record_bytes:
        sizes = [table.slice(row, 1).nbytes for row in range(table.num_rows)]
        large = [row for row, size in enumerate(sizes) if size > data.max_record_bytes]
        if large:
            faults = {row: FieldFault(reason=TOO_LARGE, raw="") for row in large}
            usable = pa.chunked_array([[row not in faults for row in range(table.num_rows)]])
            columns = {key: pc.if_else(usable, column, None) for key, column in columns.items()}
    return ColumnBatch(name=name, rows=table.num_rows, columns=columns, faults=faults)


def read_frame(frame: object, data: Data, name: str) -> ColumnBatch:
    """Read a pandas or Polars frame, an Arrow table (anything with `__arrow_c_stream__`), or lists.

    Lists are a mapping of column names to lists (arrays, Series), a list of mappings, a list of texts, or a pair
    (texts, labels).

    Raises:
        DataError: it is none of these, its lists differ in length, or it is empty.
    """
    columns: dict[str, Column]
    if isinstance(frame, Mapping):
        columns = {str(key): take_column(values) for key, values in frame.items()}
    elif isinstance(frame, (list, tuple)) and all(isinstance(row, Mapping) for row in frame):
        columns = transpose(frame)
    elif isinstance(frame, (list, tuple)) and all(isinstance(text, str) for text in frame):
        columns = {_name_text(data): list(frame)}
    elif isinstance(frame, tuple) and len(frame) == 2:
        columns = {_name_text(data): take_column(frame[0]), data.label: take_column(frame[1])}
    else:
        columns = take_columns(frame, name)
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}: columns of different lengths: {lengths}. Give all the same.")
    rows = max(lengths.values(), default=0)
    if not rows:
        raise DataError(f"{name}: there is no record in it. Give at least one row.")
    return ColumnBatch(name=name, rows=rows, columns=columns)


def _name_text(data: Data) -> str:
    """The column for texts that have no name."""
    if len(data.texts) > 1:
        named = ", ".join(map(repr, data.texts))
        raise DataError(f"data.text names several columns: {named}. Give a frame that has them, not a list of texts.")
    return data.texts[0] if data.texts else "text"
