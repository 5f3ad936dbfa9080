"""Datasets on disk: complete and verified, or absent.

Owns the folder's layout, its manifest, how it is written all at once, and how it is read back. Does not depend on
where samples come from.

A dataset is a folder of `manifest.json`, one Arrow IPC file per split (uncompressed, so that it can be
mapped; columns `ids`: list<int32>, `label`: int32), the encoder's files and `quarantine.jsonl`. The manifest
holds the SHA-256 of each.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from unisono.config.small_files import read_small
from unisono.data.arrow import as_array, as_numbers
from unisono.data.encoding.encode import load_encoder
from unisono.data.encoding.encoder import Encoder
from unisono.data.samples import ContentHash, EncodedSamples, SampleChunk
from unisono.errors import DamagedError, DataError
from unisono.storage import known_hashes
from unisono.storage.file_lock import hold
from unisono.storage.files import FileStamp, WatchedFile, check_file, facts_sha256, file_sha256, sync

FORMAT = 1
"""Raise it whenever a reader of the old layout could not read the new one."""

SCHEMA = pa.schema([pa.field("ids", pa.list_(pa.int32())), pa.field("label", pa.int32())])
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
REMEDY = "Delete the folder and prepare the data again."


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A verified dataset. Samples are mapped when a split is asked for, not read."""

    folder: Path
    labels: tuple[str, ...]
    sha256: str
    """Hash of everything a run reads: the classes, the encoder and the content of every split."""
    counts: Mapping[str, int]
    """Samples by split."""
    quarantined: Mapping[str, Mapping[str, int]]
    """Records left out, by split, then by reason."""
    manifest: Mapping[str, Any]
    stamps: Mapping[str, FileStamp]
    """Of each file, from before it was verified."""

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder that made token numbers from the texts."""
        return load_encoder(self.folder)

    def split(self, name: str) -> EncodedSamples | None:
        """Return train, validation or test; None where the dataset has no such split."""
        if name not in self.manifest["splits"]:
            return None
        entry = self.manifest["splits"][name]
        file = self.folder / entry["file"]
        watched = WatchedFile(file, self.stamps[file.name], self.manifest["files"][file.name]["sha256"])
        return _map_samples(file, entry["sha256"], watched)


def one_by_one(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call functions in this process."""
    return [task() for task in tasks]


def write_dataset(
    folder: Path,
    *,
    splits: Mapping[str, Iterable[SampleChunk]],
    labels: Sequence[str],
    encoder: Encoder,
    quarantine: Iterable[str],
    notes: Mapping[str, object],
    pages: Mapping[str, str] | None = None,
    do: Callable[[Sequence[Callable[[], Any]]], Sequence[Any]] = one_by_one,
) -> Dataset:
    """Write a dataset under a temporary name, then rename it; if it already exists, it is opened.

    `quarantine` gives the records that were left out, JSON, in strings of whole lines. `notes` are further entries of
    the manifest; `quarantined`, the counts by split and reason, is one of them. `pages` are further text files, by
    name. Chunks are read twice. `do` calls functions and returns their results in order; it may use processes of its
    own.

    Raises:
        DataError: the folder cannot be written, or the disk is full; nothing is left behind.
    """
    unfinished = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold(folder.with_name(f".{folder.name}.lock")):
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)  # of a writer that was killed
                try:
                    unfinished.mkdir()
                    _fill(unfinished, splits, labels, encoder, quarantine, notes, pages or {}, do)
                    unfinished.rename(folder)
                    sync(folder.parent)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fault = "the disk is full. Free some space, or set data.store to a folder elsewhere"
        else:
            fault = f"cannot be written: {error.strerror or error}. Set data.store to a folder that can"
        raise DataError(f"{str(folder)!r}: {fault}.") from None
    manifest = _read_manifest(folder / MANIFEST)
    return _open(folder, manifest, _stamp(folder, manifest))


def open_dataset(folder: Path) -> Dataset:
    """Read a dataset's manifest and verify every file that it lists, unless this run has done so on this host.

    Raises:
        DataError: there is no dataset, or one of another format.
        DamagedError: a file is missing, truncated or changed; the message names it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        remedy = REMEDY if folder.exists() else "Prepare the data first."
        raise DataError(f"{str(folder)!r}: no dataset, since there is no {MANIFEST} in it. {remedy}")
    manifest = _read_manifest(path)
    stamps = _stamp(folder, manifest)
    for name, known in manifest["files"].items():
        key = known_hashes.identify("file", [folder / name])
        if known_hashes.find(key) != known["sha256"]:
            check_file(folder / name, known["bytes"], known["sha256"], REMEDY)
            known_hashes.keep(key, known["sha256"])
    return _open(folder, manifest, stamps)


def _stamp(folder: Path, manifest: Mapping[str, Any]) -> dict[str, FileStamp]:
    return {name: FileStamp.of(folder / name) for name in manifest["files"] if (folder / name).exists()}


def _open(folder: Path, manifest: Mapping[str, Any], stamps: Mapping[str, FileStamp]) -> Dataset:
    return Dataset(
        stamps=stamps,
        folder=folder,
        labels=tuple(manifest["labels"]),
        sha256=manifest["sha256"],
        counts={name: entry["samples"] for name, entry in manifest["splits"].items()},
        quarantined=manifest["quarantined"],
        manifest=manifest,
    )


def read_quarantine(folder: Path) -> Iterator[dict[str, Any]]:
    """Return the quarantined records of a dataset one by one."""
    with (folder / QUARANTINE).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _fill(
    folder: Path,
    splits: Mapping[str, Iterable[SampleChunk]],
    labels: Sequence[str],
    encoder: Encoder,
    quarantine: Iterable[str],
    notes: Mapping[str, object],
    pages: Mapping[str, str],
    do: Callable[[Sequence[Callable[[], Any]]], Sequence[Any]],
) -> None:
    encoder.save(folder)
    encoder_files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    for name, page in pages.items():
        (folder / name).write_text(page, encoding="utf-8")
    with (folder / QUARANTINE).open("w", encoding="utf-8") as file:
        file.writelines(quarantine)
    writing = [partial(_write_split, folder / f"{name}.arrow", chunks) for name, chunks in splits.items()]
    hashing = [partial(_hash_split, chunks) for chunks in splits.values()]
    found = do([*writing, *hashing])  # hashing a file takes as long as writing it
    entries, hashes = {}, {}
    for name, (samples, tokens), (content, sha256) in zip(splits, found, found[len(splits) :], strict=False):
        entries[name] = {"file": f"{name}.arrow", "samples": samples, "tokens": tokens, "sha256": content}
        hashes[f"{name}.arrow"] = sha256
    contents = {name: entry["sha256"] for name, entry in entries.items()}
    visible = {"labels": list(labels), "encoder": encoder_files, "splits": contents}
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hashes.get(path.name) or file_sha256(path)}
        sync(path)
    manifest: dict[str, Any] = {"format": FORMAT, "sha256": facts_sha256(visible), "labels": list(labels)}
    manifest |= {"splits": entries, "files": files, **notes}
    manifest["manifest_sha256"] = facts_sha256(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


class _Hashing(io.RawIOBase):
    """A file that keeps only the SHA-256 of what was written."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: Any, /) -> int:
        self.sha256.update(content)
        return memoryview(content).nbytes


def _write_split(path: Path, chunks: Iterable[SampleChunk]) -> tuple[int, int]:
    """Write one record batch per chunk; return the numbers of samples and tokens."""
    samples = tokens = 0
    with path.open("wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for chunk in chunks:
            write_chunk(writer, chunk)
            samples += len(chunk.lengths)
            tokens += len(chunk.ids)
    return samples, tokens


def _hash_split(chunks: Iterable[SampleChunk]) -> tuple[str, str]:
    """Return the SHA-256 of the samples, and of the file that `_write_split` makes from them."""
    content, file = ContentHash(), _Hashing()
    with pa.ipc.new_file(pa.PythonFile(file, "w"), SCHEMA) as writer:
        for chunk in chunks:
            content.add(chunk)
            write_chunk(writer, chunk)
    return content.hexdigest(), file.sha256.hexdigest()


def write_chunk(writer: pa.RecordBatchWriter, chunk: SampleChunk) -> None:
    """Write samples with their labels as one record batch of SCHEMA."""
    assert chunk.labels is not None
    offsets = np.zeros(len(chunk.lengths) + 1, np.int32)
    np.cumsum(chunk.lengths, out=offsets[1:])
    ids = pa.ListArray.from_arrays(as_array(offsets), as_array(chunk.ids))
    writer.write_batch(pa.record_batch([ids, as_array(chunk.labels)], schema=SCHEMA))


def read_chunk(batch: pa.RecordBatch) -> SampleChunk:
    """Return the samples of a record batch that `write_chunk` wrote."""
    ids, labels = batch.columns
    lengths = np.diff(as_numbers(ids.offsets))
    return SampleChunk(ids=as_numbers(ids.values), lengths=lengths, labels=as_numbers(labels))


def _map_samples(path: Path, sha256: str, file: WatchedFile) -> EncodedSamples:
    """Map a split's file as one int32 array, so that samples of any record batch are gathered at once."""
    whole = pa.memory_map(str(path)).read_buffer()
    reader = pa.ipc.open_file(pa.BufferReader(whole))
    starts, lengths, labels = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
    for number in range(reader.num_record_batches):
        ids, label = reader.get_batch(number).columns
        offsets = as_numbers(ids.offsets)
        place, odd = divmod(ids.values.buffers()[1].address - whole.address, 4)
        assert not odd and ids.values.offset == 0, "Arrow aligns its buffers to 8 bytes"
        starts.append(place + offsets[:-1].astype(np.int64))
        lengths.append(np.diff(offsets))
        labels.append(as_numbers(label).astype(np.int64))
    return EncodedSamples(
        ids=np.frombuffer(whole, np.int32, count=whole.size // 4),
        starts=np.concatenate(starts),
        lengths=np.concatenate(lengths),
        labels=np.concatenate(labels),
        sha256=sha256,
        file=file,
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    damaged = DamagedError(f"{str(path)!r} is damaged: not what was written. {REMEDY}")
    try:
        manifest = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError):
        raise damaged from None
    if not isinstance(manifest, dict):
        raise damaged
    if manifest.get("format") != FORMAT:
        raise DataError(f"{str(path)!r}: format {manifest.get('format')!r}, allowed is {FORMAT}. {REMEDY}")
    if manifest.pop("manifest_sha256", None) != facts_sha256(manifest):
        raise damaged
    return manifest
