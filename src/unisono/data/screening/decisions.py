"""The facts about all records together, and the screening decision on each.

Owns the way from the staging files to arrays and back, the classes, and the messages on what happened to the records.
`screen.py` makes the decisions.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from unisono.config.wording import count
from unisono.data.arrow import as_array, as_numbers, find_nulls
from unisono.data.encoding.parts import Fates, list_quarantined
from unisono.data.ingest.labels import sort_labels, spell_booleans, spell_label
from unisono.data.ingest.staging import HASHES, PLACE, StagedRecords
from unisono.data.screening import near_duplicates as near
from unisono.data.screening.screen import KEPT, SPLITS, TRAIN, Records
from unisono.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedBatch:
    """A staged record batch: its file, its number in the file, its range of all records, and the records' names."""

    staged: int
    number: int
    records: slice
    first_row: int
    first_of_input_split: int


def load_records(
    staged: Sequence[StagedRecords], splits: Sequence[str], *, cut: bool, near_ones: bool
) -> tuple[Records, list[str]]:
    """Return the facts about all records, and the classes that exist, by number.

    Args:
        splits: of each file.
        cut: whether a split is cut. near_ones: whether near-duplicates are looked for.
    """
    classes: dict[str, int] = {}
    reasons: dict[str, int] = {KEPT: 0}
    rows_of_files = [file.facts.rows for file in staged]
    total = sum(rows_of_files)
    records = Records(
        splits=np.repeat(np.array([SPLITS.index(split) for split in splits], np.int8), rows_of_files),
        hashes=np.empty((2, total), np.uint64),
        places=np.zeros(total if cut else 0, np.uint64),
        labels=np.empty(total, np.int32),
        reasons=np.empty(total, np.int16),
        bands=np.empty((near.BANDS, total), np.uint64).T if near_ones else None,
        names=[],
    )
    start = 0
    for file in staged:
        for number, rows in enumerate(file.facts.batches):
            here, batch = slice(start, start + rows), file.batch(number)
            for row, name in enumerate(HASHES):
                records.hashes[row, here] = as_numbers(batch.column(name))
            if cut and batch.column(PLACE).null_count == 0:
                records.places[here] = as_numbers(batch.column(PLACE))
            records.labels[here] = _number(batch.column("label"), classes, missing=-1)
            records.reasons[here] = _number(batch.column("reason"), reasons, missing=0)
            if records.bands is not None:
                content = batch.column("bands").buffers()[1]
                records.bands[here] = np.frombuffer(content, "<u8", rows * near.BANDS).reshape(rows, near.BANDS)
            start += rows
    records.names = list(reasons)
    return records, list(classes)


def settle_classes(
    records: Records, classes: Sequence[str], wanted: Sequence[str]
) -> tuple[list[str], tuple[str, ...]]:
    """Give every class its one spelling, and number the records' classes so; return all classes by number, and those
    wanted."""
    asked = [spell_label(name) for name in wanted]
    other = spell_booleans({*classes, *asked})
    spelled = [other.get(name, name) for name in classes]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(spelled))}
    records.labels = np.array([*(numbers[name] for name in spelled), -1], np.int32)[records.labels]
    return list(numbers), tuple(other.get(name, name) for name in asked)


def _number(strings: pa.Array, known: dict[str, int], missing: int) -> np.ndarray:
    """Return a number for each string, the same for equal ones; new strings are added to those known."""
    encoded = strings.dictionary_encode()
    numbers = [known.setdefault(word, len(known)) for word in encoded.dictionary.to_pylist()]
    indices = np.where(find_nulls(strings), len(numbers), as_numbers(encoded.indices))
    return np.array([*numbers, missing], np.int32)[indices]


class Decisions:
    """All records, staged and decided on."""

    def __init__(
        self, staged: Sequence[StagedRecords], splits: Sequence[str], records: Records, classes: Sequence[str]
    ) -> None:
        self.staged = staged
        self.records = records
        self.batches = _list_batches(staged, splits)
        self.labels: tuple[str, ...] = ()
        self._classes = classes
        self._numbers = np.full(len(classes) + 1, -1, np.int32)  # of the class in `labels`; the last one: none

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Quarantined records by split, then by reason."""
        counts: dict[str, dict[str, int]] = {}
        for split, name in enumerate(SPLITS):
            found = np.bincount(self.records.reasons[self.records.splits == split], minlength=1)
            reasons = {self.records.names[number]: int(count) for number, count in enumerate(found) if number and count}
            if reasons:
                counts[name] = dict(sorted(reasons.items()))
        return dict(sorted(counts.items()))

    def count_kept(self, split: str) -> int:
        """How many records are left for a split."""
        return int(np.count_nonzero(self.records.kept & (self.records.splits == SPLITS.index(split))))

    def tell_set_aside(self) -> list[str]:
        """A line on the quarantined records, if there are any."""
        gone, total = int(np.count_nonzero(~self.records.kept)), len(self.records.reasons)
        return [f"quarantined {gone:,} of {count(total, 'record')}: {tell_counts(self.counts)}"] if gone else []

    def choose_labels(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Return the classes in order: those wanted, or those of the training records, sorted; number them so.

        Raises:
            DataError: fewer than two, one named twice, or one that is in validation or test alone.
        """
        of_splits = [
            np.bincount(self.records.labels[self.records.kept & (self.records.splits == split)], minlength=1)
            for split in range(len(SPLITS))
        ]
        there = [{self._classes[number]: int(n) for number, n in enumerate(found) if n} for found in of_splits]
        self.labels = labels = tuple(wanted) or tuple(sort_labels(there[TRAIN]))
        if len(set(labels)) < len(labels):
            raise DataError(f"data.labels = {list(labels)}: a label is named twice. Name each once.")
        if len(labels) < 2:
            only = repr(labels[0])
            raise DataError(f"there is one class only, {only}. Give records of two classes or more; see data.label.")
        for split in range(1, len(SPLITS)):
            alone = sort_labels(set(there[split]) - set(labels))
            if alone:
                raise DataError(
                    f"{SPLITS[split]} has class {alone[0]!r} ({count(there[split][alone[0]], 'record')}), training has "
                    "not. Correct it, add training records of it, set data.labels to all the classes, or, where the "
                    "split is a share of the training records, data.stratify = true."
                )
        places = {label: number for number, label in enumerate(labels)}
        self._numbers[: len(self._classes)] = [places.get(name, -1) for name in self._classes]
        return labels

    def fates(self, batch: StagedBatch) -> Fates:
        """The decisions on a record batch's records."""
        return Fates(
            splits=self.records.splits[batch.records],
            reasons=self.records.reasons[batch.records],
            labels=self._numbers[self.records.labels[batch.records]],
            names=self.records.names,
            classes=self.labels,
            first_row=batch.first_row,
            place=(batch.staged, batch.first_of_input_split),
            like=self.records.like[batch.records],
            find=self.find,
        )

    def find(self, number: int) -> tuple[str, int]:
        """The file of a record, by its number among all, and its row there."""
        batch = self.batches[bisect_right(self.batches, number, key=lambda one: one.records.start) - 1]
        staged, place = self.staged[batch.staged], number - batch.records.start
        return staged.batch(batch.number).column("file")[place].as_py() or staged.facts.name, batch.first_row + place

    def list_quarantined(self) -> Iterator[dict[str, object]]:
        """Return the quarantined records, as lines of `quarantine.jsonl`, in the order of the input."""
        for batch in self.batches:
            yield from list_quarantined(self.staged[batch.staged], batch.number, self.fates(batch))

    def training_texts(self) -> TrainingTexts:
        """The texts that an encoder may learn from."""
        return TrainingTexts(self)


class TrainingTexts:
    """Texts in lists, one list for each staged record batch; they can be read more than once."""

    def __init__(self, decided: Decisions) -> None:
        self._decided = decided

    def __iter__(self) -> Iterator[list[str]]:
        decided = self._decided
        for batch in decided.batches:
            fates = decided.fates(batch)
            chosen = np.flatnonzero((fates.reasons == 0) & (fates.splits == TRAIN))
            texts = decided.staged[batch.staged].batch(batch.number).column("text")
            yield texts.take(as_array(chosen)).to_pylist()


def _list_batches(staged: Sequence[StagedRecords], splits: Sequence[str]) -> list[StagedBatch]:
    batches: list[StagedBatch] = []
    source, first_row, start = ("", ""), 1, 0
    for place, (file, split) in enumerate(zip(staged, splits, strict=True)):
        if source != (split, file.facts.name):
            source, first_row = (split, file.facts.name), 1
        first = start
        for number, rows in enumerate(file.facts.batches):
            batches.append(
                StagedBatch(
                    staged=place,
                    number=number,
                    records=slice(start, start + rows),
                    first_row=first_row,
                    first_of_input_split=start - first,
                )
            )
            start += rows
            first_row += rows
    return batches


def refuse_absent_labels(found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise DataError on a label in data.labels that no record has: usually it is misspelt."""
    absent = [label for label in wanted if label not in found]
    if absent:
        near_ones = difflib.get_close_matches(absent[0], found, n=1, cutoff=0.5)
        guess = f" Did you mean {near_ones[0]!r}?" if near_ones else ""
        there = ", ".join(map(repr, sort_labels(found)[:20])) or "none"
        raise DataError(
            f"data.labels: no record has label {absent[0]!r}.{guess} There are: {there}. Correct data.labels."
        )


def refuse(counts: Mapping[str, Mapping[str, int]], first: Mapping[str, object]) -> None:
    """Raise the DataError of data.strict."""
    raise DataError(
        f"data.strict: records would be quarantined ({tell_counts(counts)}). First: {show(first)}. "
        "Correct them, or set data.strict = false."
    )


def show(line: Mapping[str, object]) -> str:
    """A quarantined record in a line."""
    text = str(line["text"])
    beginning = text if len(text) <= 60 else f"{text[:60]}…"
    return f"{line['file']}, row {line['row']}: {line['reason']}: {beginning!r}"


def tell_counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Quarantined records by split and reason, in a line."""
    listed = {split: ", ".join(f"{n:,} {reason}" for reason, n in reasons.items()) for split, reasons in counts.items()}
    return "; ".join(f"{split}: {reasons}" for split, reasons in listed.items())
