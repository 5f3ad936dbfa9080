"""What must hold of every input, however damaged: the checks that `fuzz.py` and tests/pure/test_fuzz.py repeat.

A check is a function of the input's bytes and an empty folder. It returns in silence, or raises what it found: an
AssertionError where something does not hold, any other exception where reading or screening let it through. A
UserError is no finding: it is how input is refused.

The first byte of an input chooses piece size, settings and rules (see `Choice`); the others are the file, the files of
a folder, or texts. Owns what is checked; inputs come from `fuzz_inputs.py`, time limits and reports from `fuzz.py`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from fuzz_tables import build_parquet

from unisono.config.sections import Data, Screen
from unisono.data.ingest import compressed, folders, lines
from unisono.data.ingest import delimited as rows
from unisono.data.ingest import parquet as tables
from unisono.data.ingest.column_batch import ColumnBatch
from unisono.data.ingest.dialects import find_dialect
from unisono.data.ingest.input_splits import find_input_splits, hash_input_split, read_input_split
from unisono.data.ingest.read import Record, read_texts, take_records
from unisono.data.ingest.staging import StagedRecords, stage
from unisono.data.screening.decisions import Decisions, load_records
from unisono.data.screening.rules import Examiner, mask_cards, mask_mail, mask_phones
from unisono.data.screening.screen import SPLITS, screen
from unisono.data.write import FORMATS, write_table
from unisono.errors import DataError, UserError

Result = TypeVar("Result")

INPUT_SPLIT_BYTES = (1, 7, 64, 4_096)
MOST_PIECES = 24
NAMED = ("label", "text")
DATA = (
    Data(max_record_bytes=1_024, max_depth=4, encoding="utf-8"),
    Data(max_record_bytes=1_024, max_depth=4, header_lines=0, columns=NAMED, encoding="utf-8"),
    Data(max_record_bytes=1_024, max_depth=4, header_lines=2),
)
EVERY = {
    "min_characters": 2,
    "max_characters": 5_000,
    "scripts": ("Latin", "Han"),
    "repeated_lines_share": 0.3,
    "near_duplicates": "refuse",
    "contradicted": "refuse",
    "contradicted_neighbours": 1,
}
MASKS = dict.fromkeys(("mail", "card", "phone"), "mask")
SCREENS = (
    Screen(mojibake="mend", invisible="strip", **MASKS, **EVERY),
    Screen(mojibake="refuse", invisible="refuse", **dict.fromkeys(MASKS, "refuse"), **EVERY),
    Screen(**MASKS, near_duplicates="refuse"),
    Screen(),
)
PLAIN = ("jsonl", "csv", "tsv")
FREE_BYTES = 2**16
"""From here on the limit on expansion holds, so that a small input can break it."""


def unpack(content: bytes, begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> bytes:
    """All members of a file at once, with zeros between and behind them. Raises what is wrong with one."""
    found = []
    while content:
        member = begin()
        found.append(member.decompress(content))
        assert member.eof, "a member is cut off"
        content = member.unused_data.lstrip(b"\0")
    return b"".join(found)


UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.decompress,
    "bz2": partial(unpack, begin=bz2.BZ2Decompressor),
    "xz": partial(unpack, begin=lzma.LZMADecompressor),
}


class Choice:
    """What the first byte of an input chooses."""

    def __init__(self, content: bytes) -> None:
        first = content[0] if content else 0
        self.rest = content[1:]
        self.number = first
        self.input_split_bytes = max(INPUT_SPLIT_BYTES[first & 3], len(content) // MOST_PIECES)
        self.data = DATA[(first >> 2) % len(DATA)]
        self.screen = SCREENS[(first >> 4) & 3]
        self.suffix = FORMATS[first >> 6]


@contextmanager
def tiny_sizes() -> Iterator[None]:
    """Column batches of three rows, blocks of 100 bytes: every border is met by small inputs."""
    sizes = [
        (rows, "COLUMN_BATCH_ROWS", 3),
        (rows, "COLUMN_BATCH_BYTES", 64),
        (rows, "COLUMN_BATCH_CELLS", 12),
        (tables, "COLUMN_BATCH_ROWS", 3),
    ]
    sizes += [
        (tables, "COLUMN_BATCH_BYTES", 64),
        (folders, "COLUMN_BATCH_BYTES", 64),
        (folders, "INPUT_SPLIT_FILES", 2),
    ]
    patches = [patch.object(module, name, size) for module, name, size in [*sizes, (lines, "BLOCK_BYTES", 100)]]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def check_file(content: bytes, folder: Path, kind: str) -> None:
    """A text file, or a Parquet file as it stands."""
    choice = Choice(content)
    path = folder / f"it.{kind}"
    path.write_bytes(choice.rest)
    if kind == "tsv" and choice.number & 64:
        choice.data = choice.data.model_copy(update={"quote": "none", "encoding": "utf-8"})
    found = check_reading(path, choice, folder)
    dialect = find_dialect(choice.rest, True, kind, kind, choice.data)
    if dialect.document or dialect.encoding != "utf-8" or (kind == "tsv" and dialect.quote):
        return  # rows are no lines
    small = len(choice.rest) <= choice.data.max_record_bytes  # a row of CSV that is too large ends in a way of its own
    if kind in PLAIN and (small or kind != "csv"):
        assert len(found) == count_rows(choice.rest, kind, choice.data), "rows were lost"


def check_compressed(content: bytes, folder: Path, packing: str) -> None:
    """A compressed text file: what comes out is what the standard library unpacks."""
    choice = Choice(content)
    kind = PLAIN[choice.number % len(PLAIN)]
    path = folder / f"it.{kind}.{packing}"
    path.write_bytes(choice.rest)
    with patch.object(compressed, "FREE_BYTES", FREE_BYTES):
        found = check_reading(path, choice, folder)
    if packing in UNPACK:
        plain = folder / f"it.{kind}"
        plain.write_bytes(UNPACK[packing](choice.rest))
        assert [replace(one, file=path.name) for one in read_all(plain, choice.data, 2**24)] == found


def check_parquet(content: bytes, folder: Path) -> None:
    """Half of the inputs are a file as they stand, the others say what a valid file holds: types, values, groups."""
    if content and content[0] & 0b100:
        content = content[:1] + build_parquet(content[1:])
    check_file(content, folder, "parquet")


def check_folder(content: bytes, folder: Path) -> None:
    r"""A folder of files: name, \x1f, content, and \x1e between files. A content that begins with -> is a link."""
    choice = Choice(content)
    root = folder / "root"
    root.mkdir()
    files = links = 0
    for entry in choice.rest.split(b"\x1e"):
        name, _, inside = entry.partition(b"\x1f")
        parts = [part[:200] for part in name.replace(b"\0", b"").split(b"/") if part not in (b"", b".", b"..")]
        path = root.joinpath(*map(os.fsdecode, parts))
        with suppress(OSError):  # a name that the file system refuses, or one that is there already
            path.parent.mkdir(parents=True, exist_ok=True)
            if inside.startswith(b"->"):
                path.symlink_to(root.joinpath(os.fsdecode(inside[2:].replace(b"\0", b"").lstrip(b"/"))))
                links += 1
            elif parts and not path.exists():
                path.write_bytes(inside)
                files += not any(part.startswith(b".") for part in parts)
    found = check_reading(root, choice, folder)
    assert links or len(found) == files, f"{files} files, {len(found)} records"


def check_reading(location: Path, choice: Choice, folder: Path) -> list[Record]:
    """Rows are the same whatever the pieces, and all of them come out of screening; returns them.

    Raises:
        DataError: the input is refused, however it is read.
    """
    data = choice.data
    found = try_to(lambda: read_all(location, data, 2**24))
    with tiny_sizes():
        again = try_to(lambda: read_all(location, data, choice.input_split_bytes))
        refused = isinstance(again, str) and isinstance(found, str)  # of a damaged file, for what is met first
        assert again == found or refused, "pieces change what is read"
        texts = try_to(lambda: read_texts(location, data))
        if not isinstance(texts, str):
            assert isinstance(found, list), "prediction reads what training does not"
            assert list(texts.texts) == [record.text for record in found]
            assert len(texts.faults) == texts.table.num_rows == len(found)
            texts.table.validate(full=True)
            write_table(texts.table, folder / "written", choice.suffix)
        if isinstance(found, str):
            raise DataError(found)
        inputs = find_input_splits(
            location, data, input_split_bytes=max(choice.input_split_bytes, len(choice.rest) // 2)
        )
        assert all(len(hash_input_split(input_split)) == 64 for input_split in inputs)
        column_batches = [
            (input_split.source, read_input_split(input_split, data, (*data.texts, data.label)))
            for input_split in inputs
        ]
        splits = [SPLITS[number % 3 if choice.number & 1 else 0] for number in range(len(inputs))]
        check_screening(column_batches, splits, found, data, choice.screen, folder)
    return found


def read_all(location: Path, data: Data, input_split_bytes: int) -> list[Record]:
    """Every row of a location as a record; each of them stands in its own place."""
    found: list[Record] = []
    source, row = None, 1
    for input_split in find_input_splits(location, data, input_split_bytes=input_split_bytes):
        for column_batch in read_input_split(input_split, data):
            assert column_batch.rows and all(
                len(column) == column_batch.rows for column in column_batch.columns.values()
            )
            source, row = column_batch.name, row if column_batch.name == source else 1
            records = list(take_records(column_batch, data, first_row=row, lenient=True))
            assert len(records) == column_batch.rows, "a row became no record"
            assert [record.row for record in records] == list(range(row, row + column_batch.rows))
            row += column_batch.rows
            found += records
    for record in found:
        record.text.encode()
        (record.label or "").encode()
        assert record.label is None or record.label.strip() == record.label != ""
    return found


def check_screening(
    column_batches: Sequence[tuple[str, Iterable[ColumnBatch]]],
    splits: Sequence[str],
    given: Sequence[Record],
    data: Data,
    rules: Screen,
    folder: Path,
) -> Decisions:
    """Every record is kept or has a reason, nothing that is to be masked is left, and what is written is UTF-8."""
    examiner = Examiner(rules, data.labels)
    paths = [folder / f"staged-{number}" for number in range(len(column_batches))]
    near = "refuse" in (rules.near_duplicates, rules.contradicted)
    for path, (name, some) in zip(paths, column_batches, strict=True):
        stage(path, some, name, data, examiner, place=True, near=near)
    staged = [StagedRecords(path) for path in paths]
    texts, reasons = [], []
    for one in staged:
        for number, count in enumerate(one.facts.batches):
            batch = one.batch(number)
            batch.validate(full=True)
            assert batch.num_rows == count
            texts += batch.column("text").to_pylist()
            reasons += batch.column("reason").to_pylist()
    examined = [examiner.examine(record) for record in given]
    assert texts == [record.text for record, _ in examined], "other texts are screened than were read"
    assert reasons == [reason or None for _, reason in examined]
    assert all(reason or record.label is not None for record, reason in examined), "kept without a class"
    for text in texts:
        check_masked(text, rules)
    records, classes = load_records(staged, splits, cut=True, near_ones=near)
    screen(records, rules, sorted(set(splits)), validation=0.2, test=0.1)
    decided = Decisions(staged, splits, records, classes)
    set_aside = list(decided.list_quarantined())
    kept = sum(decided.count_kept(split) for split in SPLITS)
    assert kept + len(set_aside) == len(given), "a record was lost"
    assert len(set_aside) == sum(sum(reasons.values()) for reasons in decided.counts.values())
    for line in set_aside:
        assert line["reason"], "set aside without a reason"
        json.dumps(line, ensure_ascii=False).encode()
    return decided


def check_masked(text: str, rules: Screen) -> None:
    """Nothing is left to mask."""
    text.encode()
    for setting, mask in ((rules.mail, mask_mail), (rules.card, mask_cards), (rules.phone, mask_phones)):
        assert setting != "mask" or mask(text) == text, f"left to mask by {mask.__name__}: {text!r}"


def count_rows(content: bytes, kind: str, data: Data) -> int:
    """How many rows a text file has, found in another way than the readers do."""
    parts = content.removeprefix(lines.MARK).split(b"\n")
    texts = [part.removesuffix(b"\r").decode("utf-8", "surrogateescape") for part in parts]
    if kind == "jsonl":
        return sum(bool(text) and not text.isspace() for text in texts)
    if kind == "tsv":
        return sum(bool(text) for text in texts[data.header_lines :])
    whole, count = iter([*(f"{text}\n" for text in texts[:-1]), *texts[-1:]]), -data.header_lines
    reader = csv.reader(whole, strict=True)
    while True:
        try:
            count += bool(next(reader)) or count < 0
        except StopIteration:
            return count
        except csv.Error:
            count += 1


def try_to(do: Callable[[], Result]) -> Result | str:
    """Return what it returns, or the message with which the input is refused."""
    try:
        return do()
    except UserError as error:
        return str(error)
