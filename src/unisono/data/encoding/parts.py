"""Parts: samples that are encoded and not yet in the dataset.

Owns the files into which workers write what they have encoded: one per staged record batch, with the samples of each
split, the lines of the quarantine, and a review of all its records. A file is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from unisono.data.arrow import as_array, as_numbers
from unisono.data.encoding.encoder import Encoder
from unisono.data.ingest.staging import StagedRecords
from unisono.data.samples import SampleChunk, make_chunk
from unisono.data.screening.review import EXAMPLES, Review
from unisono.data.screening.screen import KEPT, SPLITS
from unisono.data.store import SCHEMA, read_chunk, write_chunk
from unisono.storage.files import whole_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Fates:
    """The screening decisions on the records of one staged record batch.

    splits: int8 [records], numbers of SPLITS. reasons: int16 [records], numbers of `names`. labels: int32 [records],
    numbers of `classes`, −1 for none of them. first_row: the number of its first record in its file, from 1.
    place: (number of the input split, number of its first record in it). like: int64 [records], the record because of
    which one is quarantined, among all; −1: none. find: the file and the row of any record, by its number among all.
    """

    splits: np.ndarray
    reasons: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    classes: Sequence[str]
    first_row: int
    place: tuple[int, int]
    like: np.ndarray
    find: Callable[[int], tuple[str, int]]


def write_part(path: Path, staged: StagedRecords, number: int, fates: Fates, encoder: Encoder) -> None:
    """Encode the kept records of a record batch, and review all of its records."""
    batch = staged.batch(number)
    review = _review(batch, staged.facts.name, fates)
    kept = fates.reasons == 0
    chunks: dict[str, SampleChunk] = {}
    for split, name in enumerate(SPLITS):
        chosen = np.flatnonzero(kept & (fates.splits == split))
        if len(chosen):
            texts = batch.column("text").take(as_array(chosen)).to_pylist()
            chunks[name] = make_chunk(encoder, texts, fates.labels[chosen])
            review.count_tokens(name, chunks[name].lengths, chunks[name].cut)
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in list_quarantined(staged, number, fates)]
    facts = {
        "splits": json.dumps(list(chunks)),
        "review": json.dumps(review.to_dict()),
        "quarantine": "".join(lines),
    }
    schema = SCHEMA.with_metadata(facts)
    with whole_file(path, durable=False) as part, part.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for chunk in chunks.values():
            write_chunk(writer, chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The samples of a split, part by part; they can be read more than once."""

    paths: Sequence[Path]
    split: str

    def __iter__(self) -> Iterator[SampleChunk]:
        for path in self.paths:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            splits = json.loads(reader.schema.metadata[b"splits"])
            if self.split in splits:
                yield read_chunk(reader.get_batch(splits.index(self.split)))


def read_quarantine_lines(paths: Sequence[Path]) -> Iterator[str]:
    """Return the lines of `quarantine.jsonl`, part by part."""
    for path in paths:
        yield pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata[b"quarantine"].decode()


def add_reviews(paths: Sequence[Path]) -> Review:
    """Return the review of all parts."""
    total = Review()
    for path in paths:
        metadata = pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata
        total = total + Review.from_dict(json.loads(metadata[b"review"]))
    return total


def list_quarantined(staged: StagedRecords, number: int, fates: Fates) -> Iterator[dict[str, object]]:
    """Return the quarantined records of a record batch, as lines of `quarantine.jsonl`."""
    chosen = np.flatnonzero(fates.reasons != 0)
    if not len(chosen):
        return
    batch = staged.batch(number)
    columns = [batch.column(name).take(as_array(chosen)).to_pylist() for name in ("file", "label", "text")]
    for row, file, label, text in zip(chosen.tolist(), *columns, strict=True):
        line: dict[str, object] = {
            "split": SPLITS[fates.splits[row]],
            "file": file or staged.facts.name,
            "row": fates.first_row + row,
            "reason": fates.names[fates.reasons[row]],
            "label": label,
            "text": text,
        }
        if (other := int(fates.like[row])) >= 0:
            line["like"] = dict(zip(("file", "row"), fates.find(other), strict=True))
        yield line


def _review(batch: pa.RecordBatch, name: str, fates: Fates) -> Review:
    review = Review()
    review.count_records(
        splits=fates.splits,
        reasons=fates.reasons,
        labels=fates.labels,
        characters=as_numbers(batch.column("characters")),
        split_names=SPLITS,
        reason_names=[KEPT, *fates.names[1:]],
        label_names=fates.classes,
    )
    input_split, first = fates.place
    for reason in np.unique(fates.reasons[fates.reasons != 0]).tolist():
        for row in np.flatnonzero(fates.reasons == reason)[:EXAMPLES].tolist():
            review.show(
                fates.names[reason],
                batch.column("text")[row].as_py(),
                place=(input_split, first + row),
                split=SPLITS[fates.splits[row]],
                file=batch.column("file")[row].as_py() or name,
                row=fates.first_row + row,
                label=batch.column("label")[row].as_py(),
            )
    return review
