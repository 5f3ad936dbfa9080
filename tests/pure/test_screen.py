"""Screening among records: each is kept, or quarantined with the first rule that it breaks; compared with a plain loop."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.config.sections import Screen
from unisono.data.screening import near_duplicates as near
from unisono.data.screening import screen as module
from unisono.data.screening.near_duplicates import sketch
from unisono.data.screening.screen import (
    CONTRADICTORY,
    DUPLICATE,
    LEAKED,
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    Records,
    screen,
)

Row = tuple[str, str, str]  # split, text, label


def stand(rows: Sequence[Row], gone: Sequence[int] = ()) -> Records:
    """Rows as the arrays that screening sees; those in `gone` have a reason by themselves."""
    digests = [hashlib.blake2b(text.strip().encode(), digest_size=16).digest() for _, text, _ in rows]
    labels = sorted({label for _, _, label in rows})
    keys = [f"{label}\0{text.strip()}".encode() for _, text, label in rows]
    records = Records(
        splits=np.array([SPLITS.index(split) for split, _, _ in rows], np.int8),
        hashes=np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).T.copy(),
        places=np.array(
            [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") for key in keys], np.uint64
        ),
        labels=np.array([labels.index(label) for _, _, label in rows], np.int32),
        reasons=np.zeros(len(rows), np.int16),
        bands=sketch([text for _, text, _ in rows]) if rows else None,
        names=["", "empty text"],
    )
    records.reasons[list(gone)] = 1
    return records


def judge(rows: Sequence[Row], gone: Sequence[int] = (), cut: float = 0.0) -> list[tuple[str, str]]:
    """The same decisions by loops over records: (split, reason) of each."""
    found = [[split, "empty text" if number in gone else ""] for number, (split, _, _) in enumerate(rows)]
    for split in SPLITS:
        mine = [number for number, row in enumerate(rows) if row[0] == split and not found[number][1]]
        classes: dict[str, set[str]] = {}
        for number in mine:
            classes.setdefault(rows[number][1].strip(), set()).add(rows[number][2])
        seen = set()
        for number in mine:
            text = rows[number][1].strip()
            found[number][1] = CONTRADICTORY if len(classes[text]) > 1 else DUPLICATE if text in seen else ""
            seen.add(text)
    for number, (split, text, label) in enumerate(rows):
        if split == "train" and not found[number][1] and cut:
            digest = hashlib.blake2b(f"{label}\0{text.strip()}".encode(), digest_size=8).digest()
            if int.from_bytes(digest, "big") / 2**64 < cut:
                found[number][0] = "test"
    train = {
        row[1].strip() for row, (split, reason) in zip(rows, found, strict=True) if split == "train" and not reason
    }
    for number, (split, text, _) in enumerate(rows):
        if split != "train" and not found[number][1] and text.strip() in train:
            found[number][1] = LEAKED
    return [(split, reason) for split, reason in found]


def tell(records: Records) -> list[tuple[str, str]]:
    return [
        (SPLITS[split], records.names[reason]) for split, reason in zip(records.splits, records.reasons, strict=True)
    ]


texts = st.sampled_from(["a", "b", " b ", "c", "dd", "dd\n", "e"])
tables = st.lists(st.tuples(st.sampled_from(SPLITS), texts, st.sampled_from("xy")), max_size=30).map(
    lambda rows: sorted(rows, key=lambda row: SPLITS.index(row[0]))
)


@settings(max_examples=200, deadline=None)
@given(tables, st.sets(st.integers(0, 29)))
def test_decisions_are_those_of_a_loop_over_records(rows: list[Row], gone: set[int]) -> None:
    here = [number for number in sorted(gone) if number < len(rows)]
    records = stand(rows, here)
    screen(records, Screen(), SPLITS, validation=0.0, test=0.0)
    assert tell(records) == judge(rows, here)


@settings(max_examples=100, deadline=None)
@given(tables, st.floats(0.01, 0.9))
def test_a_cut_depends_on_content_alone(rows: list[Row], share: float) -> None:
    rows = [row for row in rows if row[0] == "train"]
    records = stand(rows)
    screen(records, Screen(), ("train",), validation=0.0, test=share)
    assert tell(records) == judge(rows, cut=share)
    backwards = stand(rows[::-1])
    screen(backwards, Screen(), ("train",), validation=0.0, test=share)

    def kept(of: Records, names: Sequence[Row]) -> set[tuple[str, str]]:
        return {(row[1].strip(), split) for row, (split, reason) in zip(names, tell(of), strict=True) if not reason}

    assert kept(records, rows) == kept(backwards, rows[::-1])


def test_a_share_for_each_split() -> None:
    rows = [("train", f"text {number}", "x") for number in range(4000)]
    records = stand(rows)
    screen(records, Screen(), ("train",), validation=0.2, test=0.3)
    counts = np.bincount(records.splits) / len(rows)
    np.testing.assert_allclose(counts, [0.5, 0.2, 0.3], atol=0.03)  # a place is evenly spread
    assert not np.array_equal(records.splits, np.sort(records.splits))


def test_texts_with_equal_first_halves_of_their_hashes_are_told_apart() -> None:
    records = stand([("train", text, "x") for text in "abcabd"])
    records.hashes[0] = 7
    screen(records, Screen(), ("train",), validation=0.0, test=0.0)
    assert [reason for _, reason in tell(records)] == ["", "", "", DUPLICATE, DUPLICATE, ""]


def test_near_duplicates_go_last_and_contradicted_ones_before_the_cut() -> None:
    long = "the quick brown fox jumps over the lazy dog while the band plays on and the night grows old " * 3
    other = "an entirely different sentence about gardening, soil, seeds and the patience that they teach us " * 3
    rows = [
        ("train", long, "x"),
        ("train", long + "now", "x"),
        ("train", long + "then", "y"),
        ("train", other, "y"),
        ("test", long + "soon", "x"),
        ("test", other, "y"),
    ]
    records = stand(rows)
    screen(records, Screen(near_duplicates="refuse"), ("train", "test"), validation=0.0, test=0.0)
    assert [reason for _, reason in tell(records)] == [
        "",
        near.REASONS[1],
        near.REASONS[1],
        "",
        near.REASONS[2],
        LEAKED,
    ]
    records = stand(rows)
    screening = Screen(contradicted="refuse", contradicted_neighbours=2)
    screen(records, screening, ("train", "test"), validation=0.0, test=0.0)
    assert [reason for _, reason in tell(records)] == ["", "", near.CONTRADICTED, "", "", LEAKED]


def test_splits_are_numbered_as_near_duplicates_expect() -> None:
    assert (TRAIN, VALIDATION, TEST) == (near.TRAIN, 1, 2)
    assert near.REASONS[near.STAYS] == module.KEPT
