"""What a user should know of a dataset before training on it: what was not read, and what a score cannot show.

Owns the sentences, and the refusal of a column that holds no classes. They stand in the manifest and in the report, and
are repeated whenever the dataset is opened. A sentence that begins with WARNING is shown where only warnings are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from unisono.config.wording import count, name_some
from unisono.data.ingest.labels import is_fraction, is_number
from unisono.data.screening import review
from unisono.data.screening.review import Review
from unisono.errors import DataError

WARNING = "warning: "
MANY_CLASSES = 20
"""With more classes than this, it is asked whether they are classes."""
FEW_EACH = 10
"""Records of a class: with fewer, numbers that are not whole are no classes."""
VERY_RARE = 3
"""Fewer records of a class in a split than this are named."""
SHARE_TO_WARN = 0.01
"""Of the texts of a split: a smaller share that is cut is said without a warning."""


def refuse_targets(labels: Collection[str], records: int, column: str) -> None:
    """Raise DataError if the classes of so many records look like a quantity that was measured.

    Whoever lists them in data.labels means classes; then it is not called.
    """
    if len(labels) > MANY_CLASSES and records < FEW_EACH * len(labels) and _are_numbers(labels):
        example = next(filter(is_fraction, labels))
        raise DataError(
            f"the column {column!r} (data.label) holds {len(labels):,} different numbers in {records:,} records, such "
            f"as {example}: it looks like a quantity to be predicted (regression), and each number would be a class. "
            "Name the column of classes in data.label, put the numbers into a few classes, or train a task of your own "
            "with a loss for numbers (docs/tasks.md). If they are classes, list them in data.labels."
        )


def list_remarks(
    found: Review,
    labels: Sequence[str],
    *,
    limit: str,
    column: str,
    unused: Collection[str],
    fractions: Collection[str],
    stratified: bool,
    listed: bool,
) -> list[str]:
    """The sentences, the weightiest last.

    Args:
        found: the review of all records.
        limit: what cuts a text: "256 tokens".
        column: of the classes.
        unused: columns that are not read.
        fractions: splits that were cut off the training records.
        stratified: whether they have a share of each class.
        listed: whether the user has listed the classes.
    """
    kept = {split: found.take(review.CLASSES, split) for split in ("train", "validation", "test")}
    kept = {split: classes for split, classes in kept.items() if classes}
    told = []
    if unused:
        told.append(f"columns that are not read: {name_some(unused)}")
    told += _tell_cut(found, kept, limit)
    told += [] if listed else _tell_classes(labels, sum(kept["train"].values()), column)
    remedy = "Give more records of them"
    if fractions and not stratified:
        remedy += ", or set data.stratify = true, which keeps a share of each class (another cut: other weights)"
    for split, classes in kept.items():
        told += _tell_rare(split, labels, classes, remedy)
    return told


def _tell_cut(found: Review, kept: Mapping[str, Mapping[str, int]], limit: str) -> list[str]:
    parts, most = [], 0.0
    for split, classes in kept.items():
        samples, cut = sum(classes.values()), sum(found.take(review.CUT, split).values())
        most = max(most, cut / samples)
        if cut:
            parts.append(f"{cut:,} of {samples:,} {split} ({100 * cut / samples:.1f} %)")
    if not parts:
        return []
    told = f"texts cut after {limit}: {', '.join(parts)}; the rest of them is not read."
    return [f"{WARNING if most >= SHARE_TO_WARN else ''}{told} Raise encode.max_tokens to read it."]


def _tell_classes(labels: Sequence[str], records: int, column: str) -> list[str]:
    if len(labels) <= MANY_CLASSES:
        return []
    if _are_numbers(labels):
        told = "are numbers, as if a quantity had been measured"
    elif records < 2 * len(labels):
        told = "have one record each, most of them"
    else:
        return []
    of = count(records, "training record")
    return [f"{WARNING}the {len(labels):,} classes of {of} {told}. Is {column!r} (data.label) the column of classes?"]


def _tell_rare(split: str, labels: Sequence[str], classes: Mapping[str, int], remedy: str) -> list[str]:
    absent = [label for label in labels if label not in classes]
    rare = [label for label in labels if 0 < classes.get(label, 0) < VERY_RARE]
    told = []
    if absent:
        effect = "it is not learned" if split == "train" else "the scores say nothing about it"
        told.append(f"{split} has no record of {_name(absent)}: {effect}")
    if rare:
        told.append(f"{split} has fewer than {VERY_RARE} records of {_name(rare)}")
    return [f"{WARNING}{one}. {remedy}." for one in told]


def _name(labels: Sequence[str]) -> str:
    return f"{'class' if len(labels) == 1 else 'classes'} {name_some(labels)}"


def _are_numbers(labels: Collection[str]) -> bool:
    """Whether all are numbers, and some of them not whole."""
    return all(map(is_number, labels)) and any(map(is_fraction, labels))
