"""Evaluation and prediction by several workers: the work is shared, results travel once, and no byte differs."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import Tensor, nn

import unisono
from toy import Command, make_records
from unisono.backends.torch_backend import TorchBackend
from unisono.data import write
from unisono.data.columns import Columns
from unisono.data.encoding.ngrams import NGrams
from unisono.data.own_sources import open_source
from unisono.data.samples import join_shares, pack_share
from unisono.engine.evaluation import measure_all
from unisono.errors import ContractError
from unisono.exchange.simulated import Simulated, play
from unisono.tasks.task import Task
from unisono.tasks.text import classifier

pytestmark = pytest.mark.usefixtures("warm")

ROWS = [*make_records(23), '"",sport', '"  ",food', "goal\ufffd \U0001f642 \u00e9,tech", '"=1+1 ""quoted""\nline",food']


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text,label", *ROWS]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", write.FORMATS)
def test_any_number_of_workers_writes_the_same_bytes(
    trained: dict[int, Path], texts: Path, tmp_path: Path, suffix: str
) -> None:
    found = []
    for workers in (1, 2, 3):
        target = tmp_path / f"{workers}{suffix}"
        assert unisono.predict(trained[1], texts, target, workers=workers) == len(ROWS)
        found.append(target.read_bytes())
    assert found[0] == found[1] == found[2]


def test_formats_agree(trained: dict[int, Path], texts: Path, tmp_path: Path) -> None:
    """Fails if one format rounds a probability, or loses a row or a reason."""
    for suffix in (".csv", ".jsonl", ".parquet"):
        unisono.predict(trained[1], texts, tmp_path / f"out{suffix}", workers=1)
    columns = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        sheet = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(sheet) == len(lines) == len(ROWS)
    for number, (cells, line) in enumerate(zip(sheet, lines, strict=True)):
        whole = {name: values[number] for name, values in columns.items()}
        assert line == whole
        assert list(cells) == list(whole)
        for name, value in whole.items():
            spelled = "" if value is None else str(value)
            assert cells[name] in (spelled, "'" + spelled), name
    assert columns["unusable"].count("empty") == columns["predicted"].count(None) == 2


def test_each_worker_encodes_its_share_and_reads_nothing(
    trained: dict[int, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a worker encodes all texts, or reads the file itself."""
    log = tmp_path / "log.txt"

    def encode(self: NGrams, texts: Sequence[str]) -> list[np.ndarray]:
        with log.open("a") as file:
            file.write("".join(f"{os.getpid()}\n" for _ in texts))
        return honest(self, texts)

    def read(*arguments: Any) -> Any:
        assert os.getpid() == caller
        return reader(*arguments)

    honest, reader, caller = NGrams.encode, classifier.read_texts, os.getpid()
    monkeypatch.setattr(NGrams, "encode", encode)
    monkeypatch.setattr(classifier, "read_texts", read)
    usable = len(ROWS) - 2
    for act in (
        lambda: unisono.predict(trained[1], texts, tmp_path / "out.csv", workers=3),
        lambda: unisono.evaluate(trained[1], texts, workers=3, quiet=True),
    ):
        act()
        counts = Counter(log.read_text().split())
        log.unlink()
        assert sorted(counts.values()) == [len(range(rank, usable, 3)) for rank in (2, 1, 0)]


class Fake:
    """An encoder: a token for each letter."""

    vocabulary_size, padding = 256, 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode() or b"\0", np.uint8).astype(np.int32) for text in texts]

    def save(self, folder: Path) -> None:
        raise AssertionError


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_shares_are_the_whole(count: int, workers: int) -> None:
    texts = [chr(97 + number) * (1 + number % 4) for number in range(count)]
    shares = [pack_share(Fake(), texts[rank::workers]) for rank in range(workers)]
    joined, whole = join_shares(shares, range(count)), join_shares([pack_share(Fake(), texts)], range(count))
    for samples in (np.arange(count), np.arange(count)[::-1]):
        left, right = joined.take(samples), whole.take(samples)
        assert all(torch.equal(left[name], right[name]) for name in left)


class Odd(Task):
    """Measures all kinds of numbers."""

    def build(self) -> nn.Module:
        return nn.Identity()

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        raise AssertionError

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = microbatch["x"]
        special = torch.tensor([-0.0, math.nan, math.inf, 1e-42])
        return {"x": x.double(), "wide": special[x.long() % 4][:, None].expand(-1, 3), "flag": x > 3}


def measure(exchange: Simulated, count: int, everywhere: bool, task: Task) -> dict[str, Any]:
    source = open_source({"x": np.arange(count, dtype=np.float32)})
    assert isinstance(source, Columns)
    found = measure_all(
        TorchBackend(task, task.build(), precision="float32"),
        task.measure,
        source,
        exchange,
        samples_per_microbatch=2,
        device=torch.device("cpu"),
        everywhere=everywhere,
    )
    return {name: (values.dtype, values.shape, values.tobytes()) for name, values in found.items()}


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("workers", [2, 3])
def test_results_travel_to_who_asks(count: int, workers: int) -> None:
    """The same bits as from one worker, on all workers or on the first one only."""
    (alone,) = play(1, lambda exchange: measure(exchange, count, True, Odd()))
    assert set(alone) == {"x", "wide", "flag"}
    assert play(workers, lambda exchange: measure(exchange, count, True, Odd())) == [alone] * workers
    to_first = play(workers, lambda exchange: measure(exchange, count, False, Odd()))
    assert to_first == [alone, *[{}] * (workers - 1)]


class Changing(Odd):
    """What it gives depends on the microbatch."""

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = microbatch["x"]
        return {"x": x, "more": x} if x[0] == 4 else {"x": x[:, None].expand(-1, 2) if x[0] == 6 else x}


@pytest.mark.parametrize(("count", "name"), [(6, "more"), (8, "x|more")])
@pytest.mark.parametrize("workers", [1, 2])
def test_results_of_some_microbatches_only_are_refused(count: int, name: str, workers: int) -> None:
    """Else zeros would stand for what was not measured."""
    with pytest.raises(ContractError, match=f"'({name})' for some microbatches only"):
        play(workers, lambda exchange: measure(exchange, count, True, Changing()))


def test_a_prediction_is_written_whole_or_not_at_all(
    trained: dict[int, Path], texts: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.csv").write_text("older")
    before = {path.name for path in tmp_path.iterdir()}

    def fail(table: pa.Table, path: Path, suffix: str) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "write_table", fail)
    code, _, err = command("predict", trained[1], texts, "out.csv", "--workers", 1)
    assert (code, "the disk is full" in err) == (2, True), err
    assert (tmp_path / "out.csv").read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} == before
