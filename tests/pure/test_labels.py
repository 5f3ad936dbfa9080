"""A class has one name whatever held its label, and classes that are numbers are in order of value."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.config.recipe import Recipe, check
from unisono.config.sections import Data
from unisono.data.ingest.labels import find_class, number_classes, sort_labels, spell_booleans, spell_label
from unisono.data.ingest.read import read_records, read_texts
from unisono.data.prepare import prepare
from unisono.errors import DataError

VALUES: dict[str, tuple[list[object], list[str]]] = {
    "whole": ([3, 10, -2, 0], ["3", "10", "-2", "0"]),
    "whole floats": ([3.0, 10.0, -2.0, -0.0], ["3", "10", "-2", "0"]),
    "floats": ([0.5, 1.0, -2.25, 3.0], ["0.5", "1", "-2.25", "3"]),
    "booleans": ([True, False, True, False], ["True", "False", "True", "False"]),
    "dates": (
        [datetime.date(2024, 5, day) for day in (1, 2, 3, 4)],
        ["2024-05-01", "2024-05-02", "2024-05-03", "2024-05-04"],
    ),
    "moments": ([datetime.datetime(2024, 5, 1, hour) for hour in (0, 6, 7, 8)],
        ["2024-05-01", "2024-05-01 06:00:00", "2024-05-01 07:00:00", "2024-05-01 08:00:00"],
    ),
}  # fmt: skip
TEXTS = ["a", "b", "c", "d"]


def recipe(folder: Path, **data: object) -> Recipe:
    return check({"data": {"store": str(folder / "store"), **data}})


def write_csv(values: list[object], path: Path, how: str) -> str:
    """As the library writes it."""
    if how == "pandas":
        pd.DataFrame({"text": TEXTS, "label": values}).to_csv(path, index=False)
    elif how == "polars":
        pl.DataFrame({"text": TEXTS, "label": values}).write_csv(path)
    else:
        pyarrow.csv.write_csv(pa.table({"text": TEXTS, "label": values}), path)
    return str(path)


def write_jsonl(values: list[object], path: Path) -> str:
    rows = [{"text": text, "label": value} for text, value in zip(TEXTS, values, strict=True)]
    path.write_text("".join(json.dumps(row, default=lambda day: day.isoformat()) + "\n" for row in rows))
    return str(path)


def write_parquet(values: list[object], path: Path) -> str:
    pq.write_table(pa.table({"text": TEXTS, "label": values}), path)
    return str(path)


@pytest.mark.parametrize("kind", VALUES)
def test_a_label_has_one_spelling_whatever_held_it(tmp_path: Path, kind: str) -> None:
    values, names = VALUES[kind]
    held: dict[str, object] = {
        how: write_csv(values, tmp_path / f"{how}.csv", how) for how in ("pandas", "polars", "arrow")
    }
    held |= {
        "json": write_jsonl(values, tmp_path / "a.jsonl"),
        "parquet": write_parquet(values, tmp_path / "a.parquet"),
        "pandas frame": pd.DataFrame({"text": TEXTS, "label": values}),
        "polars frame": pl.DataFrame({"text": TEXTS, "label": values}),
        "lists": {"text": TEXTS, "label": values},
    }
    classes = list(dict.fromkeys(names))
    known = number_classes(classes)
    for what, source in held.items():
        labels = [record.label for record in read_records(source, Data())]
        assert read_texts(source, Data()).labels == tuple(labels), what
        if kind != "booleans":  # a file's alone can be words; they are settled with all others
            assert labels == names, what
        assert [find_class(known, str(label)) for label in labels] == [classes.index(name) for name in names], what


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Decimal("1.00"), "1"),
        (Decimal("0.50"), "0.5"),
        (np.float32(0.1), "0.1"),
        (np.bool_(True), "True"),
        (1e16, "10000000000000000"),
        ("1.00", "1"),
        (" 7 ", "7"),
        ("-0", "0"),
        ("2024-05-01T00:00:00", "2024-05-01"),
        ("2024-05-01 06:00", "2024-05-01 06:00:00"),
        ("2024-05-01T06:00:00.25Z", "2024-05-01 06:00:00.250000+00:00"),
        (pd.Timestamp("2024-05-01T06:00:00.25Z"), "2024-05-01 06:00:00.250000+00:00"),
        *[(text, text) for text in ("01", "1e5", "1.10", "+1", "1,0", "1.0.0", "true", "-", "x 1.0", "007.0", "٣.0")],
    ],
)
def test_values_and_texts_that_are_values(value: object, name: str) -> None:
    """Codes, versions and words are no numbers."""
    assert [record.label for record in read_records({"text": ["a"], "label": [value]}, Data())] == [name]


def test_single_precision_is_spelled_as_in_a_file(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "label": pa.array([0.1, 0.25, None, float("nan")], pa.float32())})
    assert [record.label for record in read_records(table, Data())] == ["0.1", "0.25", None, None]


@given(st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)))
def test_spelling_again_changes_nothing(values: list[object]) -> None:
    for value in values:
        name = spell_label(str(value))
        assert spell_label(name) == name


def test_booleans_among_words_stay_words() -> None:
    assert spell_booleans(["true", "false"]) == {"true": "True", "false": "False"}
    assert spell_booleans(["TRUE"]) == {"TRUE": "True"}
    assert spell_booleans(["false", "mixture", "true"]) == {}
    assert spell_booleans(["true", "True", "maybe"]) == {"true": "True", "True": "True"}


def test_numbers_are_in_order_of_value_and_words_in_that_of_texts() -> None:
    assert sort_labels(map(str, range(12))) == [str(number) for number in range(12)]
    assert sort_labels(["10", "-1", "2.5", "2", "-10"]) == ["-10", "-1", "2", "2.5", "10"]
    for words in (["10", "2", "a"], ["01", "10", "9"], ["b", "B", "a", "ä"], ["true", "False"], ["2.0.1", "10.0.1"]):
        assert sort_labels(words) == sorted(words)


@pytest.mark.parametrize("labels", [(), ("1.0", "0"), ("1", "0.0")])
def test_a_pattern_over_formats_makes_each_class_once(tmp_path: Path, labels: tuple[str, ...]) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"from a file {n},{n % 2}.0\n" for n in range(6)))
    rows = [json.dumps({"text": f"from a json {n}", "label": n % 2}) for n in range(6)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    dataset = prepare(recipe(tmp_path, train=str(tmp_path / "*.*"), labels=labels))
    assert dataset.labels == (("1", "0") if labels else ("0", "1"))
    assert dataset.counts == {"train": 12} and not dataset.quarantined


def test_booleans_of_a_pattern_are_two_classes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "".join(f"file {n},{'true' if n % 2 else 'FALSE'}\n" for n in range(6))
    )
    rows = [json.dumps({"text": f"json {n}", "label": bool(n % 2)}) for n in range(6)]
    (tmp_path / "b.jsonl").write_text("\n".join([*rows, json.dumps({"text": "file 1", "label": False})]))
    dataset = prepare(recipe(tmp_path, train=str(tmp_path / "*.*")))
    assert dataset.labels == ("False", "True")
    assert dataset.quarantined == {"train": {"same text, two labels": 2}}
    train = dataset.split("train")
    assert train is not None and train.labels is not None and sorted(np.bincount(train.labels).tolist()) == [5, 6]


def test_twelve_numbers_are_classes_in_numeric_order(tmp_path: Path) -> None:
    frame = {"text": [f"word{n} and more" for n in range(48)], "label": [n % 12 for n in range(48)]}
    dataset = prepare(recipe(tmp_path), frames={"train": frame})
    assert dataset.labels == tuple(str(number) for number in range(12))


def test_a_label_is_wanted_twice_in_two_spellings(tmp_path: Path) -> None:
    frame = {"text": ["a", "b"], "label": [1, 0]}
    with pytest.raises(DataError, match="named twice"):
        prepare(recipe(tmp_path, labels=("1", "1.0", "0")), frames={"train": frame})
