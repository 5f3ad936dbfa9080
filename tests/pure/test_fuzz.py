"""What fuzzing checks for minutes, checked for seconds, on the same inputs every time; and what fuzzing has found."""

from __future__ import annotations

import json
import multiprocessing
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "data"))
import fuzz_inputs
import fuzz_run

from unisono.config.sections import Data
from unisono.data.ingest.input_splits import find_input_splits, read_input_split
from unisono.data.ingest.read import read_records, read_texts
from unisono.data.write import write_table
from unisono.errors import DataError

DATA = Data()
few = settings(max_examples=25, derandomize=True, database=None, deadline=None)
PLAIN = ("jsonl", "csv", "tsv", "folder", "screen", "review")


def words(target: str) -> list[bytes]:
    kind = fuzz_inputs.DICTIONARIES.get(target, target)
    return [*fuzz_inputs.WORDS[kind].split(b"|"), *(seed[1:200] for seed in fuzz_inputs.list_seeds(target)[1::12])]


def contents(target: str) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(words(target)) | st.binary(max_size=8), max_size=24).map(b"".join)


first_bytes = st.integers(0, 255).map(lambda number: bytes([number]))


@pytest.mark.parametrize("target", fuzz_inputs.TARGETS)
def test_seeds(target: str) -> None:
    for seed in fuzz_inputs.list_seeds(target)[::3]:
        fuzz_run.run_check(target, seed)


@pytest.mark.parametrize("target", PLAIN)
@few
@given(st.data())
def test_any_words_in_any_order(target: str, data: st.DataObject) -> None:
    fuzz_run.run_check(target, data.draw(first_bytes) + data.draw(contents(target)))


@pytest.mark.parametrize("target", fuzz_inputs.PACKED)
@few
@given(st.data())
def test_packed_and_damaged(target: str, data: st.DataObject) -> None:
    packed = fuzz_inputs.pack(data.draw(contents("jsonl")), target, data.draw(st.integers(0, 30)))
    place, byte = data.draw(st.integers(0, len(packed))), data.draw(st.binary(max_size=2))
    for content in (packed, packed[:place] + byte + packed[place + 1 :], packed[:place], packed + byte):
        fuzz_run.run_check(target, data.draw(first_bytes) + content)


@few
@given(first_bytes, st.binary(max_size=200))
def test_tables_of_any_values(first: bytes, content: bytes) -> None:
    fuzz_run.run_check("parquet", bytes([first[0] | 4]) + content)


# --- what fuzzing has found


def test_names_of_columns_that_are_not_utf8_are_spelt_out(tmp_path: Path) -> None:
    path = tmp_path / "it.jsonl"
    path.write_text('{"text": "a", "\\ud800": 1}\n')
    assert read_texts(path, DATA).table.column_names == ["text", r"\ud800"]
    path.write_text('{"text": "a", "\\ud800": 1, "\\\\ud800": 2}\n')
    with pytest.raises(DataError, match="two columns"):
        read_texts(path, DATA)


def test_names_of_files_that_are_not_utf8_are_spelt_out(tmp_path: Path) -> None:
    place = tmp_path / "a" / "\udcff.txt"
    place.parent.mkdir()
    place.write_text("a text")
    (record,) = read_records(tmp_path, DATA)
    assert (record.file, record.text, record.label) == (r"a/\xff.txt", "a text", "a")
    fuzz_run.run_check("folder", b"\0a/\xff\x1fa text")


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1], pa.date32()),
        pa.array([2**62], pa.timestamp("us", "UTC")),
        pa.array([0], pa.timestamp("us", "Nowhere/There")),
        pa.ListArray.from_arrays([0, 1], NOT_UTF8),
        pa.StructArray.from_arrays([NOT_UTF8], names=["a"]),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_values_that_python_has_none_for_are_no_texts(tmp_path: Path, column: pa.Array, suffix: str) -> None:
    path = tmp_path / "it.parquet"
    pq.write_table(pa.table({"text": column, "label": ["a"]}), path)
    (record,) = read_records(path, DATA)
    assert record.fault == "not a text"
    write_table(read_texts(path, DATA).table, tmp_path / "out", suffix)


def test_bytes_and_times_are_written_as_text(tmp_path: Path) -> None:
    table = pa.table({"bytes": [b"a\xff"], "time": pa.array([0], pa.timestamp("s")), "text": NOT_UTF8})
    write_table(table, tmp_path / "out", ".jsonl")
    written = json.loads((tmp_path / "out").read_text())
    assert written == {"bytes": r"a\xff", "time": "1970-01-01 00:00:00", "text": r"\xff"}
    write_table(table, tmp_path / "out", ".csv")
    assert (tmp_path / "out").read_text() == "bytes,time,text\na\\xff,1970-01-01 00:00:00,\\xff\n"


def test_texts_of_parquet_that_are_not_utf8_are_mended_in_the_table(tmp_path: Path) -> None:
    path = tmp_path / "it.parquet"
    pq.write_table(pa.table({"text": NOT_UTF8}), path)
    assert read_texts(path, DATA).table.column("text").to_pylist() == [r"\xff"]


@pytest.mark.parametrize("packing", fuzz_inputs.PACKED)
def test_a_damaged_member_is_not_lost_in_silence(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"it.jsonl.{packing}"
    one, two = (fuzz_inputs.pack(b'{"text": "%d", "label": "a"}\n' % number, packing, 0) for number in (1, 2))
    path.write_bytes(one + two)
    assert [record.text for record in read_records(path, DATA)] == ["1", "2"]
    for damaged in (b"x" + two[1:], two[:1] + b"x" + two[2:], two[:-1], b"rubbish"):
        path.write_bytes(one + damaged)
        with pytest.raises(DataError, match=r"damaged|cut off"):
            read_records(path, DATA)


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_zeros_may_stand_behind_members(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"it.jsonl.{packing}"
    one = fuzz_inputs.pack(b'{"text": "1", "label": "a"}\n', packing, 0)
    path.write_bytes(one + bytes(20_000) + one + bytes(8))
    assert len(read_records(path, DATA)) == 2


def test_no_byte_of_a_footer_loses_rows_or_ends_the_process(tmp_path: Path) -> None:
    """pyarrow ends the process, or reads none of a group, where some facts of a column are damaged."""
    path = tmp_path / "it.parquet"
    pq.write_table(
        pa.table({"text": list("abcde"), "label": list("xyxyx")}), path, row_group_size=2, store_schema=False
    )
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")

    def damage_each() -> None:
        read = 0
        for place in range(footer, len(whole) - 8):
            for byte in (whole[place] ^ 1, whole[place] ^ 2, whole[place] ^ 16):
                path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
                with suppress(DataError):
                    column_batches = [
                        column_batch
                        for input_split in find_input_splits(path, DATA)
                        for column_batch in read_input_split(input_split, DATA)
                    ]
                    assert sum(column_batch.rows for column_batch in column_batches) == 5, f"byte {place} = {byte}"
                    read += 1
        assert read > 0, "some bytes do not matter"

    process = multiprocessing.get_context("fork").Process(target=damage_each)
    process.start()
    process.join()
    assert process.exitcode == 0
