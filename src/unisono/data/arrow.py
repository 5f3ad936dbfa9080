"""Arrow arrays of NumPy arrays and strings, and back, without pandas.

`pyarrow.array` and `Array.to_numpy` import pandas wherever it is installed, to check whether the value is a Series.
That takes half a second in every process, more than many stages take themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

_TYPES: dict[np.dtype, pa.DataType] = {
    np.dtype(np.int32): pa.int32(),
    np.dtype(np.int64): pa.int64(),
    np.dtype(np.uint64): pa.uint64(),
}
_DTYPES: dict[pa.DataType, np.dtype] = {kind: dtype for dtype, kind in _TYPES.items()}


def as_array(numbers: np.ndarray) -> pa.Array:
    """Return numbers [n] (int32, int64 or uint64) as an array, which shares their memory if they lie together."""
    numbers = np.ascontiguousarray(numbers)
    return pa.Array.from_buffers(_TYPES[numbers.dtype], len(numbers), [None, pa.py_buffer(numbers)])


def as_strings(strings: Sequence[str | None]) -> pa.Array:
    """Return strings as an array."""
    builder = pa.lib.StringBuilder()
    builder.append_values(strings)
    return builder.finish()


def as_numbers(array: pa.Array) -> np.ndarray:
    """Return an array of integers in its own memory; the value in the place of a null has no meaning."""
    dtype = _DTYPES[array.type]
    content = array.buffers()[1]
    if content is None:
        return np.empty(0, dtype)
    return np.frombuffer(content, dtype, len(array), array.offset * dtype.itemsize)


def find_nulls(array: pa.Array) -> np.ndarray:
    """Return which entries are null: bool [n]."""
    content = array.buffers()[0]
    if not array.null_count or content is None:
        return np.zeros(len(array), bool)
    bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
    return bits[array.offset : array.offset + len(array)] == 0
