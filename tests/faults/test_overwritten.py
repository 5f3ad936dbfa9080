"""A prepared dataset that is written into while it is trained on: noticed within a step, and never called a good model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from histories import Quiet

import unisono
from toy import make_toy
from unisono.errors import DamagedError, DataError
from unisono.tracking import events

pytestmark = pytest.mark.usefixtures("plain", "warm")


class Acts:
    """Does something when a step has been reported; the next step waits for it."""

    def __init__(self, act: Callable[[], object], step: int) -> None:
        self._act = act
        self._step = step

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == self._step:
            self._act()

    def close(self) -> None:
        pass


def write_into(path: Path) -> None:
    """Change some bytes in the middle of a file, in place."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x07\x00\x00\x00" * 8)


def train(folder: Path, act: Callable[[Path], object], *, step: int = 5, **options: Any) -> unisono.Trained:
    """Train the toy; after the step, `act` gets the dataset's folder."""
    recipe = make_toy(folder)

    def find() -> None:
        (dataset,) = (path for path in (folder / "datasets").iterdir() if not path.name.startswith("."))
        act(dataset)

    return unisono.train(recipe, run=folder / "run", quiet=True, observers=[Acts(find, step)], **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dataset_that_is_written_into_ends_the_run(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match=r"the data was written into while it was trained on.*prepared again"):
        train(tmp_path, lambda dataset: write_into(dataset / "train.arrow"), workers=workers)
    run = tmp_path / "run"
    assert not (run / "model").exists() and not (run / "summary.json").exists()
    assert (run / "metrics.jsonl").read_text().count('"StepDone"') == 5, "the step after it is not reported"
    with pytest.raises(DamagedError):
        unisono.train(tmp_path / "toy.toml", run=tmp_path / "again", quiet=True, workers=1)


def test_test_samples_count_as_well(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data was written into"):
        train(tmp_path, lambda dataset: write_into(dataset / "test.arrow"), step=17, workers=1)
    assert not (tmp_path / "run" / "model").exists()


def touch(dataset: Path) -> None:
    for path in dataset.iterdir():
        os.utime(path)
        os.link(path, path.with_name(f"{path.name}.copy"))


def test_a_dataset_that_is_touched_or_linked_is_the_same(tmp_path: Path, quiet: Quiet) -> None:
    run = train(tmp_path, touch, workers=2)
    assert (
        run.summary["weights_sha256"]
        == unisono.train(quiet.recipe, run=tmp_path / "other", quiet=True, workers=1).weights_sha256
    )
