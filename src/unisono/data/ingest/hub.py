"""Datasets of the `datasets` library: from the Hugging Face hub, from its cache, or saved to a folder.

Owns what `hf://` means and how such a dataset is cut by rows. `datasets` is an extra, imported here only.

`hf://owner/name[/config][@revision][:split]` is a dataset of the hub; `hf:///path[:split]` a folder that
`save_to_disk` wrote, or whose files `load_dataset` reads. A class label is given by its name, not its number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from unisono.config.sections import Data
from unisono.data.ingest.column_batch import COLUMN_BATCH_ROWS, ColumnBatch, is_wanted
from unisono.data.ingest.parquet import cut_table
from unisono.errors import DataError

HUB = re.compile(r"hf://(?P<name>[^/:@]+(/[^/:@]+)?)(/(?P<config>[^/:@]+))?(@(?P<revision>[^:]+))?(:(?P<split>[^:]+))?")
SAVED = ("dataset_info.json", "dataset_dict.json")
OPENED: dict[str, Any] = {}
"""Datasets that this process has opened; processes that it forks inherit them."""
FORMS = "hf://owner/name[/config][@revision][:split] or hf:///path[:split]"


def is_dataset(location: str) -> bool:
    """Whether a location is one of `datasets`: hf:// (not hf://datasets/…, which are files), or a saved folder."""
    if location.startswith("hf://"):
        return not location.startswith(("hf://datasets/", "hf://buckets/", "hf://spaces/"))
    return any((Path(location) / name).is_file() for name in SAVED)


def measure_dataset(location: str) -> tuple[int, int, str, tuple[str, ...]]:
    """Return a dataset's rows, its bytes, its fingerprint and its columns.

    Raises:
        DataError: there is no such dataset or split, or `datasets` is not installed.
    """
    dataset = OPENED[location] = _load(location)
    return dataset.num_rows, dataset.data.nbytes, dataset._fingerprint, tuple(dataset.column_names)


def read_dataset(
    location: str, name: str, rows: range, fingerprint: str, data: Data, columns: Sequence[str] | None = None
) -> Iterator[ColumnBatch]:
    """Column batches of a range of rows: all columns, or those of `columns` that exist.

    Raises:
        DataError: the dataset no longer exists, or its fingerprint is another one.
    """
    if location not in OPENED:
        OPENED[location] = _load(location)
    dataset = OPENED[location]
    if dataset._fingerprint != fingerprint:
        raise DataError(f"{location!r}: changed while it was read. Start again when it is complete.")
    if columns is not None:
        dataset = dataset.select_columns([column for column in dataset.column_names if is_wanted(column, columns)])
    tables = dataset.with_format("arrow")
    for start in range(rows.start, rows.stop, COLUMN_BATCH_ROWS):
        table = tables[start : min(start + COLUMN_BATCH_ROWS, rows.stop)]
        yield from cut_table(_name_classes(table, dataset.features), name, data)


def _load(location: str) -> Any:
    """Open a dataset, memory-mapped."""
    try:
        import datasets
    except ModuleNotFoundError:
        message = f"{location!r}: a dataset of Hugging Face. Install what reads it: pip install 'unisono[datasets]'."
        raise DataError(message) from None
    name, split, options = _parse(location)
    try:
        if any((Path(name) / one).is_file() for one in SAVED):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, **options)
    except Exception as error:  # noqa: BLE001 - of hub, network, builder and pandas: each has errors of its own
        kind = type(error).__name__
        raise DataError(f"{location!r}: cannot be loaded: {kind}: {error}. Allowed are {FORMS}.") from None
    if isinstance(found, dict):
        there = list(found)
        if not split and len(there) > 1:
            raise DataError(f"{location!r} has splits {', '.join(there)}. Name one: {_with_split(location, there[0])}.")
        if split and split not in found:
            raise DataError(f"{location!r}: no split {split!r}. There are: {', '.join(there)}.")
        found = found[split or there[0]]
    elif split and split != str(found.split):
        raise DataError(f"{location!r}: it holds one split, {str(found.split)!r}. Leave out ':{split}'.")
    return found


def _with_split(location: str, split: str) -> str:
    return f"{location}:{split}" if location.startswith("hf://") else f"hf://{location}:{split}"


def _parse(location: str) -> tuple[str, str, dict[str, str]]:
    """Return the name or path of a dataset, its split ('' if none is named), and options of load_dataset."""
    if not location.startswith("hf://"):
        return location, "", {}
    if location.startswith("hf:///"):
        path, _, split = location.removeprefix("hf://").partition(":")
        if not Path(path).is_dir():
            raise DataError(f"{location!r}: there is no folder {path!r}. Allowed are {FORMS}.")
        return path, split, {}
    match = HUB.fullmatch(location)
    if match is None:
        raise DataError(f"{location!r} names no dataset. Allowed are {FORMS}.")
    given = match.groupdict()
    options = {key: given[part] for key, part in (("name", "config"), ("revision", "revision")) if given[part]}
    return given["name"], given["split"] or "", options


def _name_classes(table: pa.Table, features: Any) -> pa.Table:
    """Columns of class numbers as class names; -1, by which `datasets` means none, as null."""
    for number, name in enumerate(table.column_names):
        words = getattr(features[name], "names", None)
        if words is not None:
            values = [words[value] if value is not None and value >= 0 else None for value in table[name].to_pylist()]
            table = table.set_column(number, name, pa.chunked_array([pa.array(values, pa.string())]))
    return table
