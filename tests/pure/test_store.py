"""A dataset is complete and verified or absent, and a microbatch is what a naive collation gives."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisono.data.encoding.ngrams import NGrams
from unisono.data.samples import EncodedSamples, SampleChunk, hash_content, join_shares, pack_share
from unisono.data.store import Dataset, open_dataset, read_quarantine, write_dataset
from unisono.errors import DamagedError, DataError
from unisono.storage.file_lock import hold
from unisono.storage.files import FileStamp, WatchedFile, file_sha256

ENCODER = NGrams.learn([["one two three", "two three", "中"]], 50, words=10, order=1, lowercase=True)


def chunk(rows: list[list[int]], labels: list[int] | None = None) -> SampleChunk:
    numbers = [number for row in rows for number in row]
    return SampleChunk(
        ids=np.array(numbers, np.int32),
        lengths=np.array([len(row) for row in rows], np.int32),
        labels=np.array(range(len(rows)) if labels is None else labels, np.int32),
    )


def write(folder: Path, splits: dict[str, list[SampleChunk]] | None = None) -> Dataset:
    return write_dataset(
        folder,
        splits={"train": [chunk([[1, 2, 3], [4]]), chunk([[5, 6]])]} if splits is None else splits,
        labels=["x", "中"],
        encoder=ENCODER,
        quarantine=['{"text": "b\\\\xff", "reason": "not UTF-8"}\n'],
        notes={"quarantined": {"train": {"not UTF-8": 1}}},
    )


def naive(rows: list[list[int]], samples: list[int]) -> dict[str, list]:
    """Collation as one would write it first."""
    taken = [rows[sample] for sample in samples]
    offsets = [sum(map(len, taken[:number])) for number in range(len(taken))]
    return {"ids": [number for row in taken for number in row], "offsets": offsets, "label": samples}


rows_of_samples = st.lists(st.lists(st.integers(0, 49), min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_of_samples, st.integers(1, 5), st.data())
def test_what_is_stored_is_what_is_taken(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[int]],
    size: int,
    data: st.DataObject,
) -> None:
    labels = list(range(len(rows)))
    chunks = [chunk(rows[at : at + size], labels[at : at + size]) for at in range(0, len(rows), size)]
    dataset = write(tmp_path_factory.mktemp("store") / "d", {"train": chunks})
    source = dataset.split("train")
    assert source is not None
    assert len(source) == len(rows) and source.lengths.tolist() == [len(row) for row in rows]
    assert source.sha256 == hash_content([chunk(rows, labels)]), "chunks make no difference"
    samples = data.draw(st.lists(st.sampled_from(labels), min_size=1, max_size=20))
    microbatch = source.take(np.array(samples))
    expected = naive(rows, samples)
    assert {name: tensor.tolist() for name, tensor in microbatch.items()} == expected
    assert {tensor.dtype for tensor in microbatch.values()} == {torch.int64}


def test_samples_may_lie_apart_and_need_no_label() -> None:
    source = EncodedSamples(
        ids=np.array([9, 1, 2, 9, 3], np.int32),
        starts=np.array([1, 4]),
        lengths=np.array([2, 1], np.int32),
        labels=None,
        sha256="",
    )
    microbatch = source.take(np.array([1, 0]))
    assert set(microbatch) == {"ids", "offsets"}, "no label where there is none"
    assert (microbatch["ids"].tolist(), microbatch["offsets"].tolist()) == ([3, 1, 2], [0, 1])


def test_texts_in_memory_are_the_same_samples(tmp_path: Path) -> None:
    texts = ["one two three", "three", "one 中 one"]
    source = join_shares([pack_share(ENCODER, texts)], [1, 0, 1])
    rows = [row.tolist() for row in ENCODER.encode(texts)]
    stored = write(tmp_path / "d", {"test": [chunk(rows, [1, 0, 1])]}).split("test")
    assert stored is not None
    for name, tensor in source.take(np.array([2, 0])).items():
        assert torch.equal(tensor, stored.take(np.array([2, 0]))[name])
    assert "label" not in join_shares([pack_share(ENCODER, texts)]).take(np.array([0]))
    assert len(join_shares([pack_share(ENCODER, [])] * 2)) == 0


def test_what_the_manifest_tells(tmp_path: Path) -> None:
    dataset = write(tmp_path / "d")
    assert (dataset.labels, dataset.counts) == (("x", "中"), {"train": 3})
    assert dataset.quarantined == {"train": {"not UTF-8": 1}}
    assert dataset.split("test") is None
    assert dataset.encoder.vocabulary_size == ENCODER.vocabulary_size
    assert list(read_quarantine(dataset.folder)) == [{"text": "b\\xff", "reason": "not UTF-8"}]
    assert [path.name for path in tmp_path.iterdir()] == ["d"], "neither lock nor leftover"


def test_the_hash_follows_content() -> None:
    same = [chunk([[1, 2], [3]])]
    assert hash_content(same) != hash_content([chunk([[1], [2, 3]])])
    assert hash_content(same) != hash_content([chunk([[1, 2], [3]], [0, 0])])


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a"), write(tmp_path / "b")
    assert one.sha256 == other.sha256
    for path in one.folder.iterdir():
        assert path.read_bytes() == (other.folder / path.name).read_bytes()


@pytest.mark.parametrize("name", ["train.arrow", "encoder.json", "quarantine.jsonl", "manifest.json"])
def test_damage_is_found_and_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "d").folder / name
    content = bytearray(path.read_bytes())
    place = content.index(b"train") if name == "manifest.json" else len(content) // 2
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=f"{name}' is damaged"):
        open_dataset(tmp_path / "d")


def test_truncated_missing_and_foreign_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "d").folder
    whole = (folder / "train.arrow").read_bytes()
    (folder / "train.arrow").write_bytes(whole[:-1])
    with pytest.raises(DamagedError, match=r"train\.arrow' is truncated"):
        open_dataset(folder)
    (folder / "train.arrow").unlink()
    with pytest.raises(DamagedError, match=r"train\.arrow' is missing"):
        open_dataset(folder)
    (folder / "train.arrow").write_bytes(whole)
    open_dataset(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_dataset(folder)
    with pytest.raises(DataError, match="no dataset"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), fail)
        with pytest.raises(DataError, match="disk is full" if code == errno.ENOSPC else "Permission denied"):
            write(tmp_path / "d")
    assert not list(tmp_path.iterdir())
    write(tmp_path / "d")


def test_an_error_while_encoding_leaves_nothing(tmp_path: Path) -> None:
    def chunks():  # type: ignore[no-untyped-def]
        yield chunk([[1]])
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(tmp_path / "d", {"train": chunks()})
    assert not list(tmp_path.iterdir())


def test_the_leftover_of_a_killed_writer_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".d.partial").mkdir()
    (tmp_path / ".d.partial" / "other.arrow").write_bytes(b"half")
    (tmp_path / ".d.lock").touch()
    write(tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert not (tmp_path / "d" / "other.arrow").exists()


def test_the_second_of_two_writers_takes_what_the_first_wrote(tmp_path: Path) -> None:
    first = write(tmp_path / "d")
    assert write(tmp_path / "d", {"train": []}).counts == first.counts


def test_the_lock_admits_one(tmp_path: Path) -> None:
    """Forked writers each add one under the lock; a lost update would show."""
    counter, children = tmp_path / "n", []
    counter.write_text("0")
    for _ in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(25):
                    with hold(tmp_path / "lock"):
                        counter.write_text(str(int(counter.read_text()) + 1))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    assert counter.read_text() == "100"


# ---- files that are written into while they are mapped


def test_a_file_that_is_written_into_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    watched = WatchedFile(path, FileStamp.of(path), file_sha256(path))
    assert not watched.touched() and not watched.changed()
    os.utime(path, ns=(1, 1))
    assert watched.touched() and not watched.changed()
    assert not watched.touched(), "read once"
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(1, 1))  # as if nothing had happened
    assert watched.touched() and watched.changed() and watched.changed()


def test_a_file_that_is_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    watched = WatchedFile(path, FileStamp.of(path), file_sha256(path))
    os.truncate(path, 2)
    assert watched.changed()


def test_a_file_that_is_replaced_stays_mapped(tmp_path: Path) -> None:
    """The open file counts: another one of its name harms nobody."""
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    watched = WatchedFile(path, FileStamp.of(path), file_sha256(path))
    (tmp_path / "other").write_bytes(b"xyz")
    (tmp_path / "other").rename(path)
    assert not watched.changed()


def test_a_file_that_is_written_into_between_check_and_mapping_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abcd")
    stamp, sha256 = FileStamp.of(path), file_sha256(path)
    path.write_bytes(b"abce")
    assert WatchedFile(path, stamp, sha256).changed()
