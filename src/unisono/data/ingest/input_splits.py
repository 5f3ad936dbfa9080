"""Input splits: parts of a source that are fixed by its bytes, never by the number of workers.

Owns what a recipe's location means, how it is cut, and how an input split is read and hashed. Each place has a module
of its own (`locations.py`, `hub.py`), and so has each format (`delimited.py`, `parquet.py`).

Lines (JSONL, TSV) are cut by bytes: a line belongs to the input split in which its first byte lies. Parquet is cut by
row groups, folders by files, datasets by rows. A CSV file (in which a quoted newline ends no row) and a compressed
file are one input split each, read as a stream.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from unisono.config.sections import Data
from unisono.config.wording import hide_secrets
from unisono.data.ingest import delimited as rows
from unisono.data.ingest import hub, locations
from unisono.data.ingest import parquet as tables
from unisono.data.ingest.column_batch import COLUMN_BATCH_BYTES, Column, ColumnBatch, FieldFault, join_column_batches
from unisono.data.ingest.compressed import Unpacked, find_compression
from unisono.data.ingest.formats import Format, find_suffix_format
from unisono.data.ingest.lines import (
    MARK,
    Long,
    Stream,
    cut_lines,
    decode_file,
    decode_head,
    escape,
    own_blocks,
    read_blocks,
    refuse_utf16,
    strip_mark,
)
from unisono.data.ingest.locations import SourceFile, explain, open_file, tell
from unisono.errors import DataError

INPUT_SPLIT_BYTES = 8 * 2**20
INPUT_SPLIT_FILES = 4_096
LEADS_OUT = -1
LINK = "a link out of the folder (see data.follow_links)"


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
    """The columns' names, where they are known before reading: TSV, Parquet, datasets."""
    groups: tuple[int, int] = (0, 0)
    """Parquet: row groups [first, last)."""
    files: tuple[tuple[str, int], ...] = ()
    """Folder: names of files within `location`, and their sizes; LEADS_OUT of a link that is not followed."""
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
    location: str | Path, data: Data, *, input_split_bytes: int = INPUT_SPLIT_BYTES
) -> list[InputSplit]:
    """Cut what a location names (a path, folder, pattern, URL or dataset) into input splits, in order.

    Reads lists and sizes, the header of TSV and the footer of Parquet. An empty list, or input splits without a row,
    mean a source without records.

    Raises:
        DataError: there is nothing, its format is unknown, or its header is not what the recipe says.
    """
    location = str(location)
    location = location.removeprefix("file://") if location.startswith("file:///") else location
    if hub.is_dataset(location):
        return _cut_dataset(location, input_split_bytes)
    if locations.is_folder(location):
        return _cut_folder(location, data, input_split_bytes)
    return [
        input_split
        for file in locations.find_files(location)
        for input_split in _cut_file(file, data, input_split_bytes)
    ]


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
        yield from _read_folder(input_split, data)
    else:
        _refuse_change(input_split)
        with open_file(input_split.location, ranged=input_split.ranged) as file:
            told = tell(input_split.location)
            if input_split.kind == "parquet":
                yield from tables.read_parquet(
                    file, input_split.source, told, data, range(*input_split.groups), columns
                )
            elif input_split.stream:
                packed = input_split.compression
                stream = Unpacked(file, packed, told, data.max_expansion) if packed else file
                yield from _read_stream(input_split, stream, told, data)
            else:
                blocks = own_blocks(file, input_split.start, input_split.stop, first=input_split.first)
                lines = cut_lines(blocks, data.max_record_bytes)
                if input_split.kind == "jsonl":
                    yield from rows.read_jsonl(lines, input_split.source, data)
                else:
                    yield from rows.read_tsv(lines, input_split.source, input_split.columns)


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
            if size == LEADS_OUT:
                continue
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


def read_file(location: str | Path, data: Data) -> ColumnBatch:
    """Read all of a location, as one column batch.

    Raises:
        DataError: it is missing, unreadable, empty or damaged, or its header is not what the recipe says.
    """
    column_batches = [
        column_batch
        for input_split in find_input_splits(location, data)
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


def _cut_file(file: SourceFile, data: Data, input_split_bytes: int) -> list[InputSplit]:
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
    )
    if kind == "csv" or compression or not (file.ranged or kind == "parquet"):
        return [whole]
    if kind == "parquet":
        return _cut_parquet(whole, told, input_split_bytes)
    return _cut_lines(whole, told, data, input_split_bytes)


def _cut_lines(whole: InputSplit, told: str, data: Data, input_split_bytes: int) -> list[InputSplit]:
    """Cut a text file by bytes, after its byte-order mark and its header."""
    columns: list[str] = []
    with open_file(whole.location) as file:
        head = file.read(len(MARK))
        refuse_utf16(head, told)
        start = len(MARK) if head == MARK else 0
        if whole.kind == "tsv":
            file.seek(start)
            lines = cut_lines(read_blocks(file), data.max_record_bytes)
            header, start = _take_header(lines, start, data.header_lines)
            columns = rows.read_header(header, told, data)
    pieces = []
    for number, begin in enumerate(range(start, whole.stop, input_split_bytes)):
        input_split = InputSplit(
            source=whole.source,
            kind=whole.kind,
            location=whole.location,
            start=begin,
            stop=min(begin + input_split_bytes, whole.stop),
            first=number == 0,
            columns=tuple(columns),
            version=whole.version,
        )
        pieces.append(input_split)
    return pieces


def _take_header(lines: Iterator[bytes | Long], start: int, count: int) -> tuple[list[list[str] | FieldFault], int]:
    """Return the first `count` lines as fields, and the byte at which the next line begins."""
    header = []
    for line in islice(lines, count):
        row, _ = next(rows.cut_tsv([line]))
        header.append(row)
        start += (line.size if isinstance(line, Long) else len(line)) + 1
    return header, start


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


def _cut_folder(location: str, data: Data, input_split_bytes: int) -> list[InputSplit]:
    """Put the files of a folder into groups by their sizes."""
    pieces: list[InputSplit] = []
    group: list[tuple[str, int]] = []
    size = 0
    files = locations.list_folder(location, follow_links=data.follow_links)
    name = escape(hide_secrets(location).rstrip("/").rpartition("/")[2])
    for number, file in enumerate(files, 1):
        group.append((file.name, LEADS_OUT if file.leads_out else file.size))
        size += file.size
        if size >= input_split_bytes or len(group) == INPUT_SPLIT_FILES or number == len(files):
            pieces.append(InputSplit(source=name, kind="folder", location=location, stop=size, files=tuple(group)))
            group, size = [], 0
    return pieces


def _read_folder(input_split: InputSplit, data: Data) -> Iterator[ColumnBatch]:
    """One record per file; its class is its first folder below the input split's location."""
    group: list[tuple[str, int]] = []
    size = 0
    for number, file in enumerate(input_split.files, 1):
        group.append(file)
        size += min(file[1], data.max_record_bytes)
        if size >= COLUMN_BATCH_BYTES or number == len(input_split.files):
            yield _stand_files(input_split, group, data)
            group, size = [], 0


def _stand_files(input_split: InputSplit, files: list[tuple[str, int]], data: Data) -> ColumnBatch:
    links = [row for row, (_, size) in enumerate(files) if size == LEADS_OUT]
    found = iter(
        locations.read_heads(
            input_split.location, [one for one in files if one[1] != LEADS_OUT], data.max_record_bytes + 1
        )
    )
    heads = [b"" if size == LEADS_OUT else next(found) for _, size in files]
    names = [name for name, _ in files]
    faults = {
        row: FieldFault(reason=rows.TOO_LARGE, raw=decode_head(head))
        for row, head in enumerate(heads)
        if len(head) > data.max_record_bytes
    }
    faults |= {row: FieldFault(reason=LINK, raw="") for row in links}
    texts = [None if row in faults else decode_file(head) for row, head in enumerate(heads)]
    labels = [name.split("/")[0] if "/" in name and row not in faults else None for row, name in enumerate(names)]
    shown = [escape(name) for name in names]
    columns: dict[str, Column] = {"file": list(shown), data.text: list(texts), data.label: list(labels)}
    return ColumnBatch(name=input_split.source, rows=len(names), columns=columns, faults=faults, files=shown)


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
    lines = cut_lines(strip_mark(read_blocks(stream), told), data.max_record_bytes)
    if input_split.kind == "jsonl":
        yield from rows.read_jsonl(lines, input_split.source, data)
    elif input_split.kind == "csv":
        yield from rows.read_csv(lines, input_split.source, told, data)
    else:
        header, _ = _take_header(lines, 0, data.header_lines)
        yield from rows.read_tsv(lines, input_split.source, rows.read_header(header, told, data))
