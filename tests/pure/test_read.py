"""Every format gives the same records, and a bad row spoils only itself."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisono.config.sections import Data
from unisono.data.ingest.read import Record, read_records, read_texts
from unisono.errors import DataError

TEXTS = ["plain", 'a "quoted", word', "two\nlines", "今天天气很好", "  spaces  "]
LABELS = ["x", "y", "x", "好", "y"]
DATA = Data()


def contents(records: list[Record]) -> list[tuple[str, str | None]]:
    assert [record.row for record in records] == list(range(1, len(records) + 1))
    assert not any(record.fault for record in records)
    return [(record.text, record.label) for record in records]


def write_csv(path: Path, rows: list[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write(folder: Path, kind: str) -> Path:
    path = folder / f"data.{kind}"
    pairs = list(zip(TEXTS, LABELS, strict=True))
    if kind == "csv":
        write_csv(path, [("text", "label"), *pairs])
    elif kind == "jsonl":
        lines = [json.dumps({"label": label, "text": text}) for text, label in pairs]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        pq.write_table(pa.table({"text": TEXTS, "label": LABELS}), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_give_the_same_records(tmp_path: Path, kind: str) -> None:
    assert contents(read_records(write(tmp_path, kind), DATA)) == list(zip(TEXTS, LABELS, strict=True))


FRAMES = {
    "pandas": pd.DataFrame({"text": TEXTS, "label": LABELS}),
    "pandas categories": pd.DataFrame({"text": TEXTS, "label": pd.Categorical(LABELS)}),
    "polars": pl.DataFrame({"text": TEXTS, "label": LABELS}),
    "polars categories": pl.DataFrame({"text": TEXTS, "label": pl.Series(LABELS, dtype=pl.Categorical)}),
    "arrow": pa.table({"text": TEXTS, "label": LABELS}),
    "dict of lists": {"text": TEXTS, "label": LABELS},
    "list of dicts": [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)],
    "pair": (TEXTS, LABELS),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames_give_the_same_records(name: str) -> None:
    assert contents(read_records(FRAMES[name], DATA)) == list(zip(TEXTS, LABELS, strict=True))


def test_numbers_are_labels_as_they_were_before_a_missing_one() -> None:
    records = read_records(pd.DataFrame({"text": ["a", "b", "c"], "label": [1, 2, None]}), DATA)
    assert [record.label for record in records] == ["1", "2", None]


def test_tab_file_with_three_header_lines_and_no_quoting(tmp_path: Path) -> None:
    path = tmp_path / "news.tab"
    path.write_bytes(b'Category\tText\nd\tstring\nclass\t\nsci\tsay "hi\r\nrec\t"bye", he said\n\n')
    records = read_records(path, Data(text="Text", label="Category", header_lines=3))
    assert contents(records) == [('say "hi', "sci"), ('"bye", he said', "rec")]


def test_folder_per_class(tmp_path: Path) -> None:
    for name, content in {
        "b/2.txt": b"second",
        "a/1.txt": b"first",
        "b/3.txt": b"\xff",
        "a/.hidden": b"x",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README").write_bytes(b"of no class")
    records = read_records(tmp_path, DATA)
    assert [(one.file, one.label, one.fault) for one in records] == [
        ("README", None, ""),
        ("a/1.txt", "a", ""),
        ("b/2.txt", "b", ""),
        ("b/3.txt", "b", "not UTF-8"),
    ]


def test_names_given_instead_of_a_header(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("x,hello\ny,world\n")
    records = read_records(path, Data(columns=("label", "text"), header_lines=0))
    assert contents(records) == [("hello", "x"), ("world", "y")]


GOOD, FINE = b'{"text":"good","label":"x"}\n', b'\n{"text":"fine","label":"x"}'


@pytest.mark.parametrize(
    ("name", "content", "fault", "text"),
    [
        ("a.csv", b"text,label\ngood,x\nb\xe4d,y\nfine,x\n", "not UTF-8", "b\\xe4d"),
        ("a.csv", b'text,label\ngood,x\n"b" d,y\nfine,x\n', "not CSV", '"b" d,y'),
        ("a.csv", b"text,label\ngood,x\nb,d,y\nfine,x\n", "3 fields, not 2", "b,d,y"),
        ("a.tsv", b"text\tlabel\ngood\tx\nb\xff\ty\nfine\tx\n", "not UTF-8", "b\\xff"),
        ("a.tsv", b"text\tlabel\ngood\tx\nbd\nfine\tx\n", "1 fields, not 2", "bd"),
        ("a.jsonl", GOOD + b'{"text":"b\xff","label":"y"}' + FINE, "not UTF-8", "b\\xff"),
        ("a.jsonl", GOOD + b'{"text":"\\ud800","label":"y"}' + FINE, "not UTF-8", "\\ud800"),
        ("a.jsonl", GOOD + b'{"text":' + FINE, "not JSON", '{"text":'),
        ("a.jsonl", GOOD + b'[1]' + FINE, "not JSON", "[1]"),
        ("a.jsonl", GOOD + b'{"text":[1],"label":"x"}' + FINE, "not a text", "[1]"),
    ],
)  # fmt: skip
def test_a_bad_row_spoils_only_itself(tmp_path: Path, name: str, content: bytes, fault: str, text: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    good, bad, fine = read_records(path, Data(encoding="utf-8"))
    assert (good.text, good.label, good.fault) == ("good", "x", "")
    assert (bad.fault, bad.text) == (fault, text)
    assert (fine.text, fine.label, fine.fault) == ("fine", "x", "")


def test_arrow_strings_that_are_not_utf8() -> None:
    raw = pa.Array.from_buffers(pa.string(), 2, pa.array([b"b\xff", b"ok"]).buffers())
    bad, good = read_records(pa.table({"text": raw, "label": ["x", "y"]}), DATA)
    assert (bad.text, bad.fault, good.text) == ("b\\xff", "not UTF-8", "ok")


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    for name, content in {"a.csv": b"text,label\na,x\n", "a.jsonl": b'{"text":"a","label":"x"}'}.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert contents(read_records(tmp_path / name, DATA)) == [("a", "x")]


def test_long_field(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [("text", "label"), ("z" * 300_000, "x")])
    assert len(read_records(tmp_path / "a.csv", DATA)[0].text) == 300_000


@pytest.mark.parametrize(
    ("name", "content", "data", "message"),
    [
        ("a.csv", None, {}, "no such file"),
        ("a.csv", b"", {}, "is empty"),
        ("a.csv", b"text,label\n", {}, "no record"),
        ("a.csv", b"text,label\na,x\n", {"header_lines": 9}, "has 2 lines, but data.header_lines = 9"),
        ("a.csv", b"Text,label\na,x\n", {}, "Did you mean 'Text'"),
        ("a.csv", b"text,lable,other\na,x,1\n", {}, "Did you mean 'lable'.*'text', 'lable', 'other'"),
        ("a.csv", b"text,text\na,x\n", {}, "two columns are named 'text'"),
        ("a.csv", b'text,label\na,x\n"b,y\nc,x\n', {}, "line 3 never closes"),
        ("a.csv", b"a,x\n", {"header_lines": 0}, "data.columns"),
        ("a.csv", "text,label\na,x\n".encode("utf-16"), {"encoding": "utf-8"}, "byte-order mark of UTF-16-LE"),
        ("a.tsv", b"text\tlabel\n", {}, "no record"),
        ("a.jsonl", b"\n", {}, "no record"),
        ("a.parquet", b"PAR1", {}, "Parquet"),
        ("a.doc", b"x", {}, "data.format"),
        ("a.csv", b"text,label\na,x\n", {"format": "folder"}, "folder"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, data: dict[str, object], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name, Data(**data))


@pytest.mark.parametrize("frame", [3, {"text": ["a"], "label": []}, {}, [], ([], [])])
def test_what_is_no_frame(frame: object) -> None:
    with pytest.raises(DataError):
        read_records(frame, DATA)


def test_texts_keep_every_row_and_every_column(tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_bytes(b"id,text\n1,hello\n2,\xff\n3,\n4,x,y\n5,world\n")
    new = read_texts(path, Data(encoding="utf-8"))
    assert new.texts == ("hello", "\\xff", "", "4,x,y", "world")
    assert new.faults == ("", "not UTF-8", "empty", "3 fields, not 2", "")
    assert new.usable.tolist() == [0, 4]
    assert new.labels is None
    assert new.table["id"].to_pylist() == ["1", "2", "3", None, "5"]
    assert new.table["text"].to_pylist() == ["hello", "\\xff", "", None, "world"]


def test_texts_of_frames_and_lists() -> None:
    frame = pd.DataFrame({"n": [1.5, 2.5], "text": ["a", None], "label": ["x", None]})
    new = read_texts(frame, DATA)
    assert (new.texts, new.labels, new.faults) == (("a", ""), ("x", None), ("", "empty"))
    assert new.table["n"].to_pylist() == [1.5, 2.5]
    assert read_texts(["a", "b"], DATA).texts == ("a", "b")
    mixed = read_texts([{"text": "a", "n": 1}, {"text": "b", "n": "two"}], DATA)
    assert mixed.table["n"].to_pylist() == ["1", "two"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.text(max_size=20), st.text("ab,\"'\n\r\t中", max_size=5)), min_size=1, max_size=8))
def test_csv_round_trip(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    path = tmp_path / "a.csv"
    path.write_bytes(file.getvalue().encode())
    records = read_records(path, DATA)
    assert contents(records) == [(text, label.strip() or None) for text, label in rows]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["csv", "tsv", "jsonl"]))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    try:
        records = read_records(path, Data(columns=("text", "label"), header_lines=0))
    except DataError:
        return
    for record in records:
        record.text.encode()
        (record.label or "").encode()
