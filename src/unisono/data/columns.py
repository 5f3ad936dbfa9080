"""Samples that a Python user already has in memory: columns and frames.

Owns their reading as a `Source`. Columns are not copied: they share the user's memory, unisono never writes into it,
and a microbatch's rows are copied into memory of their own. If the user's code writes into it during the run, the hash
shows it (`Columns.changed`). `items.py` owns datasets of items, `prepare.py` text in files.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from unisono.data.ingest.frames import is_frame, take_column, take_columns
from unisono.data.ingest.numbers import as_array, list_categories
from unisono.errors import DataError


class Columns:
    """Named columns of equal length; each gives a tensor, samples first, which shares its memory where it can."""

    padded = True
    prefetchable = True

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = {name: _as_tensor(name, column).contiguous() for name, column in columns.items()}
        sizes = {name: len(column) for name, column in self._columns.items()}
        if not sizes:
            raise DataError("the data has no columns. Give at least one.")
        if len(set(sizes.values())) != 1:
            raise DataError(f"columns of different lengths: {sizes}. Give one value per sample in each.")
        if not (size := next(iter(sizes.values()))):
            raise DataError("the data has no samples. Give at least one.")
        self.lengths = np.ones(size, dtype=np.int32)
        self.sha256 = hash_tensors(self._columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, samples: np.ndarray, epoch: int = 0, repeats: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return the columns' rows `samples`, in new memory."""
        rows = torch.from_numpy(samples)
        return {name: column[rows] for name, column in self._columns.items()}

    def not_finite(self) -> dict[str, np.ndarray]:
        """Name → the samples in which a column of floats holds NaN or infinity, int64, where there are some."""
        found = {}
        for name, column in self._columns.items():
            samples = (~column.isfinite()).reshape(len(self), -1).any(1).nonzero()[:, 0].numpy()
            if len(samples):
                found[name] = samples
        return found

    def changed(self) -> bool:
        """Whether the columns' values have changed since they were opened."""
        return hash_tensors(self._columns) != self.sha256


def hold(given: Mapping[str, Any]) -> dict[str, Any]:
    """Make tensors of the columns of each split's frame or mapping, once for all workers; leave other data as it is.

    Call it before workers are forked: columns that need a copy are copied once, and Polars' threads still exist.

    Raises:
        DataError: a column cannot be used, or two splits have different categories in one column.
    """
    held: dict[str, Any] = {}
    categories: dict[str, tuple[str, tuple[object, ...]]] = {}
    for split, data in given.items():
        if not is_frame(data) and not isinstance(data, Mapping):
            held[split] = data
            continue
        columns = list_columns(data, split)
        for name, column in columns.items():
            found = list_categories(column) if isinstance(column, pa.ChunkedArray) else ()
            first, expected = categories.setdefault(name, (split, found))
            if found != expected:
                raise DataError(
                    f"column {name!r} has other categories in {split} than in {first}: {_show(found)}, not "
                    f"{_show(expected)}. Their codes would not mean the same. Give all frames the same, in the same "
                    "order (pandas: astype(train[name].dtype); Polars: cast(pl.Enum([...])))."
                )
        try:
            held[split] = {name: _as_tensor(name, column) for name, column in columns.items()}
        except DataError as error:
            raise DataError(f"{split}: {error}") from None
    return held


def _show(categories: tuple[object, ...]) -> str:
    told = ", ".join(map(repr, categories[:5]))
    return f"[{told}{', …' if len(categories) > 5 else ''}]" if categories else "none"


def list_columns(data: Any, name: str) -> dict[str, Any]:
    """The columns of a frame or a mapping; as Arrow columns where Arrow can read them."""
    if is_frame(data):
        return dict(take_columns(data, name))
    seen = ("__arrow_c_stream__", "__arrow_c_array__", "iloc")  # iloc: a Series of an older pandas
    return {
        key: take_column(column) if any(hasattr(column, sign) for sign in seen) else column
        for key, column in data.items()
    }


def _as_tensor(name: str, column: Any) -> Tensor:
    if isinstance(column, Tensor):
        return column.detach()
    array = as_array(name, column) if isinstance(column, pa.ChunkedArray) else _as_numbers(name, column)
    array = np.require(array, array.dtype.newbyteorder("="), ["C", "A"])  # itself, where it is so already
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # never written
        return torch.from_numpy(array)


def _as_numbers(name: str, column: Any) -> np.ndarray:
    """An array of NumPy or plain Python values; for values that are no numbers, Arrow gives the better message."""
    if not any(isinstance(value, str) for value in column[:1]):  # NumPy would pad all strings to the longest
        with suppress(ValueError):  # ragged
            array = np.asarray(column)
            if array.dtype.kind in "biuf":
                return array
    try:
        return as_array(name, pa.chunked_array([pa.array(column, from_pandas=True)]))
    except (TypeError, ValueError, pa.ArrowException):
        kinds = ", ".join(sorted({type(value).__name__ for value in column}))
        raise DataError(
            f"column {name!r} has {kinds} values; allowed are numbers, or lists of them, of one length. Make numbers "
            "of them first, or leave the column out."
        ) from None


def hash_tensors(columns: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: their names, dtypes, shapes and bytes, in the order of the names."""
    result = hashlib.sha256()
    for name in sorted(columns):
        column = columns[name].contiguous()
        result.update(f"{name} {column.dtype} {tuple(column.shape)}\n".encode())
        result.update(column.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
