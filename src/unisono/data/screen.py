"""Which records are fit to learn from, and into which split each goes.

Owns the rules, their names and the cut by content. Works on records in memory; it reads and writes nothing.
Every record is either kept or quarantined, with the first rule that it breaks as the reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from unisono.data.read import Record

VERSION = 1
"""Raised whenever a rule, or the cut, comes to decide otherwise."""

Rule = Callable[[Sequence[Record]], list[bool]]
"""Tells of each record whether it breaks the rule, given all that are still kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A record that is not learned from, and why."""

    split: str
    reason: str
    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """Every record once: kept in a split, or quarantined; both in the order of the input."""

    splits: Mapping[str, list[Record]]
    quarantined: list[Quarantined]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Quarantined records by split, then by reason."""
        counts: dict[str, Counter[str]] = {}
        for one in self.quarantined:
            counts.setdefault(one.split, Counter())[one.reason] += 1
        return {split: dict(sorted(reasons.items())) for split, reasons in sorted(counts.items())}


def empty(records: Sequence[Record]) -> list[bool]:
    """The text has no visible character."""
    return [not record.text.strip() for record in records]


def unlabelled(records: Sequence[Record]) -> list[bool]:
    """The class is missing."""
    return [record.label is None for record in records]


def of_unknown_class(labels: Iterable[str]) -> Rule:
    """The class is none of `labels`; with no labels given, every class is known."""
    known = frozenset(labels)
    return lambda records: [bool(known) and record.label not in known for record in records]


def contradictory(records: Sequence[Record]) -> list[bool]:
    """The same text has another class elsewhere: which one is right cannot be told, so all of them go."""
    classes: dict[str, set[str | None]] = {}
    for record in records:
        classes.setdefault(record.text.strip(), set()).add(record.label)
    return [len(classes[record.text.strip()]) > 1 for record in records]


def repeated(records: Sequence[Record]) -> list[bool]:
    """The same text and class stood in an earlier record."""
    seen: set[tuple[str, str | None]] = set()
    found = []
    for record in records:
        content = record.text.strip(), record.label
        found.append(content in seen)
        seen.add(content)
    return found


def also_in(training: Iterable[Record]) -> Rule:
    """The text is one of the training texts: a score on it would measure memory."""
    texts = frozenset(record.text.strip() for record in training)
    return lambda records: [record.text.strip() in texts for record in records]


def screen(records: Sequence[Record], rules: Mapping[str, Rule], split: str) -> tuple[list[Record], list[Quarantined]]:
    """Apply rules one after the other, each to what those before have kept; their keys are the reasons."""
    reasons: dict[int, str] = {number: record.fault for number, record in enumerate(records) if record.fault}
    for reason, rule in rules.items():
        numbers = [number for number in range(len(records)) if number not in reasons]
        broken = rule([records[number] for number in numbers])
        reasons.update((number, reason) for number, breaks in zip(numbers, broken, strict=True) if breaks)
    kept = [record for number, record in enumerate(records) if number not in reasons]
    quarantined = [
        Quarantined(split=split, reason=reasons[number], record=records[number]) for number in sorted(reasons)
    ]
    return kept, quarantined


def screen_splits(
    given: Mapping[str, Sequence[Record]],
    *,
    labels: Sequence[str] = (),
    validation_fraction: float = 0.0,
    test_fraction: float = 0.0,
) -> Screened:
    """Screen what was given as train, validation, test; cut shares off train; drop what is also in train."""
    rules: dict[str, Rule] = {
        "empty text": empty,
        "no label": unlabelled,
        "unknown label": of_unknown_class(labels),
        "same text, two labels": contradictory,
        "duplicate": repeated,
    }
    splits: dict[str, list[Record]] = {}
    quarantined: list[Quarantined] = []
    for split, records in given.items():
        splits[split], out = screen(records, rules, split)
        quarantined += out
    splits |= cut(splits["train"], validation_fraction, test_fraction)
    leak: dict[str, Rule] = {"also in train": also_in(splits["train"])}
    for split in ("validation", "test"):
        if split in given:
            splits[split], out = screen(splits[split], leak, split)
            quarantined += out
    return Screened(splits=splits, quarantined=quarantined)


def cut(records: Sequence[Record], validation_fraction: float, test_fraction: float) -> dict[str, list[Record]]:
    """Cut records into train, validation and test, those with a share of 0 left out.

    Where a record goes depends on its own text and class alone, so neither order nor company changes it.
    """
    splits: dict[str, list[Record]] = {"train": []}
    if validation_fraction:
        splits["validation"] = []
    if test_fraction:
        splits["test"] = []
    for record in records:
        place = _place(record)
        if place < test_fraction:
            splits["test"].append(record)
        elif place < test_fraction + validation_fraction:
            splits["validation"].append(record)
        else:
            splits["train"].append(record)
    return splits


def _place(record: Record) -> float:
    """A number in [0, 1) from the record's content, evenly spread."""
    content = f"{record.label}\0{record.text.strip()}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
