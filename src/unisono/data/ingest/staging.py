"""Staged records: read and examined, and kept on disk until screening has decided on all records together.

Owns the staging files of a preparation: one per input split, with its records and the facts that screening needs of
each record. A file is whole or absent, so a preparation that was killed continues with the files that are there.
Decides nothing (`screening/rules.py` and `screening/screen.py` do).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from unisono.config.sections import Data
from unisono.data.arrow import as_array, as_strings
from unisono.data.ingest.column_batch import ColumnBatch, list_names
from unisono.data.ingest.read import Record, take_records
from unisono.data.screening.near_duplicates import BANDS, sketch
from unisono.data.screening.rules import Examiner
from unisono.storage.files import whole_file

HASHES = ("hash 1", "hash 2")
"""128 bits of BLAKE2b of the text without space around it: equal texts are equal records, whatever their classes."""
PLACE = "place"
"""64 bits of BLAKE2b of class and text; a split is cut by them."""

_SCHEMA = pa.schema(
    [
        pa.field("text", pa.string()),
        pa.field("label", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("file", pa.string()),
        pa.field("characters", pa.int32()),
        *(pa.field(name, pa.uint64()) for name in (*HASHES, PLACE)),
        pa.field("bands", pa.binary(8 * BANDS)),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts about all records of an input split, available without reading any record."""

    name: str
    """Of the file that the records were read from."""
    batches: tuple[int, ...]
    """Rows of each."""
    names: tuple[str, ...]
    """The columns of the input, and fields of columns, as a.b."""

    @property
    def rows(self) -> int:
        return sum(self.batches)


def stage(
    path: Path,
    column_batches: Iterable[ColumnBatch],
    name: str,
    data: Data,
    examiner: Examiner,
    *,
    place: bool,
    near: bool,
    columns: Iterable[str] = (),
) -> None:
    """Examine the records of column batches and write them, one record batch per column batch.

    Args:
        place: whether a split is cut from these records.
        near: whether near-duplicates are looked for.
        columns: names of columns that the input has, whether or not they are read.

    Raises:
        DataError: the input cannot be read. RunFolderError: the file cannot be written.
    """
    names: dict[str, None] = dict.fromkeys(columns)
    rows: list[int] = []
    with whole_file(path, durable=False) as part, part.open("wb") as file:
        with pa.ipc.new_file(file, _SCHEMA) as writer:
            for column_batch in column_batches:
                names |= dict.fromkeys(list_names(column_batch, (*data.texts, data.label)))
                rows.append(column_batch.rows)
                writer.write_batch(_stand(column_batch, data, examiner, place=place, near=near))
        facts = json.dumps({"name": name, "batches": rows, "names": list(names)}).encode()
        file.write(facts + len(facts).to_bytes(8, "little"))


def _stand(column_batch: ColumnBatch, data: Data, examiner: Examiner, *, place: bool, near: bool) -> pa.RecordBatch:
    records: list[Record] = []
    reasons: list[str | None] = []
    for record in take_records(column_batch, data, lenient=True):
        treated, reason = examiner.examine(record)
        records.append(treated)
        reasons.append(reason or None)
    contents = [record.text.strip().encode() for record in records]
    hashes = np.frombuffer(b"".join(_hash(content, 16) for content in contents), "<u8").reshape(-1, 2)
    places = None
    if place:
        keys = (f"{record.label}\0".encode() + content for record, content in zip(records, contents, strict=True))
        places = np.frombuffer(b"".join(_hash(key, 8) for key in keys), ">u8").astype(np.uint64)
    bands = None
    if near:
        rows = sketch([record.text for record in records]).astype("<u8")
        bands = pa.FixedSizeBinaryArray.from_buffers(_SCHEMA.field("bands").type, len(rows), [None, pa.py_buffer(rows)])
    empty = pa.nulls(len(records))
    columns = [
        as_strings([record.text for record in records]),
        as_strings([record.label for record in records]),
        as_strings(reasons),
        as_strings([record.file for record in records]) if column_batch.files else empty.cast(pa.string()),
        as_array(np.array([len(record.text) for record in records], np.int32)),
        as_array(hashes[:, 0]),
        as_array(hashes[:, 1]),
        empty.cast(pa.uint64()) if places is None else as_array(places),
        empty.cast(pa.binary(8 * BANDS)) if bands is None else bands,
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _hash(content: bytes, size: int) -> bytes:
    return hashlib.blake2b(content, digest_size=size).digest()


class StagedRecords:
    """An input split's records, as `stage` wrote them. When a batch is no longer used, none of it stays in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            size = int.from_bytes(file.read(8), "little")
            file.seek(-8 - size, os.SEEK_END)
            self._end = file.tell()
            facts = json.loads(file.read(size))
        self.facts = Facts(name=facts["name"], batches=tuple(facts["batches"]), names=tuple(facts["names"]))

    def batch(self, number: int) -> pa.RecordBatch:
        """Return one record batch, memory-mapped."""
        content = pa.memory_map(str(self._path)).read_buffer(self._end)
        return pa.ipc.open_file(pa.BufferReader(content)).get_batch(number)
