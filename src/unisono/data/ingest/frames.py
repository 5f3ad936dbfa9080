"""Frames of other libraries: taken apart into columns, and given back with columns added.

Owns what a frame is: pandas, Polars, Arrow, or anything else that hands out its columns by Arrow's PyCapsule interface
(`__arrow_c_stream__`). Neither pandas nor Polars is imported: a caller that gives one of their frames has done so.
Memory is shared with the frame, except what Arrow cannot read without copying; docs/frames.md lists it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import pyarrow as pa

from unisono.data.ingest.column_batch import Column, check_names
from unisono.errors import DataError

Frame = TypeVar("Frame")

ALLOWED = "a pandas or Polars frame, an Arrow table, a dict of lists, a list of dicts, or a pair"


def is_frame(value: object) -> bool:
    """Whether it is a table of named columns. A single column (a Series, an Arrow array) is none."""
    if isinstance(value, (pa.Table, pa.RecordBatch, pa.RecordBatchReader, _find("polars", "LazyFrame"))):
        return True
    return hasattr(value, "__arrow_c_stream__") and any(hasattr(value, name) for name in ("columns", "schema"))


def settle(frame: Any) -> Any:
    """Return a frame that can be read many times: a LazyFrame is collected, a stream is read to its end.

    Call it before workers are forked: Polars' threads do not exist in a child. A value that is no frame is returned
    unchanged.

    Raises:
        DataError: it cannot be collected or read.
    """
    if isinstance(frame, _find("polars", "LazyFrame")):
        try:
            return frame.collect()
        except (sys.modules["polars"].exceptions.PolarsError, OSError) as error:
            told = f"the LazyFrame cannot be collected: {type(error).__name__}: {error}"
            raise DataError(f"{told}. Collect it yourself, and give what comes out.") from error
    known = (pa.Table, pa.RecordBatch, _find("pandas", "DataFrame"), _find("polars", "DataFrame"))
    if isinstance(frame, known) or not is_frame(frame):
        return frame
    return _as_table(frame, "frame")


def take_columns(frame: Any, name: str) -> dict[str, Column]:
    """Return a frame's columns by name. Arrow's buffers, and NumPy's under pandas, are shared.

    A column of Python objects (pandas' dtype object) is a list of them, with None for what pandas calls missing.

    Raises:
        DataError: it is no frame, or two columns have one name.
    """
    frame = settle(frame)
    if isinstance(frame, _find("pandas", "DataFrame")):
        names = [str(column) for column in frame.columns]
        check_names(name, names)
        return {column: _take_series(frame.iloc[:, place]) for place, column in enumerate(names)}
    table = _as_table(frame, name)
    check_names(name, table.column_names)
    return dict(zip(table.column_names, table.columns, strict=True))


def take_column(values: Any) -> Column:
    """Return a single column: an Arrow array, a Series, a NumPy array or tensor, or anything that can be iterated."""
    if isinstance(values, (list, pa.ChunkedArray)):
        return values
    if isinstance(values, _find("pandas", "Series")):
        return _take_series(values)
    if hasattr(values, "__arrow_c_stream__"):
        return pa.chunked_array(values)
    if hasattr(values, "__arrow_c_array__"):
        return pa.chunked_array([pa.array(values)])
    return values.tolist() if hasattr(values, "tolist") else list(values)  # NumPy's and torch's numbers become Python's


def add_columns(frame: Frame, new: Mapping[str, pa.Array]) -> Frame:
    """Return a frame of the same kind with columns added; a column of the same name is replaced.

    The frame itself stays as it was, and its columns are shared (by pandas as its copy-on-write does). A frame of a
    library that is not known is returned as an Arrow table.
    """
    held: Any = settle(frame)
    if isinstance(held, _find("pandas", "DataFrame")):
        held = held.copy(deep=False)
        for name, column in new.items():
            held[name] = column.to_pandas().array  # without an index: the frame's own stays
        return held
    if isinstance(held, _find("polars", "DataFrame")):
        series = _find("polars", "Series")
        return held.with_columns([series(name, column) for name, column in new.items()])
    for name, column in new.items():
        names = held.schema.names
        held = held.set_column(names.index(name), name, column) if name in names else held.append_column(name, column)
    return held


def _find(module: str, name: str) -> Any:
    """A class of a library that is already imported; else (), of which nothing is an instance."""
    return getattr(sys.modules.get(module), name, ())


def _as_table(frame: Any, name: str) -> pa.Table:
    if isinstance(frame, pa.Table):
        return frame
    try:
        return frame.read_all() if isinstance(frame, pa.RecordBatchReader) else pa.table(frame)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{name}: {type(frame).__name__} is no table: {error}. Give {ALLOWED}.") from None


def _take_series(series: Any) -> Column:
    """A pandas Series as a column."""
    if series.dtype != object and getattr(series.dtype, "storage", "") != "python":
        try:
            column = pa.array(series, from_pandas=True)
            return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
        except (TypeError, ValueError, pa.ArrowException):
            pass  # no type of Arrow's, such as sparse or complex: as Python objects
    values = series.to_numpy(dtype=object)
    return [None if gone else value for value, gone in zip(values, series.isna().to_numpy(), strict=True)]
