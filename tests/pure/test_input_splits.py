"""Pieces of a source hold each row once and in order, wherever they are cut; nothing makes reading take all memory."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import multiprocessing
import os
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from unisono.config.sections import Data
from unisono.data.ingest import column_batch as column_batches
from unisono.data.ingest import compressed, lines
from unisono.data.ingest import delimited as rows
from unisono.data.ingest import parquet as tables
from unisono.data.ingest.column_batch import ColumnBatch, cut_column_batch, list_values
from unisono.data.ingest.documents import is_document
from unisono.data.ingest.input_splits import (
    InputSplit,
    find_input_splits,
    hash_input_split,
    read_file,
    read_input_split,
)
from unisono.data.ingest.parquet import read_frame
from unisono.data.ingest.read import read_records, read_texts
from unisono.errors import DataError

DATA = Data()
TWO = Data(columns=("text", "label"), header_lines=0)
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- the whole file at once, as plainly as it can be written: what pieces are compared with


def reference(content: bytes, kind: str, data: Data) -> list[object]:
    """Each row as a dict, or as (reason, raw)."""
    file = io.BytesIO(content.removeprefix(b"\xef\xbb\xbf"))
    texts = [line.decode("utf-8", "surrogateescape") for line in file]
    bare = [text.removesuffix("\n").removesuffix("\r") for text in texts]
    if kind == "jsonl":
        return [jsonl_row(line) for line in bare if line.strip()]
    tsv = [(line.split("\t") if line else [], ("", line)) for line in bare]
    cut = tsv if kind == "tsv" else list(csv_rows(texts))
    header, rest = cut[: data.header_lines], cut[data.header_lines :]
    names = list(data.columns) or [name.strip() or f"column {n}" for n, name in enumerate(header[0][0], 1)]
    found: list[object] = []
    for fields, raw in rest:
        if fields is None:
            found.append(raw)
        elif fields and len(fields) != len(names):
            found.append((f"{len(fields)} fields, not {len(names)}", ("," if kind == "csv" else "\t").join(fields)))
        elif fields:
            found.append(dict(zip(names, fields, strict=True)))
    return found


def jsonl_row(line: str) -> object:
    try:
        row = json.loads(line.rstrip().removesuffix(","))
    except ValueError:
        row = None
    return row if isinstance(row, dict) else ("not JSON", line)


def csv_rows(texts: list[str]) -> Iterator[tuple[list[str] | None, tuple[str, str]]]:
    used: list[str] = []
    reader = csv.reader((used.append(text) or text for text in texts), strict=True)
    while True:
        used.clear()
        start = reader.line_num + 1
        try:
            yield next(reader), ("", "")
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError("never closes") from None
            lines_of = f", lines {start} to {reader.line_num}" if len(used) > 1 else ""
            yield None, (f"not CSV{lines_of}", "".join(used).rstrip("\r\n"))


def listed(found: list[ColumnBatch], keep_none: bool = True) -> list[object]:
    """Rows of sheets as the reference gives them."""
    listed_rows: list[object] = []
    for column_batch in found:
        columns = {name: list_values(column) for name, column in column_batch.columns.items()}
        assert all(len(column) == column_batch.rows for column in columns.values())
        for row in range(column_batch.rows):
            fault = column_batch.faults.get(row)
            fields = {name: column[row] for name, column in columns.items() if keep_none or column[row] is not None}
            listed_rows.append((fault.reason, fault.raw) if fault else fields)
    return listed_rows


def read(path: Path | str, data: Data = DATA, input_split_bytes: int = 2**24) -> list[ColumnBatch]:
    return [
        column_batch
        for input_split in find_input_splits(path, data, input_split_bytes=input_split_bytes)
        for column_batch in read_input_split(input_split, data)
    ]


def without_none(rows: list[object]) -> list[object]:
    return [{k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else row for row in rows]


# --- each row once

FRAGMENTS = [
    b"\n",
    b"\r\n",
    b"\n\n",
    b"\r",
    b" ",
    b'"',
    b'""',
    b",",
    b"\t",
    b"\xff",
    b"\xe4\xb8\xad",
    b"a",
    b"text\tlabel",
    b"x,y",
]
OBJECTS = [
    b'{"text": "a", "label": "x"}',
    b'{"text": "\\u4e2d"}',
    b"[1]",
    b"{",
    b'{"a": NaN, "a": 2}',
    b'{"n": ' + b"9" * 30 + b"}",
]
contents = st.lists(st.sampled_from(FRAGMENTS + OBJECTS) | st.binary(max_size=12), max_size=30).map(b"".join)


@quick
@given(
    contents, st.sampled_from(["jsonl", "tsv", "csv"]), st.integers(1, 40), st.booleans(), st.sampled_from([0, 1, 2])
)
@example(b'{"text":"a"}\n{"text":"b"}', "jsonl", 13, False, 0)  # a piece that begins with a line
@example(b'{"text":"a"}\n{"text":"b"}\n', "jsonl", 12, True, 0)  # a piece that begins with a newline
@example(b"text\tlabel\r\n\r\na\tb", "tsv", 1, True, 1)
def test_pieces_of_any_size_give_each_row_once(
    tmp_path: Path, content: bytes, kind: str, input_split_bytes: int, mark: bool, header_lines: int
) -> None:
    data = Data(
        columns=("text", "label"),
        header_lines=header_lines,
        encoding="utf-8",
        delimiter="," if kind == "csv" else "tab",
        quote='"' if kind == "csv" else "none",
    )
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\0\0\xfe\xff")) and not mark:
        content = b"\n" + content
    assume(kind != "jsonl" or not is_document(content.decode("utf-8", "surrogateescape"), True, ("text", "label")))
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" * mark + content)
    try:
        expected = reference(content, kind, data)
    except DataError:
        with pytest.raises(DataError, match="never closes"):
            read(path, data, input_split_bytes)
        return
    try:
        found = read(path, data, input_split_bytes)
    except DataError as error:
        assert expected == [] and ("is empty" in str(error) or "header_lines" in str(error))
        return
    # repr, so that NaN equals NaN
    assert repr(without_none(listed(found))) == repr(without_none(expected))


@quick
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 64), st.integers(1, 30))
def test_every_line_has_one_owner(lengths: list[int], input_split_bytes: int, limit: int) -> None:
    """Straddling lines, empty pieces, lines longer than several pieces; lines too long keep their place."""
    content = b"\n".join(b"%d:" % number + b"x" * length for number, length in enumerate(lengths))
    file = io.BytesIO(content)
    found: list[bytes] = []
    for start in range(0, len(content), input_split_bytes):
        blocks = lines.own_blocks(file, start, min(start + input_split_bytes, len(content)), first=start == 0)
        found += [line.head if isinstance(line, lines.Long) else line for line in lines.cut_lines(blocks, limit)]
    assert found == [line for line in content.split(b"\n") if content]
    whole = list(lines.cut_lines(iter([content]), limit))
    assert [isinstance(line, lines.Long) for line in whole] == [
        len(line) > limit for line in content.split(b"\n") if content
    ]
    small = list(lines.cut_lines((content[i : i + 3] for i in range(0, len(content), 3)), limit))
    assert small == whole


def test_sheets_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "COLUMN_BATCH_ROWS", 10)
    monkeypatch.setattr(tables, "COLUMN_BATCH_ROWS", 10)
    frame = pd.DataFrame({"text": [f"t{n}" for n in range(95)], "label": ["x"] * 95})
    writers: dict[str, Callable[[Path], object]] = {
        "csv": lambda path: frame.to_csv(path, index=False),
        "tsv": lambda path: frame.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda path: frame.to_json(path, orient="records", lines=True),
        "parquet": lambda path: frame.to_parquet(path, row_group_size=40),
    }
    for kind, write in writers.items():
        write(tmp_path / f"a.{kind}")
        found = read(tmp_path / f"a.{kind}")
        assert [column_batch.rows for column_batch in found[:4]] == [10] * 4 and sum(
            column_batch.rows for column_batch in found
        ) == 95
        assert [record.text for record in read_records(tmp_path / f"a.{kind}", DATA)] == list(frame["text"])


def test_row_numbers_go_on_over_pieces_and_begin_again_in_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "COLUMN_BATCH_ROWS", 2)
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text('{"text":"t","label":"x"}\n' * 5 + "bad\n")
    records = read_records(tmp_path / "*.jsonl", DATA)
    assert [(record.file, record.row) for record in records] == [(f"{n}.jsonl", r) for n in "ab" for r in range(1, 7)]
    assert records[5].fault == "not JSON"


def test_column_that_only_some_sheets_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "COLUMN_BATCH_ROWS", 2)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text":"a"}\n' * 3 + '{"text":"b","label":"x","n":1}\n')
    assert [record.label for record in read_records(path, DATA)] == [None, None, None, "x"]
    assert read_texts(path, DATA).table["n"].to_pylist() == [None, None, None, 1]
    with pytest.raises(DataError, match="no column 'lable'"):
        read_records(path, Data(label="lable"))


def test_objects_of_all_different_keys_make_small_sheets(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"k{n}":{n},"text":"t"}}\n' for n in range(5000)))
    found = read(path)
    assert sum(column_batch.rows for column_batch in found) == 5000
    assert (
        max(column_batch.rows * len(column_batch.columns) for column_batch in found) <= 1.01 * rows.COLUMN_BATCH_CELLS
    )


# --- parquet, folders


@settings(quick, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 2000))
def test_parquet_by_row_groups(tmp_path: Path, count: int, group: int, input_split_bytes: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [f"t{n}" for n in range(count)], "label": ["x"] * count}), path, row_group_size=group
    )
    pieces = find_input_splits(path, DATA, input_split_bytes=input_split_bytes)
    assert [input_split.groups[0] for input_split in pieces[1:]] == [
        input_split.groups[1] for input_split in pieces[:-1]
    ]
    assert [row["text"] for row in listed(read(path, DATA, input_split_bytes))] == [b"t%d" % n for n in range(count)]
    assert len({hash_input_split(input_split) for input_split in pieces}) == len(pieces)
    assert pieces[0].columns == ("text", "label")


def test_parquet_reads_only_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": ["x"], "image": [b"0" * 1000]}), path)
    (input_split,) = find_input_splits(path, DATA)
    assert list(next(read_input_split(input_split, DATA, columns=["label", "text", "none"])).columns) == [
        "text",
        "label",
    ]


def test_large_parquet_row_is_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b" * 5000, "c"], "label": ["x", "y", "z"]}), path)
    records = read_records(path, Data(max_record_bytes=1024))
    assert [(record.label, record.fault) for record in records] == [("x", ""), (None, rows.TOO_LARGE), ("z", "")]


def test_folder_in_groups_of_files(tmp_path: Path) -> None:
    for number in range(30):
        file = tmp_path / "data" / "ab"[number % 2] / f"deep{number % 3}" / f"{number:02}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * number)
    (tmp_path / "data" / ".git").mkdir()
    (tmp_path / "data" / ".git" / "x.txt").write_bytes(b"hidden")
    whole = read_file(tmp_path / "data", DATA)
    assert len(find_input_splits(tmp_path / "data", DATA, input_split_bytes=50)) > 5
    assert listed(read(tmp_path / "data", DATA, 50)) == listed([whole])
    assert whole.rows == 30 and set(list_values(whole.columns["label"])) == {"a", "b"}
    (tmp_path / "data/a/deep0/00.txt").write_bytes("好".encode() * 1000)
    large = read_records(tmp_path / "data", Data(max_record_bytes=1024))
    assert large[0].fault == rows.TOO_LARGE and large[0].text.startswith("好") and len(large[0].text) < 400


def test_links_in_circles_end(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/1.jsonl").write_text('{"text":"t","label":"x"}')
    (tmp_path / "a/b/up").symlink_to(tmp_path)
    (tmp_path / "a/self").symlink_to(tmp_path / "a/self")
    (tmp_path / "alias").symlink_to(tmp_path / "a")
    assert [one.file for one in read_records(tmp_path, DATA)] == ["a/b/1.jsonl"]
    assert [one.file for one in read_records(tmp_path / "**" / "*.jsonl", DATA)] == ["a/b/1.jsonl"]


# --- compressed

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
LINES = b"".join(b'{"text":"t%d","label":"x"}\n' % n for n in range(20_000))


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv"])
def test_compressed_equals_plain(tmp_path: Path, packing: str, kind: str) -> None:
    mark = b"\xef\xbb\xbf"
    content = {"jsonl": LINES, "tsv": b"text\tlabel\n\na\tx\r\nb\ty", "csv": b'text,label\n"a\n1",x\nb,y\n'}[kind]
    (tmp_path / f"a.{kind}").write_bytes(mark + content)
    path = tmp_path / f"b.{kind}.{packing}"
    path.write_bytes(
        PACK[packing](mark + content[:20]) + PACK[packing](content[20:])
    )  # two members, one after the other
    assert listed(read(path)) == listed(read(tmp_path / f"a.{kind}"))
    assert len(find_input_splits(path, DATA, input_split_bytes=10)) == 1


@pytest.mark.parametrize("packing", PACK)
def test_cut_off_and_damaged_files(tmp_path: Path, packing: str) -> None:
    content = LINES + os.urandom(50_000).hex().encode()
    packed = PACK[packing](content)
    path = tmp_path / f"a.jsonl.{packing}"
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(DataError, match=rf"a\.jsonl\.{packing}.*(cut off|damaged)"):
        read(path)
    middle = 6 if packing == "zst" else len(packed) * 2 // 3  # zstd has checksums only where its writer asked for them
    path.write_bytes(packed[:middle] + bytes(64) + packed[middle + 64 :])
    with pytest.raises(DataError, match=rf"a\.jsonl\.{packing}.*damaged"):
        read(path)
    path.write_bytes(LINES[:1000])
    with pytest.raises(DataError, match="damaged, or not compressed as its name says"):
        read(path)


@pytest.mark.parametrize("packing", PACK)
def test_bombs_are_refused(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed, "FREE_BYTES", 2**20)
    path = tmp_path / f"a.jsonl.{packing}"
    path.write_bytes(PACK[packing](b" " * 2**23))
    with pytest.raises(DataError, match=r"data\.max_expansion = 200"):
        read(path)
    assert read(path, Data(max_expansion=1e6)) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.zip", "unzip a.zip"),
        ("a.tar.gz", "tar -xf"),
        ("a.jsonl.zip", "unzip"),
        ("a.parquet.gz", "Parquet is compressed"),
    ],
)
def test_archives_are_refused_with_a_remedy(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


# --- what is too large, too deep, endless


def test_row_that_is_too_large_is_a_fault_in_its_place(tmp_path: Path) -> None:
    data = Data(max_record_bytes=1024)
    big = "好" * 2000
    for kind, line in {
        "jsonl": '{{"text":"{}","label":"x"}}\n',
        "tsv": "{}\tx\n",
        "csv": '"{}",x\n',
    }.items():
        header = "" if kind == "jsonl" else "text\tlabel\n" if kind == "tsv" else "text,label\n"
        path = tmp_path / f"a.{kind}"
        path.write_text(header + line.format("a") + line.format(big) + line.format("c"), encoding="utf-8")
        for input_split_bytes in (100, 2**20):
            found = listed(read(path, data, input_split_bytes))
            assert [row["text"] for row in (found[0], found[2])] == ["a", "c"]
            reason, raw = found[1]
            assert reason == rows.TOO_LARGE and raw.endswith("好…") and len(raw.encode()) < 1010


def test_large_csv_row_of_many_lines_ends_where_its_quote_does(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    big = '"' + 'say ""hi"",\n' * 200 + '"'
    path.write_text(f"text,label\na,x\n{big},y\nb,z\n")
    first, second, third = listed(read(path, Data(max_record_bytes=1024)))
    assert (first["text"], second[0], third["text"]) == ("a", rows.TOO_LARGE, "b")
    path.write_text(f"text,label\na,x\n{big[:-1]},y\nb,z\n")
    with pytest.raises(DataError, match="from line 3 never closes"):
        read(path, Data(max_record_bytes=1024))


@pytest.mark.parametrize("filler", ["", '"[[[[[\\"[['])
def test_nesting_is_limited_outside_strings(tmp_path: Path, filler: str) -> None:
    def nested(depth: int) -> str:
        return '{"text":"t","label":"x","n":' + "[" * (depth - 1) + "]" * (depth - 1) + "}\n"

    path = tmp_path / "a.jsonl"
    strings = json.dumps({"text": "[" * 500 + filler, "label": "x"}) + "\n"
    wide = json.dumps({"text": "t", "label": "x", "n": [[1]] * 300}) + "\n"
    path.write_text(nested(64) + nested(65) + strings + wide + nested(100_000))
    assert [record.fault for record in read_records(path, DATA)] == ["", rows.TOO_DEEP, "", "", rows.TOO_DEEP]


class Endless:
    """A stream that never ends."""

    def __init__(self, block: bytes) -> None:
        self.block = block

    def read(self, size: int, /) -> bytes:
        return self.block


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_reading_begins_before_the_end_is_seen(kind: str) -> None:
    line = b'{"text":"' + b"t" * 1000 + b'","label":"x"}\n' if kind == "jsonl" else b"t" * 1000 + b",x\n"
    cut = lines.cut_lines(lines.read_blocks(Endless(line * 1000)), DATA.max_record_bytes)
    found = rows.read_jsonl(cut, "a", DATA) if kind == "jsonl" else rows.read_csv(cut, "a", "'a'", TWO)
    for column_batch in islice(found, 3):
        assert column_batch.rows * 1000 < column_batches.COLUMN_BATCH_BYTES + 2**20


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b"text,label\n")
        for _ in range(48):
            file.write(b'"' + b"some words, and more\n" * 50 + b'",x\n' + (b"t" * 1000 + b",x\n") * 1000)
    tracemalloc.start()
    try:
        (input_split,) = find_input_splits(path, DATA)
        count = sum(column_batch.rows for column_batch in read_input_split(input_split, DATA))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 48 * 1001
    assert peak < 20 * 2**20  # 48 MB unpacked


def test_line_that_never_ends_takes_no_memory() -> None:
    blocks = (b'"x' * 2**19 for _ in range(64))
    tracemalloc.start()
    try:
        (line,) = lines.cut_lines(blocks, 2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(line, lines.Long) and line.size == 2**26 and line.quotes == 2**25
    assert peak < 8 * 2**20


# --- where files are


def test_patterns(tmp_path: Path) -> None:
    for name in ["b/2.jsonl", "a/1.csv", "a/deep/3.jsonl", ".x/4.jsonl", "a/.5.jsonl", "a/notes.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text,label\nt,x\n" if name.endswith("csv") else '{"text":"t","label":"x"}')

    def matches(pattern: str) -> list[str]:
        return [input_split.source for input_split in find_input_splits(tmp_path / pattern, DATA)]

    assert matches("*/*.jsonl") == ["b/2.jsonl"]
    assert matches("**/*.jsonl") == ["a/deep/3.jsonl", "b/2.jsonl"]
    assert matches("[ab]/[12].*") == ["a/1.csv", "b/2.jsonl"]
    assert matches("a/?.csv") == ["1.csv"]
    assert [(one.text, one.file) for one in read_records(tmp_path / "[ab]/[12].*", DATA)] == [
        ("t", "a/1.csv"),
        ("t", "b/2.jsonl"),
    ]
    assert read_texts(tmp_path / "[ab]/[12].*", DATA).texts == ("t", "t")
    (tmp_path / "odd[1].jsonl").write_text('{"text":"odd","label":"x"}')
    assert matches("odd[1].jsonl") == ["odd[1].jsonl"]
    with pytest.raises(DataError, match=r"no file matches.*notes\.md"):
        find_input_splits(tmp_path / "a/*.mdx", DATA)
    with pytest.raises(DataError, match="Only folders match"):
        find_input_splits(tmp_path / "[ab]", DATA)
    with pytest.raises(DataError, match=r"a/notes\.md'.*data\.format"):
        find_input_splits(tmp_path / "a/*", DATA)
    with pytest.raises(DataError, match=r"no such file.*'1\.csv'"):
        find_input_splits(tmp_path / "a/1.cvs", DATA)


def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text":"t","label":"x"}\n')
    (input_split,) = find_input_splits(path, DATA)
    path.write_text('{"text":"t","label":"x"}\n' * 2)
    for use in (hash_input_split, lambda input_split: list(read_input_split(input_split, DATA))):
        with pytest.raises(DataError, match=r"a\.jsonl.*changed while"):
            use(input_split)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl.*no such file"):
        hash_input_split(input_split)


def test_hash_is_of_the_content(tmp_path: Path) -> None:
    def hashes(name: str, content: bytes) -> list[str]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        return [
            hash_input_split(input_split)
            for input_split in find_input_splits(tmp_path / name, DATA, input_split_bytes=20)
        ]

    for name, content in {
        "a.jsonl": b"x" * 50,
        "a.tsv": b"text\tlabel\n" + b"a\tb\n" * 20,
        "a.csv": b"text,label\na,b\n",
    }.items():
        before = hashes(name, content)
        assert hashes(f"other/{name}", content) == before
        for place in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[place] ^= 1
            assert hashes(name, bytes(changed)) != before, (name, place)
    for name, table in {
        "a": pa.table({"text": ["a"]}),
        "b": pa.table({"text": ["b"]}),
        "c": pa.table({"texts": ["a"]}),
    }.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert len({hash_input_split(find_input_splits(tmp_path / f"{name}.parquet", DATA)[0]) for name in "abc"}) == 3


def test_pieces_are_small_and_travel() -> None:
    input_split = InputSplit(
        source="a", kind="folder", location="/a", files=tuple((f"b/{n:06}.txt", 1000) for n in range(4096))
    )
    packed = pickle.dumps(input_split)
    assert len(packed) < 150_000 and pickle.loads(packed) == input_split


# --- frames


def test_frames_are_cut_without_copies() -> None:
    texts = [f"t{n}" for n in range(1000)]
    for frame in (
        pl.DataFrame({"text": texts}),
        pd.DataFrame({"text": texts}),
        pa.table({"text": texts}),
        {"text": texts},
    ):
        whole = read_frame(frame, DATA, "frame")
        cut = list(cut_column_batch(whole, 300))
        assert [column_batch.rows for column_batch in cut] == [300, 300, 300, 100]
        assert listed(cut) == listed([whole])
    column = whole_column(pa.table({"text": texts}))
    parts = [
        whole_column_of(column_batch)
        for column_batch in cut_column_batch(read_frame(pa.table({"text": column}), DATA, "frame"), 300)
    ]
    assert {part.chunk(0).buffers()[2].address for part in parts} == {column.chunk(0).buffers()[2].address}


def whole_column(table: pa.Table) -> pa.ChunkedArray:
    return table["text"]


def whole_column_of(column_batch: ColumnBatch) -> pa.ChunkedArray:
    return column_batch.columns["text"]  # type: ignore[return-value]


# --- datasets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    parts = {
        split: datasets.Dataset.from_dict(
            {"text": [f"{split}{n}" for n in range(50)], "label": [n % 2 for n in range(50)]}, features=features
        )
        for split in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_saved_dataset(saved: Path) -> None:
    expected = [(f"train{n}", ["bad", "good"][n % 2]) for n in range(50)]
    for location in (f"hf://{saved}:train", str(saved / "train"), f"hf://{saved}/train"):
        assert [(one.text, one.label) for one in read_records(location, DATA)] == expected
    pieces = find_input_splits(f"hf://{saved}:train", DATA, input_split_bytes=200)
    assert len(pieces) > 2 and pieces[0].columns == ("text", "label")
    assert [
        text
        for input_split in pieces
        for column_batch in read_input_split(input_split, DATA, ["text"])
        for text in list_values(column_batch.columns["text"])
    ] == [text.encode() for text, _ in expected]
    assert len({hash_input_split(input_split) for input_split in pieces}) == len(pieces)
    with pytest.raises(DataError, match="has splits train, test"):
        find_input_splits(saved, DATA)
    with pytest.raises(DataError, match="no split 'dev'"):
        find_input_splits(f"hf://{saved}:dev", DATA)
    for wrong in ("hf://a/b/c/d", "hf:///nowhere", "hf://"):
        with pytest.raises(DataError, match="hf://owner/name"):
            find_input_splits(wrong, DATA)


def test_dataset_of_files_and_forked_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "made").mkdir()
    (tmp_path / "made/train.jsonl").write_text("".join(f'{{"text":"t{n}","label":"x"}}\n' for n in range(30)))
    pieces = find_input_splits(f"hf://{tmp_path}/made", DATA, input_split_bytes=100)
    assert sum(input_split.stop - input_split.start for input_split in pieces) == 30
    with multiprocessing.get_context("fork").Pool(2) as pool:
        counts = pool.map(count_rows, pieces)
    assert sum(counts) == 30 and len(counts) > 1


def count_rows(input_split: InputSplit) -> int:
    return sum(column_batch.rows for column_batch in read_input_split(input_split, DATA))


def test_dataset_that_is_saved_again_is_read_again(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pieces = []
    for text in "ab":
        datasets.Dataset.from_dict({"text": [text], "label": ["x"]}).save_to_disk(tmp_path / "one")
        pieces += find_input_splits(tmp_path / "one", DATA)
        assert [record.text for record in read_records(tmp_path / "one", DATA)] == [text]
    assert hash_input_split(pieces[0]) != hash_input_split(pieces[1])
    with pytest.raises(DataError, match="changed while it was read"):
        list(read_input_split(pieces[0], DATA))
