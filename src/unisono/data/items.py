"""Map-style datasets of a Python user: items by number, loaded one by one and collated to microbatches.

Owns the seeding of each load, what an item may hold, and the collation. `feed.py` and `loaders.py` own which thread or
process loads, and when.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from unisono.data.columns import hash_tensors
from unisono.determinism import keys
from unisono.errors import DataError
from unisono.processes.forking import end_copy

HASHED_ITEMS = 64  # of a dataset; hashing all would load all

Collate = Callable[[list[Any]], Mapping[str, Tensor]]
"""A list of items, as the dataset gives them → a microbatch: names to tensors."""


class Items:
    """A map-style dataset: `dataset[i]` for i from 0 to len(dataset) − 1.

    Before each item the global generators of torch, NumPy and Python are seeded from (seed, epoch, sample), and from
    the repeat where a sampler gives a sample more than once an epoch. Items are loaded with one CPU thread. So random
    augmentation is the same in any process that loads it.

    collate: None: items are mappings, or (input, target) pairs under these two names, of numbers, arrays and tensors.
    They are stacked, and texts are left out (`left_out` names them).
    """

    padded = True
    prefetchable = False

    def __init__(self, dataset: Any, seed: int, collate: Collate | None = None) -> None:
        self._dataset = dataset
        self._seed = seed
        self._collate = collate
        self._hear: Callable[[int], None] = lambda sample: None
        size = len(dataset)
        if not size:
            raise DataError("the dataset has no samples. Give at least one.")
        self.left_out: dict[str, None] = {}
        self.lengths = np.ones(size, dtype=np.int32)
        some = np.unique(np.linspace(0, size - 1, min(size, HASHED_ITEMS)).astype(np.int64))
        self.sha256 = hash_tensors(self.take(some))

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, samples: np.ndarray, epoch: int = 0, repeats: np.ndarray | None = None) -> dict[str, Tensor]:
        """Load the items `samples` and collate them.

        Raises:
            DataError: an item, or what `collate` returns, cannot be used.
            Exception: whatever the dataset raises, with a note that names the sample.
        """
        again = [0] * len(samples) if repeats is None else repeats.tolist()
        with one_thread():
            items = [self._load(sample, epoch, repeat) for sample, repeat in zip(samples.tolist(), again, strict=True)]
            if self._collate is not None:
                return check_collated(self._collate(items))
            return stack([name_values(item, self.left_out) for item in items])

    def watch(self, hear: Callable[[int], None]) -> None:
        """Set `hear` as the function that is called with each sample's number before it is loaded."""
        self._hear = hear

    def _load(self, sample: int, epoch: int, repeat: int) -> Any:
        self._hear(sample)
        keys.seed_all(keys.key(self._seed, "sample", epoch, sample, *([repeat] if repeat else [])))
        process = os.getpid()
        try:
            item = self._dataset[sample]
        except Exception as error:
            error.add_note(f"The dataset raised this when it was asked for sample {sample} in epoch {epoch}.")
            raise
        end_copy(process)
        return item


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this context, torch computes with one CPU thread: a sum by several threads may have other bits."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def name_values(item: Any, left_out: dict[str, None]) -> dict[str, Any]:
    """The values of an item by name, those that can be stacked; the names of texts are added to `left_out`.

    Raises:
        DataError: it is neither a mapping nor a pair, or holds what is no number; the message names it.
    """
    if isinstance(item, Mapping):
        named = dict(item)
    elif isinstance(item, tuple | list) and len(item) == 2:
        named = {"input": item[0], "target": item[1]}
    else:
        raise DataError(
            f"a dataset's item is {_describe(item)}; allowed is a mapping of names to values, or an (input, target) "
            "pair. Return one of these from the dataset, or give train(…, collate=…), which gets the items as they "
            "are."
        )
    kept = {}
    for name, value in named.items():
        if isinstance(value, str | bytes):
            left_out[str(name)] = None
        else:
            kept[name] = _as_value(name, value)
    if not kept:
        raise DataError(
            f"a dataset's item has nothing but texts ({', '.join(map(repr, named)) or 'it is empty'}); a model needs "
            "numbers. Encode the texts in the dataset, or give train(…, collate=…), which gets the items as they are."
        )
    return kept


def _as_value(name: str, value: Any) -> Any:
    """What torch's collation stacks. Lists of numbers become tensors (it would transpose them), the rest stays."""
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "biufc":
            return value
        told = f"values of NumPy's {value.dtype}"
    elif isinstance(value, Tensor):
        if value.layout == torch.strided:
            return value
        told = f"a tensor in the layout {value.layout}"
    elif isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    elif isinstance(value, list | tuple):
        try:
            return _as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            told = f"a {type(value).__name__} that is no array of numbers"
    else:
        told = f"a value of {_describe(value)}"
    raise DataError(
        f"a dataset's item has under {name!r} {told}; allowed are numbers, lists of numbers, NumPy arrays and tensors. "
        "Make one of these in the dataset, leave it out, or give train(…, collate=…), which gets the items as they are."
    )


def _as_tensor(values: Sequence[Any]) -> Tensor:
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack(list(values))
    if any(isinstance(value, np.ndarray) for value in values):
        return torch.from_numpy(np.stack(values))
    return torch.tensor(values)


def stack(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack the values under each name, as torch does by default.

    Raises:
        DataError: the items have other names, or values of other shapes than the first.
    """
    names = items[0].keys()
    for item in items:
        if item.keys() != names:
            raise DataError(
                f"a dataset's items have different names: {', '.join(map(repr, names))} and "
                f"{', '.join(map(repr, item))}. Give each item the same, or give train(…, collate=…)."
            )
    for name in names:
        shapes = {tuple(np.shape(item[name])) for item in items}
        if len(shapes) > 1:
            told = " and ".join(map(str, sorted(shapes)[:2]))
            raise DataError(
                f"a dataset's items have values of different shapes under {name!r}: {told}. They cannot be stacked. "
                "Give train(…, collate=…), a function that pads a list of items to one mapping of tensors, or give "
                "all one shape in the dataset."
            )
    return dict(default_collate([dict(item) for item in items]))


def check_collated(found: Any) -> dict[str, Tensor]:
    """Return what a user's collation returned, if it is a mapping of names to tensors.

    Raises:
        DataError: it is none.
    """
    if not isinstance(found, Mapping) or not found:
        raise DataError(f"collate returned {_describe(found)}; allowed is a mapping of names to tensors, not empty.")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(
                f"collate returned {_describe(value)} under {name!r}; allowed are tensors under names. Make a tensor "
                "of it, or leave it out."
            )
        if value.device.type != "cpu":
            raise DataError(
                f"collate returned a tensor on {value.device} under {name!r}; allowed are tensors in host memory. "
                "Leave the move to the device to unisono."
            )
    return dict(found)


def _describe(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
