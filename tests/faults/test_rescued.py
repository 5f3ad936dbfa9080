"""A run folder that cannot be written any more costs no result: checkpoints, the model and the ledger go elsewhere, and
the run says where."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import unisono
from learned import SETTINGS, Dropped, make_columns
from unisono.errors import Interrupted, RunFolderError
from unisono.storage.elsewhere import write_or_rescue
from unisono.storage.files import write_text
from unisono.tracking import events

pytestmark = pytest.mark.usefixtures("plain", "warm")
CHECKPOINTS: dict[str, Any] = {"checkpoint": {"every_steps": 2, "keep": 9}}


class Breaks:
    """After a step's checkpoint, puts a file where the run folder was."""

    def __init__(self, run: Path, step: int) -> None:
        self._run = run
        self._step = step
        self.warnings: list[str] = []

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.Notice) and event.warning:
            self.warnings.append(event.message)
        if isinstance(event, events.CheckpointWritten) and event.step == self._step and not self._run.is_file():
            self._run.rename(self._run.with_name("moved"))
            self._run.touch()

    def close(self) -> None:
        pass


def train(run: Path, *observers: Any, **options: Any) -> unisono.Trained:
    return unisono.train(
        Dropped(), make_columns(), run=run, quiet=True, observers=observers, **{**SETTINGS, **CHECKPOINTS, **options}
    )


@pytest.fixture(scope="module")
def whole(warm: None, tmp_path_factory: pytest.TempPathFactory) -> unisono.Trained:
    return train(tmp_path_factory.mktemp("whole") / "run", workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_model_and_the_last_checkpoint_are_kept(tmp_path: Path, whole: unisono.Trained, workers: int) -> None:
    run = tmp_path / "run"
    watch = Breaks(run, step=2)
    with pytest.raises(RunFolderError, match=r"cannot be written.*The model and its summary are in '(.*)' instead"):
        train(run, watch, workers=workers)
    (place,) = tmp_path.glob("run-rescued-*")
    assert any(f"go on with `--run-folder {place} --resume`" in told for told in watch.warnings)
    assert (place / "model" / "model.safetensors").read_bytes() == (
        whole.folder / "model" / "model.safetensors"
    ).read_bytes()
    assert json.loads((place / "summary.json").read_text())["weights_sha256"] == whole.weights_sha256
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-00000008"], "the newest one only"
    steps = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "StepDone"] == list(range(1, 9))


def test_a_run_goes_on_from_the_place_that_it_names(tmp_path: Path, whole: unisono.Trained) -> None:
    run = tmp_path / "run"
    task = Dropped(on_loss=Stopping(after=45))
    with pytest.raises(Interrupted, match=r"which is saved\. Go on.*the folder that the last warning names"):
        unisono.train(
            task, make_columns(), run=run, quiet=True, observers=[Breaks(run, step=2)], workers=1,
            **SETTINGS, **CHECKPOINTS,
        )  # fmt: skip
    (place,) = tmp_path.glob("run-rescued-*")
    assert train(place, workers=2, resume=True).weights_sha256 == whole.weights_sha256


class Stopping:
    """Sends this process SIGINT at the loss of a number."""

    def __init__(self, after: int) -> None:
        self._after = after

    def __call__(self) -> None:
        self._after -= 1
        if not self._after:
            os.kill(os.getpid(), signal.SIGINT)


def test_the_first_place_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    def refuse(*forbidden: Path) -> Callable[[Path], None]:
        def write(place: Path) -> None:
            if any(place.is_relative_to(one) for one in forbidden):
                raise RunFolderError(f"{place}: made for the test")
            write_text(place / "a", "1")

        return write

    run = here / "run"
    place, why = write_or_rescue(run, refuse(here))
    assert place.parent == elsewhere and (place / "a").read_text() == "1" and why == f"{run}: made for the test"
    assert list(here.iterdir()) == [], "a place that could not be used is removed"
    assert write_or_rescue(run, refuse(here))[0] == place, "always the same"
    assert write_or_rescue(elsewhere / "run", refuse(elsewhere))[0] != place
    shutil.rmtree(place)
    with pytest.raises(RunFolderError, match=f"^{run}: made for the test"):
        write_or_rescue(run, refuse(Path("/")))
    run.mkdir()
    assert write_or_rescue(run, refuse()) == (run, "")
