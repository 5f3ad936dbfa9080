"""What a Python user may give as data of an own task, and the `Source` that is made from it.

Owns the choice and its messages. The sources themselves are in `columns.py`, `items.py` and `streams.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unisono.data.columns import Columns, list_columns
from unisono.data.ingest.frames import is_frame
from unisono.data.items import Collate, Items
from unisono.data.source import Source
from unisono.errors import DataError

SOURCE = ("take", "lengths", "padded", "prefetchable")
ALLOWED = (
    "a mapping of columns, a pandas or Polars frame, an Arrow table, a map-style dataset (with __getitem__ and "
    "__len__), a stream (with __iter__) to train on, or a unisono dataset's split"
)


def is_stream(data: Any) -> bool:
    """Whether it can be read from its beginning only: it has `__iter__`, and no item has a number."""
    if isinstance(data, DataLoader):
        return data.batch_size is None and isinstance(data.dataset, IterableDataset)
    by_number = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)
    known = isinstance(data, Mapping) or is_frame(data) or all(hasattr(data, name) for name in SOURCE)
    return hasattr(data, "__iter__") and not by_number and not known


def open_source(data: Any, seed: int = 0, collate: Collate | None = None) -> Source:
    """Make a Source of what a user gave.

    Allowed: a Source; a mapping of columns (tensors, arrays, Series, lists of numbers); a frame (pandas, Polars, Arrow)
    with columns of numbers, categories, or lists of numbers; a map-style dataset, whose items `collate` puts together.

    Raises:
        DataError: it is none of these, empty, or ragged.
    """
    if isinstance(data, Mapping) or is_frame(data):
        return Columns(list_columns(data, "frame"))
    if all(hasattr(data, name) for name in SOURCE):
        return data  # type: ignore[no-any-return]
    if collate is None and (told := _explain(data)):
        raise DataError(told)
    if isinstance(data, DataLoader):
        raise DataError(
            "data is a torch DataLoader, which decides itself what a batch holds; allowed are datasets, which unisono "
            "cuts into microbatches. Give its parts: train(task, loader.dataset, collate=loader.collate_fn, "
            "samples_per_step=loader.batch_size, loader_workers=loader.num_workers); for a weighted sampler, "
            "sampler=unisono.weighted(weights)."
        )
    if is_stream(data):
        raise DataError(
            f"{type(data).__name__} is a stream, and its length is unknown; it can be trained on, but "
            "evaluation visits every sample once. Give columns, a frame, or a dataset with __getitem__ and __len__."
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
        return Items(data, seed, collate)
    raise DataError(f"{type(data).__name__} is no data that can be read; allowed are {ALLOWED}.")


def _explain(data: Any) -> str:
    """What to give instead of a value that has items, and yet is no dataset; "" for others."""
    kind = type(data).__name__
    if isinstance(data, str | bytes | PathLike):
        return (
            f"data is {data!r}, a text; a task of your own gets data in memory. Read the file (pandas.read_csv) and "
            "give the frame; or name it in a recipe, as data.train, with the task as task.kind (--task)."
        )
    if isinstance(data, Tensor | np.ndarray):
        return (
            f"data is one {kind} of shape {tuple(data.shape)}; allowed are columns by name, such as {{'input': data}}."
        )
    if isinstance(data, tuple) and data and all(isinstance(one, Tensor | np.ndarray) for one in data):
        return (
            f"data is a {kind} of {len(data)} arrays; allowed are columns by name, such as "
            '{"input": data[0], "target": data[1]}.'
        )
    return ""
