"""Input splits: parts of a source that are fixed by its bytes, never by the number of workers.

Owns what a recipe's location means, how it is cut, and how an input split is read and hashed. Each place has a module
of its own (`locations.py`, `hub.py`), and so has each format (`delimited.py`, `parquet.py`).

Lines (JSONL, fields without quotes) are cut by bytes: a line belongs to the input split in which its first byte lies.
Parquet is cut by row groups, folders by files, datasets by rows. A file in which a newline may end no record (CSV with
quotes, a JSON document), in another encoding than UTF-8, or compressed, is one input split, read as a stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from unisono.config.sections import Data
from unisono.data.ingest import delimited as rows
from unisono.data.ingest import folders, hub, locations
from unisono.data.ingest import parquet as tables
from unisono.data.ingest.column_batch import ColumnBatch, FieldFault, join_column_batches
from unisono.data.ingest.compressed import Unpacked, find_compression
from unisono.data.ingest.dialects import Dialect, check_utf8, find_dialect, take_head, transcode
from unisono.data.ingest.formats import Format, find_suffix_format
from unisono.data.ingest.lines import (
    MARK,
    Long,
    Stream,
    count_lines,
    cut_lines,
    escape,
    own_blocks,
    read_blocks,
    strip_mark,
)
from unisono.data.ingest.locations import SourceFile, explain, hide_secrets, open_file, tell
from unisono.errors import DataError

INPUT_SPLIT_BYTES = 8 * 2**20
PLAIN = Dialect()


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSplit:
    """What one task reads: a part of a source, fixed by its bytes, never by workers. Small and picklable."""

    source: str
    """The file's name in messages and in quarantine.jsonl; input splits of one source follow each other."""
    kind: Format
    location: str
    """Absolute path or URL of the file, folder or dataset."""
    start: int = 0
    stop: int = 0
    """Bytes [start, stop) of the file, or rows of a dataset. A stream is read from its beginning to its end."""
    first: bool = True
    """Lines: whether a line begins at `start`."""
    stream: bool = False
    compression: str = ""
    columns: tuple[str, ...] = ()
    """The columns' names, where they are known before reading: cut lines, Parquet, datasets."""
    dialect: Dialect = PLAIN
    """Cut lines: how they are written. A stream shows it when it is read."""
    wanted: tuple[str, ...] = ()
    """Streams: the columns that are needed, by which a delimiter is known; none: the text and the class."""
    notes: tuple[str, ...] = ()
    """What a user should know about the source; with its first input split."""
    groups: tuple[int, int] = (0, 0)
    """Parquet: row groups [first, last)."""
    files: tuple[tuple[str, int], ...] = ()
    """Folder: names of files within `location`, and their sizes."""
    version: str = ""
    """The file's version when it was found (local: size and time of change); a dataset's fingerprint."""
    digest: str = ""
    """Parquet: SHA-256 of the footer."""
    ranged: bool = True

    @property
    def remote(self) -> bool:
        """Whether its bytes lie behind a URL."""
        return locations.is_url(self.location) and not hub.is_dataset(self.location)


def find_input_splits(
    location: str | Path, data: Data, wanted: Sequence[str] = (), *, input_split_bytes: int = INPUT_SPLIT_BYTES
) -> list[InputSplit]:
    """Cut what a location names (a path, folder, pattern, URL or dataset) into input splits, in order.

    Reads lists and sizes, the header of TSV and the footer of Parquet. An empty list, or input splits without a row,
    mean a source without records. `wanted`: see `InputSplit`.

    Raises:
        DataError: there is nothing, its format is unknown, or its header is not what the recipe says.
    """
    location = str(location)
    location = location.removeprefix("file://") if location.startswith("file:///") else location
    if "\0" in location:
        raise DataError(f"{location!r}: a zero character is in it, so it is no path. Give another one.")
    with explain(location):
        return _find_input_splits(location, data, tuple(wanted), input_split_bytes)


def _find_input_splits(location: str, data: Data, wanted: tuple[str, ...], input_split_bytes: int) -> list[InputSplit]:
    if hub.is_dataset(location):
        return _cut_dataset(location, input_split_bytes)
    told, note = tell(location), ""
    if locations.is_folder(location):
        inside = locations.list_folder(location)
        files, note = folders.find_parts(inside, told, data)
        if not files:
            return _cut_folder(location, inside, input_split_bytes)
    else:
        files = locations.find_files(location)
        if locations.is_pattern(location):
            files, note = folders.leave_out(files, told)
    pieces = [input_split for file in files for input_split in _cut_file(file, data, wanted, input_split_bytes)]
    return [replace(pieces[0], notes=(note, *pieces[0].notes)), *pieces[1:]] if pieces and note else pieces


def read_input_split(
    input_split: InputSplit, data: Data, columns: Sequence[str] | None = None
) -> Iterator[ColumnBatch]:
    """Column batches of bounded size with an input split's rows, each row once, in order.

    Args:
        columns: read only these, where they exist; None: all.

    Raises:
        DataError: the file no longer exists, is damaged or unreadable, or has changed since it was cut.
    """
    if input_split.kind == "dataset":
        numbers = range(input_split.start, input_split.stop)
        yield from hub.read_dataset(
            input_split.location, input_split.source, numbers, input_split.version, data, columns
        )
    elif input_split.kind == "folder":
        yield from folders.read_folder(input_split.location, input_split.source, input_split.files, data)
    else:
        _refuse_change(input_split)
        told = tell(input_split.location)
        with _open_content(input_split, data) as file:
            if input_split.kind == "parquet":
                yield from tables.read_parquet(
                    file, input_split.source, told, data, range(*input_split.groups), columns
                )
            elif input_split.stream:
                yield from _read_stream(input_split, file, told, data)
            else:
                yield from _read_lines(input_split, file, told, data)


@contextmanager
def _open_content(input_split: InputSplit, data: Data) -> Iterator[Any]:
    """The file of an input split, unpacked if it is compressed."""
    with open_file(input_split.location, ranged=input_split.ranged) as file:
        packed = input_split.compression
        yield Unpacked(file, packed, tell(input_split.location), data.max_expansion) if packed else file


def list_files(input_split: InputSplit) -> list[str]:
    """The files that an input split is read from."""
    place = input_split.location.rstrip("/")
    return [f"{place}/{name}" for name, _ in input_split.files] if input_split.kind == "folder" else [place]


def hash_input_split(input_split: InputSplit) -> str:
    """SHA-256 that identifies an input split's content: kind, columns, and bytes.

    For a remote file, the store's own version (ETag …) is hashed instead of the bytes, where the store has one; for a
    dataset, its fingerprint. Names are no part of it, except those of files in a folder.

    Raises:
        DataError: a file no longer exists, is unreadable, or has changed since it was cut.
    """
    facts = [
        input_split.kind,
        input_split.columns,
        input_split.compression,
        input_split.groups,
        input_split.files,
        input_split.digest,
    ]
    result = hashlib.sha256(json.dumps(facts).encode())
    if input_split.kind == "dataset" or (input_split.remote and input_split.version):
        result.update(json.dumps([input_split.version, input_split.start, input_split.stop]).encode())
    elif input_split.kind == "folder":
        for name, size in input_split.files:
            with open_file(f"{input_split.location.rstrip('/')}/{name}") as file:
                result.update(hash_stream(file, size).encode())
    else:
        _refuse_change(input_split)
        with open_file(input_split.location, ranged=input_split.ranged) as file:
            if not input_split.stream:
                file.seek(input_split.start)
            result.update(
                hash_stream(file, None if input_split.stream else input_split.stop - input_split.start).encode()
            )
    return result.hexdigest()


def hash_stream(file: Stream, size: int | None) -> str:
    """SHA-256 of the next `size` bytes, or of all that follow."""
    result = hashlib.sha256()
    while (left := 2**20 if size is None else min(2**20, size)) and (block := file.read(left)):
        result.update(block)
        size = None if size is None else size - len(block)
    return result.hexdigest()


def read_file(location: str | Path, data: Data, wanted: Sequence[str] = ()) -> ColumnBatch:
    """Read all of a location, as one column batch. `wanted`: see `InputSplit`.

    Raises:
        DataError: it is missing, unreadable, empty or damaged, or its header is not what the recipe says.
    """
    column_batches = [
        column_batch
        for input_split in find_input_splits(location, data, wanted)
        for column_batch in read_input_split(input_split, data)
    ]
    if not column_batches:
        raise DataError(f"{tell(str(location))}: there is no record in it. Give a file with at least one.")
    return join_column_batches(column_batches, column_batches[0].name)


def _refuse_change(input_split: InputSplit) -> None:
    if input_split.version:
        with explain(input_split.location):
            if locations.find_version(input_split.location) != input_split.version:
                raise DataError(
                    f"{tell(input_split.location)}: changed while it was read. Start again when it is complete."
                )


def _cut_file(file: SourceFile, data: Data, wanted: tuple[str, ...], input_split_bytes: int) -> list[InputSplit]:
    name, told = escape(file.name), tell(file.location)
    inner, compression = find_compression(hide_secrets(file.location).rpartition("/")[2])
    kind = find_suffix_format(inner, told, data)
    if compression and kind == "parquet":
        raise DataError(
            f"{told}: Parquet is compressed in itself, and cannot be read through {compression}. Unpack it."
        )
    whole = InputSplit(
        source=name,
        kind=kind,
        location=file.location,
        stop=file.size,
        stream=True,
        compression=compression,
        version=file.version,
        ranged=file.ranged,
        wanted=wanted,
    )
    if kind == "parquet":
        return _cut_parquet(whole, told, input_split_bytes)
    if compression or not file.ranged:
        return [whole]
    with open_file(whole.location) as stream:
        head, all_of_it, _ = take_head(stream)
        dialect = find_dialect(head, all_of_it, kind, told, data, wanted)
        whole = replace(whole, notes=(dialect.note,) if dialect.note else ())
        if dialect.streamed:
            return [whole]
        stream.seek(0)
        return _cut_lines(whole, stream, told, data, dialect, input_split_bytes)


def _cut_lines(
    whole: InputSplit, file: BinaryIO, told: str, data: Data, dialect: Dialect, input_split_bytes: int
) -> list[InputSplit]:
    """Cut a text file by bytes, after its byte-order mark and its header."""
    columns: list[str] = []
    start = len(MARK) if file.read(len(MARK)) == MARK else 0
    if whole.kind != "jsonl":
        file.seek(start)
        lines = cut_lines(read_blocks(file), data.max_record_bytes)
        header, start = _take_header(lines, start, data.header_lines, dialect)
        columns = rows.read_header(header, told, data)
    return [
        replace(
            whole,
            stream=False,
            start=begin,
            stop=min(begin + input_split_bytes, whole.stop),
            first=number == 0,
            columns=tuple(columns),
            dialect=dialect,
            notes=() if number else whole.notes,
        )
        for number, begin in enumerate(range(start, whole.stop, input_split_bytes))
    ]


def _take_header(
    lines: Iterator[bytes | Long], start: int, count: int, dialect: Dialect
) -> tuple[list[list[str] | FieldFault], int]:
    """Return the first `count` lines that are no comments as fields, and the byte at which the next line begins."""
    header: list[list[str] | FieldFault] = []
    ahead = int(dialect.separator_line)
    while (ahead or len(header) < count) and (line := next(lines, None)) is not None:
        start += (line.size if isinstance(line, Long) else len(line)) + 1
        header += [] if ahead else [row for row, _ in rows.cut_plain([line], dialect)]
        ahead = 0
    return header, start


def _read_lines(input_split: InputSplit, file: BinaryIO, told: str, data: Data) -> Iterator[ColumnBatch]:
    """Read the lines of an input split that is cut by bytes."""
    blocks = own_blocks(file, input_split.start, input_split.stop, first=input_split.first)
    if not input_split.dialect.utf8_seen:
        blocks = check_utf8(blocks, told, partial(_count_lines, input_split, data))
    lines = cut_lines(blocks, data.max_record_bytes)
    if input_split.kind == "jsonl":
        yield from rows.read_jsonl(lines, input_split.source, data)
    else:
        yield from rows.read_plain(lines, input_split.source, input_split.columns, input_split.dialect)


def _count_lines(input_split: InputSplit, data: Data, offset: int) -> int:
    """The lines of the file that end before the byte `offset` of what is read of it."""
    start, first = input_split.start, input_split.first
    with _open_content(input_split, data) as stream:
        if input_split.stream:
            return count_lines(read_blocks(stream), offset)
        before = count_lines(read_blocks(stream), start - 1 + first) + 1 - first
        return before + count_lines(own_blocks(stream, start, input_split.stop, first=first), offset)


def _cut_parquet(whole: InputSplit, told: str, input_split_bytes: int) -> list[InputSplit]:
    with open_file(whole.location, ranged=whole.ranged) as file:
        footer = tables.read_footer(file, told, input_split_bytes)
    return [
        replace(
            whole,
            stream=False,
            start=groups.start,
            stop=groups.stop,
            columns=footer.columns,
            groups=(groups.first, groups.last),
            digest=footer.sha256,
        )
        for groups in footer.groups
    ]


def _cut_folder(location: str, files: Sequence[SourceFile], input_split_bytes: int) -> list[InputSplit]:
    """Put the files of a folder into groups by their sizes."""
    name = escape(hide_secrets(location).rstrip("/").rpartition("/")[2])
    return [
        InputSplit(source=name, kind="folder", location=location, stop=sum(size for _, size in group), files=group)
        for group in folders.group_files(files, input_split_bytes)
    ]


def _cut_dataset(location: str, input_split_bytes: int) -> list[InputSplit]:
    count, size, fingerprint, columns = hub.measure_dataset(location)
    step = max(1, count * input_split_bytes // max(size, 1))
    name = location.rstrip("/").rpartition("/")[2]
    return [
        InputSplit(
            source=name,
            kind="dataset",
            location=location,
            start=start,
            stop=min(start + step, count),
            columns=columns,
            version=fingerprint,
        )
        for start in range(0, count, step)
    ]


def _read_stream(input_split: InputSplit, stream: Stream, told: str, data: Data) -> Iterator[ColumnBatch]:
    """Read a file from its beginning to its end: byte-order mark, header, rows."""
    kind, name = input_split.kind, input_split.source
    head, whole, blocks = take_head(stream)
    dialect = find_dialect(head, whole, kind, told, data, input_split.wanted)
    if dialect.encoding != "utf-8":
        blocks = transcode(blocks, dialect.encoding, told)
    elif not dialect.utf8_seen:
        blocks = check_utf8(blocks, told, partial(_count_lines, input_split, data))
    blocks = strip_mark(blocks)
    if dialect.document:
        yield from rows.read_document(blocks, name, told, data)
        return
    lines = cut_lines(blocks, data.max_record_bytes, (dialect.quote or '"').encode())
    if kind == "jsonl":
        yield from rows.read_jsonl(lines, name, data)
    else:
        yield from rows.read_csv(lines, name, told, data, dialect)
