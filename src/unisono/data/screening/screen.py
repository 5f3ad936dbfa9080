"""Which records are fit to learn from, given all the others, and into which split each goes.

Owns the rules that compare records, their names, and the cut by content. The rules that need one record alone are in
`rules.py` and run before. Works on arrays with one entry per record; it reads and writes nothing, and sees no texts.
Every record is either kept or quarantined, with the first rule that it breaks as the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from unisono.config.sections import Screen
from unisono.data.screening import near_duplicates as near

VERSION = 3
"""Raise it whenever a rule, or the cut, begins to decide differently."""

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)

KEPT = ""
"""Stands where a reason would: the record is kept."""
CONTRADICTORY = "same text, two labels"
DUPLICATE = "duplicate"
LEAKED = "also in train"


@dataclass(slots=True, kw_only=True)
class Records:
    """All records, in the order of the input: train, validation, test, those that are given. Arrays run parallel.

    splits: int8, numbers of SPLITS; at first the split for which a record was given, later the split it is in.
    hashes: uint64 [2, records], of the text without space around it.
    places: uint64, of class and text; empty where no split is cut.
    labels: int32, a number for each class, −1 for none.
    reasons: int16, numbers of `names`; KEPT is number 0.
    bands: uint64 [records, bands] from `near.sketch`, or None.
    """

    splits: np.ndarray
    hashes: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    reasons: np.ndarray
    bands: np.ndarray | None
    names: list[str]
    like: np.ndarray = field(init=False)
    """int64: the record because of which this one is quarantined, which it repeats or resembles; −1: none."""

    def __post_init__(self) -> None:
        self.like = np.full(len(self.reasons), -1, np.int64)

    def refuse(self, chosen: np.ndarray, reason: str) -> None:
        """Note a reason for records (a mask, or numbers) that have none so far."""
        if reason not in self.names:
            self.names.append(reason)
        self.reasons[chosen] = self.names.index(reason)

    @property
    def kept(self) -> np.ndarray:
        """Which records have no reason against them: bool [records]."""
        return self.reasons == 0


def screen(
    records: Records,
    settings: Screen,
    given: Sequence[str],
    *,
    validation: float,
    test: float,
    stratify: bool = False,
) -> None:
    """Decide on all records: note why some are quarantined, and into which split the others go.

    The rules run in this order, each on the records that those before it have kept. First go texts with two classes,
    all of them, as no class is known to be right; then repeated texts; then records that near-duplicates contradict.
    Then shares are cut off train. Then a validation or test that was given loses what is also in train. Last come
    near-duplicates, within a split and of train.

    Args:
        given: the splits that the user gave.
        validation, test: shares of the training records.
        stratify: whether they are shares of each class.
    """
    for split in range(len(SPLITS)):
        members = np.flatnonzero(records.kept & (records.splits == split))
        first, contradicted = _group(records.hashes[:, members], records.labels[members])
        repeats = first != np.arange(len(members))
        records.refuse(members[contradicted], CONTRADICTORY)
        records.refuse(members[repeats & ~contradicted], DUPLICATE)
        records.like[members[repeats]] = members[first[repeats]]
    if settings.contradicted == "refuse":
        assert records.bands is not None
        chosen = near.find_contradicted(
            records.labels,
            records.bands,
            records.splits,
            records.kept,
            neighbours=settings.contradicted_neighbours,
            share=settings.contradicted_share,
        )
        records.refuse(chosen, near.CONTRADICTED)
    (_cut_each_class if stratify else _cut)(records, validation, test)
    train = np.flatnonzero(records.kept & (records.splits == TRAIN))
    for split in (VALIDATION, TEST):
        if SPLITS[split] in given:
            members = np.flatnonzero(records.kept & (records.splits == split))
            places = _find(records.hashes[:, members], records.hashes[:, train])
            records.refuse(members[places >= 0], LEAKED)
            records.like[members[places >= 0]] = train[places[places >= 0]]
    if settings.near_duplicates == "refuse":
        assert records.bands is not None
        found = near.find_near_duplicates(records.bands, records.splits, records.kept, records.like)
        for number in (near.IN_SPLIT, near.IN_TRAIN):
            records.refuse(found == number, near.REASONS[number])


def _cut(records: Records, validation: float, test: float) -> None:
    """Cut shares off train. Where a record goes depends on its own text and class alone, so neither the order nor the
    other records change it."""
    if not validation and not test:
        return
    shares = records.places / 2.0**64
    train = records.kept & (records.splits == TRAIN)
    records.splits[train & (shares < test + validation)] = VALIDATION
    records.splits[train & (shares < test)] = TEST


def _cut_each_class(records: Records, validation: float, test: float) -> None:
    """As `_cut`, with the shares of each class as exact as whole records allow: at least one of a class in each split,
    as long as one is left for train. The order makes no difference; other records of the class do."""
    train = np.flatnonzero(records.kept & (records.splits == TRAIN))
    order = train[np.lexsort((records.places[train], records.labels[train]))]
    _, begins, sizes = np.unique(records.labels[order], return_index=True, return_counts=True)
    ranks, of_class = np.arange(len(order)) - np.repeat(begins, sizes), np.repeat(sizes, sizes)
    tests = np.minimum(_share(of_class, test), of_class - 1)
    others = np.minimum(_share(of_class, validation), of_class - 1 - tests)
    records.splits[order[ranks < tests + others]] = VALIDATION
    records.splits[order[ranks < tests]] = TEST


def _share(sizes: np.ndarray, share: float) -> np.ndarray:
    """The nearest whole number to a share, at least 1; 0 if the share is."""
    return np.maximum(np.floor(sizes * share + 0.5).astype(np.int64), int(share > 0))


def _group(hashes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each record the first one that has its text (int64), and whether records with its text differ in
    class."""
    order, (high, low) = _sort(hashes)
    first, contradicted = np.zeros(len(order), np.int64), np.zeros(len(order), bool)
    if not len(order):
        return first, contradicted
    begins = np.ones(len(order), bool)
    begins[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    groups = np.cumsum(begins)
    first[order] = np.minimum.reduceat(order, np.flatnonzero(begins))[groups - 1]
    ordered = labels[order]
    changes = np.flatnonzero((ordered[1:] != ordered[:-1]) & ~begins[1:]) + 1  # within a group
    if len(changes):
        contradicted[order] = np.isin(groups, groups[changes])
    return first, contradicted


def _find(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return for each hash of 128 bits (uint64 [2, n], no two of them equal) its place among the known ones, or -1."""
    both = np.concatenate([known, hashes], axis=1)
    first, _ = _group(both, np.zeros(both.shape[1], np.int32))
    places = first[known.shape[1] :]
    return np.where(places < known.shape[1], places, -1)


def _sort(hashes: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return an order of hashes of 128 bits in which equal hashes are neighbours, and both halves in that order."""
    order = np.argsort(hashes[0])
    high, low = hashes[0][order], hashes[1][order]
    if ((high[1:] == high[:-1]) & (low[1:] != low[:-1])).any():  # once in 2^64 pairs
        order = np.lexsort((hashes[1], hashes[0]))
        high, low = hashes[0][order], hashes[1][order]
    return order, (high, low)
