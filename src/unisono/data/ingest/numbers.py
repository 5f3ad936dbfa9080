"""Columns of numbers, as arrays that share their memory.

Owns which Arrow types are numbers, the messages about those that are not, and when a copy cannot be avoided: bits
become bytes, chunks are joined, categories become int64 codes.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unisono.errors import DataError

MEND = "Fill or drop them first (pandas: fillna, dropna; Polars: fill_null, drop_nulls)"


def as_array(name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Return an Arrow column as an array, samples first, read-only where it shares memory.

    Lists of equal length, and fixed-shape tensors, give an array of more dimensions; categories (dictionaries) give
    their codes, int64: places in the column's own list of categories.

    Raises:
        DataError: the column `name` has missing values, values that are no numbers, or lists of different lengths.
    """
    if missing := column.null_count:
        first = pc.index(column.is_valid(), False).as_py()
        raise DataError(
            f"column {name!r}: {missing:,} of {len(column):,} values are missing, first in row {first}. {MEND}."
        )
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    arrays = [_view(name, chunk) for chunk in column.chunks if len(chunk)]
    if len(widths := {array.shape[1:] for array in arrays}) > 1:
        raise DataError(_tell_ragged(name, min(widths)[0], max(widths)[0]))
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate(arrays) if arrays else np.empty(0)


def list_categories(column: pa.ChunkedArray) -> tuple[object, ...]:
    """The categories of a dictionary column, in the order of their codes; () of any other column."""
    if not pa.types.is_dictionary(column.type) or not column.num_chunks:
        return ()
    return tuple(column.unify_dictionaries().chunk(0).dictionary.to_pylist())


def _view(name: str, chunk: pa.Array) -> np.ndarray:
    kind = chunk.type
    if chunk.null_count:  # within lists
        raise DataError(f"column {name!r}: missing values within its lists: {chunk.null_count:,}. {MEND}.")
    if pa.types.is_dictionary(kind):
        return chunk.indices.to_numpy().astype(np.int64)
    if isinstance(kind, pa.FixedShapeTensorType):
        return chunk.to_numpy_ndarray()
    if _is_list(kind):
        inner = _view(name, chunk.flatten())
        return inner.reshape(len(chunk), _find_width(name, chunk), *inner.shape[1:])
    if pa.types.is_boolean(kind):
        return chunk.to_numpy(zero_copy_only=False)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return chunk.to_numpy()
    raise DataError(
        f"column {name!r} has {kind} values; allowed are numbers. {_advise(kind)}, or leave the column out."
    )


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)


def _find_width(name: str, chunk: pa.Array) -> int:
    """How long each list is. Raises DataError if they differ."""
    if pa.types.is_fixed_size_list(chunk.type):
        return chunk.type.list_size
    found = pc.min_max(pc.list_value_length(chunk)).as_py()
    if found["min"] != found["max"]:
        raise DataError(_tell_ragged(name, found["min"], found["max"]))
    return found["min"]


def _tell_ragged(name: str, least: int, most: int) -> str:
    return (
        f"column {name!r}: its lists have {least} to {most} values; allowed is one length for all. Pad them to the "
        "longest, or cut them to the shortest."
    )


def _advise(kind: pa.DataType) -> str:
    """A sentence on what a user can do about values that are no numbers."""
    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return (
            "Where they name one of a few classes, make categories of them (pandas: astype('category'); Polars: "
            "cast(pl.Enum([...]))); where they are texts, train a recipe, or encode them first"
        )
    if types.is_temporal(kind):
        return "Make numbers of them first, such as days since some day, or the hour"
    if types.is_decimal(kind):
        return "Cast them to float64"
    if types.is_struct(kind):
        return "Unnest them into columns"
    return "Make numbers of them first"
