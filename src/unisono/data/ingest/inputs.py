"""What a dataset is made from: which parts each split's input has, and the hash of it all.

Owns how inputs are found, and the dataset's key. Reads files only to hash them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unisono.config.recipe import Recipe
from unisono.config.sections import Data
from unisono.data import store
from unisono.data.encoding import encode
from unisono.data.ingest.column_batch import (
    COLUMN_BATCH_BYTES,
    COLUMN_BATCH_ROWS,
    ColumnBatch,
    cut_by_size,
    cut_column_batch,
)
from unisono.data.ingest.hub import is_dataset
from unisono.data.ingest.input_splits import (
    INPUT_SPLIT_BYTES,
    InputSplit,
    find_input_splits,
    hash_input_split,
    list_files,
)
from unisono.data.ingest.locations import hide_secrets
from unisono.data.ingest.parquet import read_frame
from unisono.data.ingest.read import Record, take_records
from unisono.data.screening import rules, screen
from unisono.data.share import Share
from unisono.errors import DataError, RecipeError
from unisono.storage import known_hashes
from unisono.storage.files import facts_sha256

SEEN = (
    "text",
    "label",
    "header_lines",
    "columns",
    "labels",
    "validation_fraction",
    "test_fraction",
    "max_record_bytes",
    "max_depth",
    "delimiter",
    "quote",
    "escape",
    "comment",
    "encoding",
    "max_lines",
)
"""Keys of [data] that decide a dataset, besides the bytes of its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """The input of one split. parts: each is read by one task. sha256: of the content."""

    name: str
    kind: str
    parts: tuple[InputSplit | ColumnBatch, ...]
    sha256: str
    notes: tuple[str, ...] = ()
    """What a user should know about how it is read."""


def find_inputs(data: Data, frames: Mapping[str, object], share: Share) -> dict[str, Input]:
    """Return what each split is read from, with the hash of its content.

    Raises:
        DataError: there is none for train, or one cannot be read. RecipeError: a split is given twice.
    """
    unknown = set(frames) - set(screen.SPLITS)
    if unknown:
        allowed = ", ".join(screen.SPLITS)
        raise DataError(f"frames for {', '.join(map(repr, sorted(unknown)))}: allowed are {allowed}.")
    given = [split for split in screen.SPLITS if split in frames or getattr(data, split)]
    if "train" not in given:
        raise DataError("data.train is empty. Set it to a file, or to a folder with one folder per class.")
    for split in ("validation", "test"):
        fraction = getattr(data, f"{split}_fraction")
        if split in given and fraction:
            raise RecipeError(
                f"data.{split} is given, and data.{split}_fraction = {fraction} as well. Set one of them."
            )
    if data.validation_fraction + data.test_fraction >= 1:
        total = data.validation_fraction + data.test_fraction
        raise RecipeError(f"data.validation_fraction + data.test_fraction = {total}. Allowed is a sum below 1.")
    return {split: _find_input(split, data, frames, share) for split in given}


def make_key(recipe: Recipe, inputs: Mapping[str, Input]) -> dict[str, object]:
    """Everything that decides the bytes of the dataset."""
    import tokenizers

    return {
        "inputs": {
            split: {"name": one.name, "format": one.kind, "sha256": one.sha256} for split, one in inputs.items()
        },
        "data": recipe.data.model_dump(mode="json", include=set(SEEN)),
        "screen": recipe.screen.model_dump(
            mode="json", exclude={"phone_region"} if recipe.screen.phone == "keep" else set()
        ),
        "encode": encode.find_settings(recipe),
        "versions": {
            "format": store.FORMAT,
            "screening": screen.VERSION,
            "encoding": encode.VERSION,
            "cuts": [INPUT_SPLIT_BYTES, COLUMN_BATCH_BYTES, COLUMN_BATCH_ROWS],
            "tokenizers": tokenizers.__version__,
            **rules.find_versions(recipe.screen),
        },
    }


def _hash_records(records: Iterable[Record]) -> str:
    """`facts_sha256` of a list with one entry per record, computed without holding the list."""
    result = hashlib.sha256(b"[")
    for number, record in enumerate(records):
        facts = json.dumps([record.text, record.label, record.fault])
        result.update(f"{', ' if number else ''}{facts}".encode())
    result.update(b"]")
    return result.hexdigest()


def _find_input(split: str, data: Data, frames: Mapping[str, object], share: Share) -> Input:
    parts: list[InputSplit] | list[ColumnBatch]
    if split in frames:
        name = f"{split} frame"
        blocks = [
            tuple(cut_by_size(block, data.texts)) for block in cut_column_batch(read_frame(frames[split], data, name))
        ]

        def hash_block(number: int) -> str:
            return _hash_records(
                record for column_batch in blocks[number] for record in take_records(column_batch, data)
            )

        hashes = list(share.map(hash_block, range(len(blocks))))
        parts = [column_batch for block in blocks for column_batch in block]
        return Input(name=name, kind="frame", parts=tuple(parts), sha256=facts_sha256(hashes))
    location = getattr(data, split)
    parts = find_input_splits(location, data)
    kind = "+".join(sorted({input_split.kind for input_split in parts}))
    if not parts:
        raise DataError(f"{hide_secrets(location)!r}: there is no record in it. Give a file with at least one.")
    sources: list[list[object]] = [
        [input_split.source, digest] for input_split, digest in zip(parts, _hash_parts(parts, share), strict=True)
    ]
    name = location if is_dataset(location) else Path(hide_secrets(location)).name
    notes = tuple(note for input_split in parts for note in input_split.notes)
    return Input(name=name, kind=kind, parts=tuple(parts), sha256=facts_sha256(sources), notes=notes)


def _hash_parts(parts: Sequence[InputSplit], share: Share) -> list[str]:
    """`hash_input_split` of each, of local files once a host."""
    keys = ["" if part.remote else known_hashes.identify(repr(part), list_files(part)) for part in parts]
    found = [known_hashes.find(key) for key in keys]
    computed = share.map(hash_input_split, [part for part, known in zip(parts, found, strict=True) if known is None])
    rest = iter(computed)
    hashes = [next(rest) if known is None else known for known in found]
    for key, digest in zip(keys, hashes, strict=True):
        known_hashes.keep(key, digest)
    return hashes
