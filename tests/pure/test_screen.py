"""No record is lost, each rule finds what its name says, and a cut depends on content alone."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from unisono.data.read import Record
from unisono.data.screen import Screened, cut, screen, screen_splits


def record(text: str, label: str | None = "x", row: int = 1, fault: str = "") -> Record:
    return Record(file="f", row=row, text=text, label=label, fault=fault)


def reasons(screened: Screened) -> list[tuple[str, int, str]]:
    return [(one.split, one.record.row, one.reason) for one in screened.quarantined]


def test_each_rule() -> None:
    train = [
        record("fine", "x", 1),
        record("bytes", "x", 2, fault="not UTF-8"),
        record(" \n", "x", 3),
        record("nameless", None, 4),
        record("strange", "z", 5),
        record("both", "x", 6),
        record("both", "y", 7),
        record("both", "x", 8),
        record(" fine ", "x", 9),
        record("good", "y", 10),
    ]
    test = [record("fine", "y", 1), record("new", "x", 2), record("both", "x", 3)]
    screened = screen_splits({"train": train, "test": test}, labels=["x", "y"])
    assert reasons(screened) == [
        ("train", 2, "not UTF-8"),
        ("train", 3, "empty text"),
        ("train", 4, "no label"),
        ("train", 5, "unknown label"),
        ("train", 6, "same text, two labels"),
        ("train", 7, "same text, two labels"),
        ("train", 8, "same text, two labels"),
        ("train", 9, "duplicate"),
        ("test", 1, "also in train"),
    ]
    assert [one.row for one in screened.splits["train"]] == [1, 10]
    assert [one.row for one in screened.splits["test"]] == [2, 3], "a text that train lost is not in train"
    assert screened.counts["test"] == {"also in train": 1}


def test_without_labels_every_class_is_known() -> None:
    assert not screen_splits({"train": [record("a", "any")]}).quarantined


records = st.lists(
    st.builds(
        record,
        st.text("ab ", max_size=2),
        st.sampled_from(["x", "y", None]),
        st.integers(1, 99),
        st.sampled_from(["", "", "not JSON"]),
    ),
    max_size=30,
)


@given(records, records, st.sampled_from([0.0, 0.3]), st.sampled_from([(), ("x",)]))
def test_no_record_is_lost(train: list[Record], test: list[Record], fraction: float, labels: tuple[str, ...]) -> None:
    given_ = {"train": train, "test": test}
    screened = screen_splits(given_, labels=labels, validation_fraction=fraction)
    kept = [id(one) for split in screened.splits.values() for one in split]
    out = [id(one.record) for one in screened.quarantined]
    assert sorted(kept + out) == sorted(id(one) for one in train + test)
    for name, given_records in given_.items():
        places = {id(one): number for number, one in enumerate(given_records)}
        order = [places[id(one)] for one in screened.splits[name]]
        assert order == sorted(order)


@given(records, st.randoms())
def test_what_is_kept_does_not_depend_on_order(train: list[Record], shuffler: random.Random) -> None:
    def contents(given_records: list[Record]) -> dict[str, set[tuple[str, str | None]]]:
        splits = screen_splits({"train": given_records}, validation_fraction=0.3, test_fraction=0.3).splits
        return {name: {(one.text.strip(), one.label) for one in split} for name, split in splits.items()}

    shuffled = list(train)
    shuffler.shuffle(shuffled)
    assert contents(train) == contents(shuffled)


def test_a_cut_depends_on_content_alone() -> None:
    many = [record(f"text {number}", "xy"[number % 2], number) for number in range(4000)]
    splits = cut(many, 0.1, 0.2)
    places = {one.text: name for name, split in splits.items() for one in split}
    assert abs(len(splits["validation"]) - 400) < 80
    assert abs(len(splits["test"]) - 800) < 100
    for part in (many[::3], many[::-1]):
        assert all(places[one.text] == name for name, split in cut(part, 0.1, 0.2).items() for one in split)
    again = cut([record(f"  {one.text}\n", one.label) for one in many[:50]], 0.1, 0.2)
    assert all(places[one.text.strip()] == name for name, split in again.items() for one in split)


def test_rules_see_only_what_earlier_rules_kept() -> None:
    seen: list[int] = []

    def first(given_: object) -> list[bool]:
        return [True, False, True]

    def second(given_: object) -> list[bool]:
        seen.append(len(given_))  # type: ignore[arg-type]
        return [True]

    kept, out = screen([record("a"), record("b"), record("c")], {"one": first, "two": second}, "train")
    assert (kept, [one.reason for one in out], seen) == ([], ["one", "two", "one"], [1])
