"""Columns, folders and paths as they are found: what is meant is read, anything else is named with its remedy."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unisono.config.recipe import Recipe, check, load, to_toml
from unisono.config.sections import Data
from unisono.data.ingest.input_splits import find_input_splits
from unisono.data.ingest.parquet import read_frame
from unisono.data.ingest.read import read_records, read_texts
from unisono.data.prepare import prepare
from unisono.errors import DataError, RecipeError

WORDS = ["saw", "drill", "pear", "apple", "nail", "plum", "file", "fig"]
ROWS = [{"text": f"{word} {number}", "label": "ab"[number % 2]} for number, word in enumerate(WORDS)]


def recipe(folder: Path, train: Path, **data: object) -> Recipe:
    table = {"train": str(train), "store": str(folder / "store"), **data}
    return check({"data": table, "encode": {"features": 64}})


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


NESTED = [{"meta": {"body": {"text": row["text"]}, "n": 1}, "kind": {"label": row["label"]}} for row in ROWS]
FIELDS = {"text": "meta.body.text", "label": "kind.label"}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_fields_of_columns(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"a.{suffix}", NESTED)
    records = read_records(path, Data(**FIELDS))
    assert [{"text": record.text, "label": record.label} for record in records] == ROWS
    assert list(read_texts(path, Data(**FIELDS)).texts) == [row["text"] for row in ROWS]
    assert prepare(recipe(tmp_path, path, **FIELDS)).counts == {"train": 8}
    with pytest.raises(
        DataError, match=r"no column 'meta\.txt' \(data\.text\).*Did you mean 'meta\.n'.*'meta', .*'meta\.body'"
    ):
        prepare(recipe(tmp_path, path, text="meta.txt", label="kind.label"))
    with pytest.raises(DataError, match=r"no column 'kind\.lable'.*Did you mean 'kind\.label'"):
        read_records(path, Data(text="meta.body.text", label="kind.lable"))


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_column_of_that_very_name_has_priority(tmp_path: Path, suffix: str) -> None:
    rows = [{"a.b": "column", "a": {"b": "field"}, "label": "x"}]
    path = write_rows(tmp_path / f"a.{suffix}", rows)
    assert [record.text for record in read_records(path, Data(text="a.b"))] == ["column"]
    some = write_rows(tmp_path / "b.jsonl", [*rows, {"a": {"b": "field"}, "label": "y"}])
    assert [record.text for record in read_records(some, Data(text="a.b"))] == ["column", "field"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_texts_of_several_columns(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"subject": "s", "mail": {"body": "b"}, "label": "x"},
        {"subject": None, "mail": {"body": "only"}, "label": "y"},
        {"subject": " ", "mail": None, "label": "y"},
    ]
    data = Data(text=["subject", "mail.body"])
    assert data.texts == ("subject", "mail.body")
    path = write_rows(tmp_path / f"a.{suffix}", rows)
    assert [record.text for record in read_records(path, data)] == ["s\n\nb", "only", ""]
    assert read_texts(path, data).faults == ("", "", "empty")
    dataset = prepare(recipe(tmp_path, path, text=["subject", "mail.body"]))
    assert dataset.counts == {"train": 2}
    assert dataset.quarantined == {"train": {"empty text": 1}}
    frame = pd.DataFrame({"subject": ["s"], "mail.body": ["b"], "label": ["x"]})
    assert [record.text for record in read_records(frame, data)] == ["s\n\nb"]
    with pytest.raises(DataError, match=r"no column 'title' \(data\.text\)"):
        prepare(recipe(tmp_path, path, text=["subject", "title"]))
    with pytest.raises(DataError, match="names several columns"):
        read_frame(["a", "b"], data, "frame")


def test_lists_of_columns_in_recipes(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[data]\ntext = ["subject", "body"]\ndelimiter = "tab"\nescape = "\\\\"\n')
    asked = load(path)
    assert (asked.data.text, asked.data.delimiter, asked.data.escape) == (("subject", "body"), "\t", "\\")
    path.write_text(to_toml(asked))
    assert load(path) == asked
    assert load(path, ("data.text=title",)).data.text == "title"
    assert load(path, ('data.text=["a", "b"]',)).data.text == ("a", "b")
    assert load(path, ('data.text=["a"]', "data.quote=none", "data.delimiter=;")).data.text == "a"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("text", [], "a column's name, or a list of different names"),
        ("text", ["a", "a"], "a list of different names"),
        ("text", 3, "a column's name"),
        ("delimiter", "", "one character"),
        ("delimiter", "ab", "one character"),
        ("quote", "", "'none' or one ASCII character"),
        ("quote", "«", "one ASCII character"),
        ("escape", "ab", "one ASCII character"),
        ("encoding", "cp9", "utf-8, cp1252"),
        ("encoding", "rot13", "utf-8, cp1252"),
        ("encoding", "unicode_escape", "utf-8, cp1252"),
        ("max_lines", 0, "greater than or equal to 1"),
    ],
)
def test_keys_of_dialects_are_checked(key: str, value: object, allowed: str) -> None:
    with pytest.raises(RecipeError, match=rf"'data\.{key}'.*{allowed}"):
        check({"data": {key: value}})


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_missing_column_is_told_with_those_that_there_are(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"a.{suffix}", [{"id": 1, "text": "a", "Label": "x"}, {"id": 2, "text": "b"}])
    for read in (lambda: read_records(path, Data()), lambda: prepare(recipe(tmp_path, path))):
        with pytest.raises(DataError, match=r"no column 'label'.*Did you mean 'Label'\? There are: .*'text', 'Label'"):
            read()


def test_lines_of_which_none_is_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("text,label\na,x\n")
    for read in (lambda path: read_records(path, Data()), lambda path: prepare(recipe(tmp_path, path))):
        with pytest.raises(DataError, match=r"a\.jsonl: no line is JSON, for instance 'text,label'.*data\.format"):
            read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_list_of_labels_is_blamed_itself(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "label": [row["label"], "c"]} for row in ROWS]
    path = write_rows(tmp_path / f"a.{suffix}", rows)
    with pytest.raises(DataError, match=r"8 the label is a list, not one class.*Set data\.label.*docs/tasks\.md"):
        prepare(recipe(tmp_path, path))
    some = write_rows(tmp_path / "b.jsonl", [*ROWS, {"text": "c", "label": {"a": 1}}, {"text": ["c"], "label": "x"}])
    assert prepare(recipe(tmp_path, some)).quarantined == {"train": {"not a text": 1, "the label is not a text": 1}}


# --- folders and patterns


def write_parts(folder: Path, suffix: str) -> None:
    folder.mkdir()
    for number in range(2):
        path = folder / f"part-{number:05}-c000.{suffix}"
        content = pd.DataFrame(ROWS[number * 4 : number * 4 + 4])
        if suffix == "csv":
            content.to_csv(path, index=False)
        elif suffix == "parquet":
            content.to_parquet(path)
        else:
            content.to_json(path, orient="records", lines=True)
        (folder / f".{path.name}.crc").write_bytes(b"crc\0")
    (folder / "_SUCCESS").touch()


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_folders_that_spark_writes(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "out"
    write_parts(folder, suffix)
    for location in (folder, folder / "*"):
        records = read_records(location, Data())
        assert [{"text": record.text, "label": record.label} for record in records] == ROWS
        said: list[str] = []
        assert prepare(recipe(tmp_path, location), notify=said.append).counts == {"train": 8}
        assert any("begin with" in line and "left out" in line for line in said)


def test_partitioned_folders_are_refused(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / f"t/label={label}").mkdir(parents=True)
        write_rows(tmp_path / f"t/label={label}/part-0.parquet", [{"text": "a"}])
    with pytest.raises(DataError, match=r"partitioned.*label=a"):
        read_records(tmp_path / "t", Data())


def test_folders_per_class_stay_so(tmp_path: Path) -> None:
    for name in ("a/1.txt", "a/_2.txt", "b/3.csv", "b/4.txt"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text("words")
    assert [record.label for record in read_records(tmp_path / "t", Data())] == ["a", "a", "b", "b"]
    write_parts(tmp_path / "out", "csv")
    assert {split.kind for split in find_input_splits(tmp_path / "out", Data(format="folder"))} == {"folder"}
    with pytest.raises(DataError, match="a folder has a text per file"):
        read_records(tmp_path / "t", Data(text=["a", "b"]))


# --- paths


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe.csv", "zero.jsonl"):
        with pytest.raises(DataError, match=r"no regular file.*Save its content as a file"):
            read_records(tmp_path / name, Data())
    for name in ("a\0b.csv", "a\0*.csv"):
        with pytest.raises(DataError, match="zero character"):
            read_records(tmp_path / name, Data())
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path / ("x" * 5_000), Data())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('name = "a"\n'.encode("utf-16"), "is UTF-16. Save it as UTF-8"),
        (b'# caf\xe9\nname = "a"\n', "byte 0xE9 in line 1 is no UTF-8. Save it as UTF-8"),
        (b"a = " + b"[" * 9_000, "nested too deep"),
        (b'[data]\ntrain = "a\\u0000b"\n', r"'data\.train'.*no path"),
        (b'[data]\nstore = "a\\u0000b"\n', r"'data\.store'"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load(path)


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b'\xef\xbb\xbf[data]\r\ntext = "body"\r\n')
    assert load(path).data.text == "body"
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    for name in ("pipe.toml", "zero.toml", "."):
        with pytest.raises(RecipeError, match=r"no regular file|Is a directory"):
            load(tmp_path / name)


# --- any number of processes


def test_bytes_of_any_dialect_do_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dataset of the same records, however they are written, cut and shared out."""
    monkeypatch.setattr("unisono.data.ingest.inputs.INPUT_SPLIT_BYTES", 64)
    frame = pd.DataFrame([{"text": f"{row['text']} café\nend", "label": row["label"]} for row in ROWS])
    (tmp_path / "b.tsv").write_text(frame.to_csv(index=False, sep="\t"))
    (tmp_path / "c.csv").write_bytes(frame.to_csv(index=False, sep=";").encode("utf-16"))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(frame.to_json(orient="records", indent=2).encode()))
    frame.to_json(tmp_path / "e.jsonl", orient="records", lines=True)
    found = set()
    for name, workers in [("b.tsv", 2), ("c.csv", 2), ("d.json.gz", 1), ("e.jsonl", 2)]:
        dataset = prepare(recipe(tmp_path / str(workers), tmp_path / name), workers=workers)
        assert dataset.counts == {"train": 8}
        files = {
            key: value for key, value in dataset.manifest["files"].items() if key != "report.html"
        }  # it has a name
        found.add(json.dumps(files, sort_keys=True))
    assert len(found) == 1
