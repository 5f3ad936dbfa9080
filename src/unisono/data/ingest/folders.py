"""Folders: a text per file with a class per sub-folder, or the parts of one table.

Owns which of both a folder is, which of its files are left out, and how texts in files become column batches.
`locations.py` finds the files, `input_splits.py` cuts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from unisono.config.sections import Data
from unisono.data.ingest import locations
from unisono.data.ingest.column_batch import COLUMN_BATCH_BYTES, Column, ColumnBatch, FieldFault
from unisono.data.ingest.compressed import SUFFIXES as COMPRESSED
from unisono.data.ingest.delimited import TOO_LARGE
from unisono.data.ingest.formats import SUFFIXES
from unisono.data.ingest.lines import decode_file, decode_head, escape
from unisono.data.ingest.locations import SourceFile
from unisono.errors import DataError

INPUT_SPLIT_FILES = 4_096


def find_parts(files: Sequence[SourceFile], told: str, data: Data) -> tuple[list[SourceFile], str]:
    """The files of a folder that holds the parts of a table, as Spark writes them, and a note; none of a folder per
    class.

    Raises:
        DataError: the values of a column are the names of sub-folders.
    """
    if data.format == "folder":
        return [], ""
    parts = [file for file in files if not any(name.startswith("_") for name in file.name.split("/"))]
    if not parts or not all(_has_records(file) or data.format != "auto" for file in parts):
        return [], ""
    above = {folder for file in parts for folder in file.name.split("/")[:-1]}
    if not above:
        return parts, f"{told}: the parts of a table; files that begin with '.' or '_' are left out"
    if all("=" in folder for folder in above):
        raise DataError(
            f"{told}: partitioned, with values in names of folders ({min(above)}), which are not read. Write the "
            "column into the files, or name the files by a pattern (**/*.parquet) if it is not needed."
        )
    return [], ""


def leave_out(files: Sequence[SourceFile], told: str) -> tuple[list[SourceFile], str]:
    """What matched a pattern without the marks that other programs leave (_SUCCESS), and a note."""
    kept = [file for file in files if _has_records(file) or not file.name.rpartition("/")[2].startswith("_")]
    count = len(files) - len(kept)
    return kept, f"{told}: {count} files that begin with '_' are left out" if count else ""


def _has_records(file: SourceFile) -> bool:
    path = PurePosixPath(file.name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix in SUFFIXES


def group_files(files: Sequence[SourceFile], input_split_bytes: int) -> Iterator[tuple[tuple[str, int], ...]]:
    """Groups of neighbouring files, as names and sizes, of about so many bytes."""
    group: list[tuple[str, int]] = []
    size = 0
    for number, file in enumerate(files, 1):
        group.append((file.name, file.size))
        size += file.size
        if size >= input_split_bytes or len(group) == INPUT_SPLIT_FILES or number == len(files):
            yield tuple(group)
            group, size = [], 0


def read_folder(location: str, name: str, files: Sequence[tuple[str, int]], data: Data) -> Iterator[ColumnBatch]:
    """One record per file; its class is its first folder below `location`."""
    if len(data.texts) != 1:
        raise DataError(f"{name!r}: a folder has a text per file, but data.text = {list(data.texts)}. Name one column.")
    group: list[tuple[str, int]] = []
    size = 0
    for number, file in enumerate(files, 1):
        group.append(file)
        size += min(file[1], data.max_record_bytes)
        if size >= COLUMN_BATCH_BYTES or number == len(files):
            yield _stand_files(location, name, group, data)
            group, size = [], 0


def _stand_files(location: str, name: str, files: list[tuple[str, int]], data: Data) -> ColumnBatch:
    heads = locations.read_heads(location, files, data.max_record_bytes + 1)
    names = [file for file, _ in files]
    faults = {
        row: FieldFault(reason=TOO_LARGE, raw=decode_head(head))
        for row, head in enumerate(heads)
        if len(head) > data.max_record_bytes
    }
    texts = [None if row in faults else decode_file(head) for row, head in enumerate(heads)]
    labels = [file.split("/")[0] if "/" in file and row not in faults else None for row, file in enumerate(names)]
    shown = [escape(file) for file in names]
    columns: dict[str, Column] = {"file": list(shown), data.texts[0]: list(texts), data.label: list(labels)}
    return ColumnBatch(name=name, rows=len(names), columns=columns, faults=faults, files=shown)
