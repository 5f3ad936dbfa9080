"""Samples that a Python user already has: columns in memory, frames, or any torch dataset.

Owns their reading as a `Source`. Text in files is the matter of `data/prepare.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from unisono import keys
from unisono.data.source import Source
from unisono.errors import DataError

HASHED_ITEMS = 64  # of a torch dataset; hashing all would load all


class Columns:
    """Named columns of equal length; a column of tensors or arrays gives a tensor, samples first."""

    padded = True
    prefetchable = True

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self._columns = {name: _as_tensor(name, column) for name, column in columns.items()}
        sizes = {name: len(column) for name, column in self._columns.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"columns of different lengths: {sizes}. Give one value per sample in each.")
        if not (size := next(iter(sizes.values()))):
            raise DataError("the data has no samples. Give at least one.")
        self.lengths = np.ones(size, dtype=np.int32)
        self.sha256 = _hash(self._columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, samples: np.ndarray, epoch: int = 0) -> dict[str, Tensor]:
        """Return the columns' rows `samples`."""
        rows = torch.from_numpy(samples)
        return {name: column[rows] for name, column in self._columns.items()}


class Items:
    """A map-style torch dataset, whose items are mappings, or (input, target) pairs under these two names.

    Before each item the global generators are seeded from (seed, epoch, sample), so random augmentation is the same
    whoever loads it.
    """

    padded = True
    prefetchable = False

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        size = len(dataset)  # type: ignore[arg-type]
        if not size:
            raise DataError("the dataset has no samples. Give at least one.")
        self.lengths = np.ones(size, dtype=np.int32)
        some = np.unique(np.linspace(0, size - 1, min(size, HASHED_ITEMS)).astype(np.int64))
        self.sha256 = _hash(self.take(some))

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, samples: np.ndarray, epoch: int = 0) -> dict[str, Tensor]:
        """Load the items `samples` and collate them as torch does by default."""
        items = []
        for sample in samples.tolist():
            keys.seed_all(keys.key(self._seed, "sample", epoch, sample))
            items.append(_named(self._dataset[sample]))
        return default_collate(items)


def open_source(data: Any, seed: int = 0) -> Source:
    """Make a Source of what a user gave.

    Allowed: a Source; a mapping of columns (tensors, arrays, lists of numbers); a pandas or Polars frame or an Arrow
    table with number columns; a map-style torch dataset.

    Raises:
        DataError: it is none of these, empty, or ragged.
    """
    if isinstance(data, Mapping):
        return Columns(data)
    if hasattr(data, "take") and hasattr(data, "lengths") and hasattr(data, "prefetchable"):
        return data
    if hasattr(data, "__arrow_c_stream__"):
        import pyarrow

        table = pyarrow.table(data)
        return Columns({name: table.column(name).to_numpy() for name in table.column_names})
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return Items(data, seed)
    raise DataError(
        f"{type(data).__name__} is no data that can be read; allowed are a mapping of columns, a pandas or Polars "
        "frame, an Arrow table, "
        "a map-style torch dataset, or a unisono dataset's split."
    )


def _as_tensor(name: str, column: Any) -> Tensor:
    if isinstance(column, Tensor):
        return column.detach().contiguous()
    array = np.asarray(column)
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"column {name!r} has {array.dtype} values; allowed are numbers. Encode it first, or leave it out."
        )
    return torch.from_numpy(np.ascontiguousarray(array).copy())


def _named(item: Any) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    if isinstance(item, tuple | list) and len(item) == 2:
        return {"input": item[0], "target": item[1]}
    raise DataError(
        f"a dataset's item is {type(item).__name__}; allowed is a mapping of names to values, or an (input, "
        "target) pair."
    )


def _hash(columns: Mapping[str, Tensor]) -> str:
    result = hashlib.sha256()
    for name in sorted(columns):
        column = columns[name].contiguous()
        result.update(f"{name} {column.dtype} {tuple(column.shape)}\n".encode())
        result.update(column.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
