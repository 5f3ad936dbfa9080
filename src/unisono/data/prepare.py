"""From what a recipe names to a dataset: read, screen, encode, store.

Owns the order of the stages, the classes, and when a dataset made before can be used again. Each stage has
its own module.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unisono.data import encode, screen, store
from unisono.data.formats import find_format
from unisono.data.read import Record, read_records
from unisono.data.screen import Screened
from unisono.errors import DataError, RecipeError
from unisono.recipe import Recipe
from unisono.sections import Data

SPLITS = ("train", "validation", "test")
SEEN = ("text", "label", "header_lines", "columns", "labels", "validation_fraction", "test_fraction")
"""Keys of [data] that decide a dataset, besides the bytes of its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What one split is made from."""

    name: str
    kind: str
    sha256: str
    source: Path | list[Record]


def ignore(message: str) -> None:
    """Take notice of nothing."""


def prepare(
    recipe: Recipe,
    *,
    workers: int = 1,
    frames: Mapping[str, object] | None = None,
    notify: Callable[[str], None] = ignore,
) -> store.Dataset:
    """Make the dataset that a recipe describes, or open it if it was made before.

    Args:
        recipe: with absolute paths, or relative to the current folder.
        workers: processes that encode; the dataset's bytes do not depend on it.
        frames: frames or lists by split (train, validation, test), instead of the recipe's files.
        notify: told in a line what is done.

    Raises:
        DataError: a file, column or label is missing, no record is left, or data.strict and one is
        quarantined. RecipeError: splits are given twice, or take all records. DamagedError: the dataset made
        before is damaged.
    """
    inputs = _find_inputs(recipe.data, frames or {})
    key = _make_key(recipe, inputs)
    folder = Path(recipe.data.store) / _hash(key)[:24]
    if folder.exists():
        notify(f"dataset {folder}: prepared before")
        dataset = store.open_dataset(folder)
        if recipe.data.strict and dataset.quarantined:
            _refuse(dataset.quarantined, next(store.read_quarantine(folder)))
        return dataset
    screened = _read_and_screen(recipe.data, inputs, notify)
    labels = _find_labels(screened.splits, recipe.data)
    encoder = encode.choose_encoder(recipe, [record.text for record in screened.splits["train"]])
    numbers = {label: number for number, label in enumerate(labels)}
    chunks = {}
    for split, records in screened.splits.items():
        classes = np.array([numbers[str(record.label)] for record in records], np.int32)
        chunks[split] = encode.encode_chunks(encoder, [record.text for record in records], classes, workers=workers)
    notify(
        "encoding " + ", ".join(f"{len(records)} {split}" for split, records in screened.splits.items()) + " records"
    )
    dataset = store.write_dataset(
        folder,
        splits=chunks,
        labels=labels,
        encoder=encoder,
        quarantine=map(_describe, screened.quarantined),
        notes={"quarantined": screened.counts, "made_from": key},
    )
    notify(f"dataset {folder}: written")
    return dataset


def _find_inputs(data: Data, frames: Mapping[str, object]) -> dict[str, Input]:
    """Return what each split is read from, with the hash of its content."""
    unknown = set(frames) - set(SPLITS)
    if unknown:
        raise DataError(f"frames for {', '.join(map(repr, sorted(unknown)))}: allowed are {', '.join(SPLITS)}.")
    inputs = {}
    for split in SPLITS:
        path = getattr(data, split)
        if split in frames:
            records = read_records(frames[split], data, f"{split} frame")
            content = [[record.text, record.label, record.fault] for record in records]
            inputs[split] = Input(name=f"{split} frame", kind="frame", sha256=_hash(content), source=records)
        elif path:
            kind = find_format(Path(path), data)
            inputs[split] = Input(name=Path(path).name, kind=kind, sha256=_hash_path(Path(path)), source=Path(path))
    if "train" not in inputs:
        raise DataError("data.train is empty. Set it to a file, or to a folder with one folder per class.")
    for split in ("validation", "test"):
        fraction = getattr(data, f"{split}_fraction")
        if split in inputs and fraction:
            raise RecipeError(
                f"data.{split} is given, and data.{split}_fraction = {fraction} as well. Set one of them."
            )
    if data.validation_fraction + data.test_fraction >= 1:
        total = data.validation_fraction + data.test_fraction
        raise RecipeError(f"data.validation_fraction + data.test_fraction = {total}. Allowed is a sum below 1.")
    return inputs


def _make_key(recipe: Recipe, inputs: Mapping[str, Input]) -> dict[str, object]:
    """Everything that decides the bytes of the dataset."""
    import tokenizers

    return {
        "inputs": {
            split: {"name": one.name, "format": one.kind, "sha256": one.sha256} for split, one in inputs.items()
        },
        "data": recipe.data.model_dump(mode="json", include=set(SEEN)),
        "encode": encode.find_settings(recipe),
        "versions": {
            "format": store.FORMAT,
            "screening": screen.VERSION,
            "encoding": encode.VERSION,
            "tokenizers": tokenizers.__version__,
        },
    }


def _read_and_screen(data: Data, inputs: Mapping[str, Input], notify: Callable[[str], None]) -> Screened:
    given = {}
    for split, one in inputs.items():
        notify(f"reading {one.name}")
        given[split] = one.source if isinstance(one.source, list) else read_records(one.source, data)
    _refuse_absent_labels(given, data)
    screened = screen.screen_splits(
        given,
        labels=data.labels,
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
    )
    if screened.quarantined:
        of_all = f"{len(screened.quarantined)} of {sum(map(len, given.values()))}"
        notify(f"quarantined {of_all} records: {_list(screened.counts)}")
        if data.strict:
            _refuse(screened.counts, _describe(screened.quarantined[0]))
    for split, records in screened.splits.items():
        if records:
            continue
        if screened.counts.get(split):
            raise DataError(
                f"{split}: no record can be used: {_list(screened.counts)}. First: {_first(screened, split)}."
            )
        raise DataError(f"{split}: no record is left for it. Raise data.{split}_fraction, or give more records.")
    return screened


def _refuse_absent_labels(given: Mapping[str, Sequence[Record]], data: Data) -> None:
    """Raise DataError on a label in data.labels that no record has: as a rule it is misspelt."""
    found = {record.label for records in given.values() for record in records if record.label}
    absent = [label for label in data.labels if label not in found]
    if absent:
        near = difflib.get_close_matches(absent[0], found, n=1, cutoff=0.5)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        there = ", ".join(map(repr, sorted(found)[:20])) or "none"
        raise DataError(
            f"data.labels: no record has label {absent[0]!r}.{guess} There are: {there}. Correct data.labels."
        )


def _find_labels(splits: Mapping[str, Sequence[Record]], data: Data) -> tuple[str, ...]:
    """Return the classes in order: those of the recipe, or those of the training records, sorted.

    Raises:
        DataError: fewer than two, one named twice, or one that is in validation or test alone.
    """
    classes = {split: Counter(str(record.label) for record in records) for split, records in splits.items()}
    labels = data.labels or tuple(sorted(classes["train"]))
    if len(set(labels)) < len(labels):
        raise DataError(f"data.labels = {list(labels)}: a label is named twice. Name each once.")
    if len(labels) < 2:
        raise DataError(f"there is one class only, {labels[0]!r}. Give records of two classes or more; see data.label.")
    for split in ("validation", "test"):
        alone = sorted(set(classes.get(split, ())) - set(labels))
        if alone:
            raise DataError(
                f"{split} has class {alone[0]!r} ({classes[split][alone[0]]} records), training has not. "
                "Correct it, add training records of it, or set data.labels to all the classes."
            )
    return labels


def _describe(one: screen.Quarantined) -> dict[str, object]:
    """Return a line of `quarantine.jsonl`."""
    record = one.record
    where = {"split": one.split, "file": record.file, "row": record.row}
    return {**where, "reason": one.reason, "label": record.label, "text": record.text}


def _first(screened: Screened, split: str) -> str:
    return _show(_describe(next(one for one in screened.quarantined if one.split == split)))


def _show(line: Mapping[str, object]) -> str:
    text = str(line["text"])
    beginning = text if len(text) <= 60 else f"{text[:60]}…"
    return f"{line['file']}, row {line['row']}: {line['reason']}: {beginning!r}"


def _list(counts: Mapping[str, Mapping[str, int]]) -> str:
    listed = {split: ", ".join(f"{n} {reason}" for reason, n in reasons.items()) for split, reasons in counts.items()}
    return "; ".join(f"{split}: {reasons}" for split, reasons in listed.items())


def _refuse(counts: Mapping[str, Mapping[str, int]], first: Mapping[str, object]) -> None:
    raise DataError(
        f"data.strict: records would be quarantined ({_list(counts)}). First: {_show(first)}. "
        "Correct them, or set data.strict = false."
    )


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_path(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names. Raises DataError if one is unreadable."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return _hash([[file.relative_to(path).as_posix(), _hash_path(file)] for file in files])
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{str(path)!r}: cannot be read: {error.strerror or error}.") from None
