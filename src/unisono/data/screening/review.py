"""What screening did to the data, in numbers and a few examples.

Owns the numbers, how the numbers of two parts of the data are added, and their plain form for JSON. `report_page.py`
shows them; the rules decide.

A review is small for data of any size: counts by split, reason, class and bin of length, and five examples a reason.
Parts may be reviewed anywhere and added in any grouping and order; the review is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

from unisono.data.screening.rules import PERSONAL, mask_all

RECORDS, CLASSES_IN, CLASSES, CHARACTERS_IN, CHARACTERS, TOKENS, CUT = (
    "records by reason",
    "records that came in by class",
    "records that stayed by class",
    "records that came in by characters",
    "records that stayed by characters",
    "samples by tokens",
    "texts that were cut",
)
"""What is counted, by split and by a reason, a class or the lower edge of a bin."""

STAYED = ""
"""In the place of a reason."""
NO_CLASS = ""
"""Stands where a class would: there is none, or it is unknown."""

EDGES = np.array([0, 1, 2, 3, *(2**power * half // 2 for power in range(2, 40) for half in (2, 3))], np.int64)
"""The lower edges of the bins of length: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32 …"""

EXAMPLES = 5
EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Example:
    """A quarantined record. `place` orders examples as the input: (number of the input split, number in it)."""

    place: tuple[int, int]
    split: str
    file: str
    row: int
    label: str
    text: str


@dataclass(slots=True)
class Review:
    """Counts by (what is counted, split, value), and the first examples of each reason."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def count_records(
        self,
        *,
        splits: np.ndarray,
        reasons: np.ndarray,
        labels: np.ndarray,
        characters: np.ndarray,
        split_names: Sequence[str],
        reason_names: Sequence[str],
        label_names: Sequence[str],
    ) -> None:
        """Count records, kept and not; arrays are of integers and run parallel.

        Args:
            splits: the split each record is in, or was given for: numbers of `split_names`.
            reasons: why it was quarantined: numbers of `reason_names`; one of the names is STAYED.
            labels: its class: numbers of `label_names`, or -1 for none and unknown ones.
            characters: length of its text as it was judged, mended and masked.
        """
        lengths = tuple(map(str, EDGES))
        classes = (*label_names, NO_CLASS)
        bins = _find_bins(characters)
        labels = np.where(labels < 0, len(label_names), labels)
        stayed = (
            reasons == tuple(reason_names).index(STAYED) if STAYED in reason_names else np.zeros(len(reasons), bool)
        )
        self._count(RECORDS, splits, split_names, reasons, reason_names)
        self._count(CLASSES_IN, splits, split_names, labels, classes)
        self._count(CLASSES, splits[stayed], split_names, labels[stayed], classes)
        self._count(CHARACTERS_IN, splits, split_names, bins, lengths)
        self._count(CHARACTERS, splits[stayed], split_names, bins[stayed], lengths)

    def count_tokens(self, split: str, tokens: np.ndarray, cut: int = 0) -> None:
        """Count the samples of a split by their tokens, and the texts of which the encoder read a beginning only."""
        one = np.zeros(len(tokens), np.int64)
        self._count(TOKENS, one, (split,), _find_bins(tokens), tuple(map(str, EDGES)))
        if cut:
            self.counts[CUT, split, ""] += cut

    def show(
        self, reason: str, text: str, *, place: tuple[int, int], split: str, file: str, row: int, label: str | None
    ) -> None:
        """Keep a record as an example of why records did not stay, if it is among the first of its reason.

        Of a text refused for personal details only the masked beginning is kept: the page is shown to others.
        """
        shown = self.examples.setdefault(reason, [])
        if len(shown) == EXAMPLES and place > shown[-1].place:
            return
        beginning = mask_all(text.strip()) if reason in PERSONAL else text.strip()
        if len(beginning) > EXAMPLE_CHARACTERS:
            beginning = beginning[:EXAMPLE_CHARACTERS] + "…"
        shown.append(
            Example(
                place=place, split=split, file=file, row=row, label=(label or "")[:EXAMPLE_CHARACTERS], text=beginning
            )
        )
        shown.sort()
        del shown[EXAMPLES:]

    def __add__(self, other: Review) -> Review:
        """Return the review of both parts."""
        examples = {
            reason: sorted([*self.examples.get(reason, ()), *other.examples.get(reason, ())])[:EXAMPLES]
            for reason in self.examples.keys() | other.examples.keys()
        }
        return Review(counts=self.counts + other.counts, examples=examples)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and integers, in an order that depends on the content alone."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for (what, split, value), number in sorted(self.counts.items()):
            counts.setdefault(what, {}).setdefault(split, {})[value] = number
        examples = {
            reason: [{**asdict(one), "place": list(one.place)} for one in shown]
            for reason, shown in sorted(self.examples.items())
        }
        return {"counts": counts, "examples": examples}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Return the review that `to_dict` described."""
        counts = Counter(
            {
                (what, split, value): number
                for what, by_split in plain["counts"].items()
                for split, by_value in by_split.items()
                for value, number in by_value.items()
            }
        )
        examples = {
            reason: [Example(**{**one, "place": tuple(one["place"])}) for one in shown]
            for reason, shown in plain["examples"].items()
        }
        return cls(counts=counts, examples=examples)

    def take(self, what: str, split: str) -> dict[str, int]:
        """Return a split's counts by value, sorted by value."""
        return {value: n for (kind, of, value), n in sorted(self.counts.items()) if kind == what and of == split}

    def _count(
        self, what: str, splits: np.ndarray, split_names: Sequence[str], values: np.ndarray, names: Sequence[str]
    ) -> None:
        table = np.bincount(splits.astype(np.int64) * len(names) + values, minlength=len(split_names) * len(names))
        for place in np.flatnonzero(table):
            split, value = divmod(int(place), len(names))
            self.counts[what, split_names[split], names[value]] += int(table[place])


def _find_bins(lengths: np.ndarray) -> np.ndarray:
    """Return the number of each length's bin: int64 [lengths]."""
    return np.searchsorted(EDGES, lengths, side="right") - 1
