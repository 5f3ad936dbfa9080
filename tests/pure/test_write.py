"""Tables read back as they were written, but for texts that a spreadsheet would run."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from unisono.data.write import write_table

RUN = [
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    " =1",
    "\xa0=1",
    "\ufeff=1",
    "\0=1",
    "\v-x",
    "\f+x",
    '"=1"',
    " \u2003@x",
    "=",
    "-",
    "＝1",
    "＠x",
    "+-1",
    "-1-1",
    "--1",
]
ORDINARY = [
    "",
    "a=1",
    "'=1",
    "1-1",
    " -1 ",
    "a;b",
    "a; -1.5;+2",
    "a;\nb",
    "a@b",
    "-1",
    "+1",
    "-.5",
    "+1.5e-7",
    "1e5",
    "a\nb",
    "Ünïcode, “quoted”",
]


def read_csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def read_tsv(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_formulas_are_not_run(tmp_path: Path, suffix: str) -> None:
    """Neither in cells nor in names of columns."""
    path = tmp_path / "table"
    write_table(pa.table({"text": RUN, "=name": RUN}), path, suffix)
    head, *rows = (read_csv if suffix == ".csv" else read_tsv)(path)
    assert head == ["text", "'=name"]
    for text, cells in zip(RUN, rows, strict=True):
        written = (
            "'" + text if suffix == ".csv" else "'" + text.replace("\t", " ").replace("\r", " ").replace("\n", " ")
        )
        assert cells == [written, written]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a;=1+1", "a;'=1+1"),
        ("a; \xa0@x;-1;+b", "a;' \xa0@x;-1;'+b"),
        ('a;"=1"', 'a;\'"=1"'),
        ("a\n=1", "a\n'=1"),
        ("\t=1", "'\t'=1"),
        ("\r\n=1", "'\r\n'=1"),
        ("\tx", "'\tx"),
        ("=1;=2", "'=1;'=2"),
    ],
)
def test_what_could_become_a_cell_of_its_own_is_not_run(tmp_path: Path, text: str, written: str) -> None:
    """Where a semicolon separates cells, or a quoted line end ends a row."""
    write_table(pa.table({"text": [text]}), tmp_path / "table", ".csv")
    assert read_csv(tmp_path / "table")[1:] == [[written]]


def test_ordinary_cells_are_unchanged(tmp_path: Path) -> None:
    """Numbers stay numbers, those that were read as text, too."""
    path = tmp_path / "table"
    numbers = pa.array([-1.5, None, 1e-300, -0.0] + [-7.0] * (len(ORDINARY) - 4))
    write_table(pa.table({"text": ORDINARY, "score": numbers}), path, ".csv")
    head, *rows = read_csv(path)
    assert head == ["text", "score"]
    assert [text for text, _ in rows] == ORDINARY
    assert [score for _, score in rows][:5] == ["-1.5", "", "1e-300", "-0.0", "-7.0"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_formats_hold_every_text_as_it_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "table"
    write_table(pa.table({"text": RUN + ORDINARY}), path, suffix)
    if suffix == ".jsonl":
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    else:
        texts = parquet.read_table(path)["text"].to_pylist()
    assert texts == RUN + ORDINARY


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.text(st.sampled_from("=+-@\t\r\n'\",;1.e ab"), max_size=6), st.floats(allow_nan=False)),
        min_size=1,
        max_size=9,
    )
)
def test_no_cell_of_a_csv_begins_like_a_formula(tmp_path: Path, rows: list[tuple[str, float]]) -> None:
    """But numbers, which read back to the same bits; nothing but quotes is added."""
    path = tmp_path / "table"
    write_table(pa.table({"text": [text for text, _ in rows], "number": [number for _, number in rows]}), path, ".csv")
    for (text, number), (cell, score) in zip(rows, read_csv(path)[1:], strict=True):
        assert np.float64(score).tobytes() == np.float64(number).tobytes()
        rest = iter(text)
        left = next(rest, None)
        for character in cell:
            assert character in (left, "'")
            left = next(rest, None) if character == left else left
        assert left is None, "a part of the text is missing"
        for part in re.split("[;\t\r\n]", cell):
            if part.strip()[:1] and part.strip()[0] in "=+-@":
                float(part)


def test_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    """NaN is null, an infinite number a text; so is a number within a list."""
    path = tmp_path / "t.jsonl"
    table = pa.table({"a": [math.nan, math.inf, -math.inf, 0.5], "b": [[1.0, math.nan]] * 4})
    write_table(table, path, ".jsonl")
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["a"] for row in rows] == [None, "Infinity", "-Infinity", 0.5]
    assert rows[0]["b"] == [1.0, None]
