"""Checkpoints: the same bytes for any number of workers, whole or absent, and no trace of an interruption in what
follows."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from worlds import CPU, Forked, Heard, train_alone

import zoo
from toy import DAMAGES
from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.errors import DamagedError, Interrupted, RunFolderError, WorkerError
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.processes.progress_table import RUNNING, STOP
from unisono.runtime.setup import Job
from unisono.storage import checkpoints
from unisono.tasks.own_inputs import open_own
from unisono.tasks.task import Microbatch

SETTINGS: dict[str, Any] = {
    "train": {"samples_per_step": 20, "microbatches": 8, "epochs": 3.0, "learning_rate": 0.05, "ema_decay": 0.8},
    "evaluate": {"every_steps": 1, "keep_best": True, "samples_per_microbatch": 4, "metric": "halfway", "mode": "max"},
    "checkpoint": {"every_steps": 1, "keep": 99},
}


class StopAfter:
    """Asks one worker to stop after so many steps."""

    def __init__(self, exchange: Exchange, steps: int) -> None:
        self._left = (
            steps + 1 if exchange.rank == exchange.workers - 1 else -1
        )  # the run asks once before its first step

    def __call__(self) -> int:
        self._left -= 1
        return STOP if self._left == 0 else RUNNING


class Halfway(zoo.Classified):
    """Scores best after 4 steps, which a buffer counts, so that the best weights are not the last ones."""

    def measure(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        steps = module[1].num_batches_tracked  # type: ignore[index]
        score = -(steps - 4.0).abs().expand(len(microbatch["y"]))
        return super().measure(module, microbatch) | {"halfway": score}


def recipe() -> Recipe:
    return recipes.check(SETTINGS)


def train(
    exchange: Exchange,
    folder: Path,
    *,
    steps: int = -1,
    resume: Literal["no", "yes", "auto"] = "no",
    heard: Heard | None = None,
) -> None:
    """Train a convolution to the end, or for so many steps."""
    inputs = open_own(
        recipe(), Halfway(zoo.convolution), zoo.images(), validation=zoo.images(11, 8), test=zoo.images(9, 9)
    )
    job = Job(recipe=recipe(), folder=folder, resume=resume)
    train_alone(job, inputs, exchange, [heard or Heard(folder)], StopAfter(exchange, steps))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def results(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    return {name: summary[name] for name in ("weights_sha256", "optimizer_sha256", "test", "best_step", "steps")}


def play_train(workers: int, folder: Path, **options: Any) -> list[str]:
    """Train with played workers; return the warnings."""
    heard = Heard(folder)
    play(workers, lambda exchange: train(exchange, folder, heard=heard, **options))
    return heard.warnings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker, never interrupted."""
    from unisono.engine import numerics

    numerics.settle(threads=1, device=CPU)
    folder = tmp_path_factory.mktemp("whole") / "run"
    play_train(1, folder)
    return folder


@pytest.mark.parametrize("workers", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_number_of_workers(workers: int, whole: Path, tmp_path: Path) -> None:
    play_train(workers, tmp_path / "run")
    found, expected = contents(tmp_path / "run" / "checkpoints"), contents(whole / "checkpoints")
    assert found == expected and len(expected) == 9 * 3
    names = checkpoints.load_tensors(whole / "checkpoints" / "step-00000009" / "optimizer.safetensors").keys()
    assert {"exp_avg.0.weight", "average.1.running_mean", "best.0.weight", "best_integers", "updates.0.weight"} <= names


@pytest.mark.parametrize(
    "stops", [(2, 3), *(pytest.param(stops, marks=pytest.mark.slow) for stops in ((1, 1), (4, 4)))]
)
def test_resumed_on_other_numbers_of_workers_equals_uninterrupted(
    stops: tuple[int, int], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for workers, steps, resume in ((7, stops[0], "no"), (2, stops[1], "yes")):
        with pytest.raises(Interrupted, match="--resume"):
            play_train(workers, folder, steps=steps, resume=resume)
    assert not (folder / "model").exists()
    play_train(5, folder, resume="yes")
    assert results(folder) == results(whole)
    assert contents(folder / "checkpoints") == contents(whole / "checkpoints")
    assert (folder / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()


def test_real_workers_resume_what_others_began(whole: Path, tmp_path: Path, forked: Forked) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        forked(3, lambda exchange: train(exchange, folder, steps=4))
    forked(2, lambda exchange: train(exchange, folder, resume="yes"))
    assert results(folder) == results(whole)
    assert contents(folder / "checkpoints") == contents(whole / "checkpoints")


def test_a_finished_run_can_be_resumed_without_effect(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    play_train(2, folder)
    play_train(3, folder, resume="yes")
    assert results(folder) == results(whole)


def test_keep_best_chooses_among_all_evaluations(whole: Path) -> None:
    """The exported weights are the average at the best step."""
    assert results(whole)["best_step"] == 4
    at_best = checkpoints.load_tensors(whole / "checkpoints" / "step-00000004" / "optimizer.safetensors")
    exported = checkpoints.load_tensors(whole / "model" / "model.safetensors")
    for name, value in exported.items():
        if value.is_floating_point():
            assert torch.equal(value, at_best[f"average.{name}"]), name
        else:
            assert value.item() == 4, name


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    file: str, damage: str, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        play_train(1, folder, steps=3)
    path = folder / "checkpoints" / "step-00000003" / file
    spoil(path, damage)
    left = contents(path.parent)
    (warning,) = play_train(2, folder, resume="yes")
    assert str(path) in warning and "going on from step-00000002" in warning
    aside = folder / "checkpoints" / "step-00000003.damaged"
    assert contents(aside) == left, "it is set aside as it was"
    shutil.rmtree(aside)
    assert results(folder) == results(whole)
    assert contents(folder / "checkpoints") == contents(whole / "checkpoints")


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_with_no_whole_checkpoint_the_newest_damaged_file_is_named(file: str, damage: str, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        play_train(1, tmp_path, steps=2)
    for step in (1, 2):
        spoil(tmp_path / "checkpoints" / f"step-{step:08d}" / file, damage)
    before = contents(tmp_path)
    with pytest.raises(DamagedError, match=str(tmp_path / "checkpoints" / "step-00000002" / file)):
        play_train(2, tmp_path, resume="yes")
    assert contents(tmp_path) == before


def test_auto_begins_anew_where_no_checkpoint_is_whole(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Interrupted):
        play_train(1, folder, steps=2)
    spoiled = [folder / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors" for step in (1, 2)]
    for path in spoiled:
        spoil(path, "altered")
    warnings = play_train(2, folder, resume="auto")
    assert len(warnings) == 2 and all("beginning anew" in warning for warning in warnings)
    assert all(any(str(path) in warning for warning in warnings) for path in spoiled)
    for path in spoiled:
        shutil.rmtree(path.parent.with_name(path.parent.name + ".damaged"))
    assert results(folder) == results(whole)
    assert contents(folder / "checkpoints") == contents(whole / "checkpoints")


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        cut = content[:middle]
        path.write_bytes(cut if damage == "truncated" else cut + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def fill_up(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Let the disk be full in the middle of the checkpoints of these steps."""
    save = safetensors.torch.save_file

    def save_file(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        save(tensors, path, **options)
        if "optimizer" in path.name and first <= int(path.parent.name.split(".")[1].removeprefix("step-")) <= last:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)


@pytest.mark.parametrize("last", [3, 9])
def test_a_full_disk_costs_its_checkpoints_only(
    last: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on to the same bits; what is written later is as if nothing had happened."""
    folder = tmp_path / "run"
    fill_up(monkeypatch, 3, last)
    warnings = play_train(2, folder)
    assert len(warnings) == last - 3 + 1
    for step, warning in zip(range(3, last + 1), warnings, strict=True):
        assert f"step-{step:08d}" in warning and "the disk is full" in warning and "training goes on" in warning
    assert results(folder) == results(whole)
    assert (folder / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    expected = contents(whole / "checkpoints")
    gone = tuple(f"step-{step:08d}/" for step in range(3, last + 1))
    assert contents(folder / "checkpoints") == {n: v for n, v in expected.items() if not n.startswith(gone)}
    assert all(path.name.startswith("step-") for path in (folder / "checkpoints").iterdir())


def test_a_full_disk_leaves_the_last_checkpoint(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only one is kept; the interrupted run says what it could not do, and goes on from there."""
    folder = tmp_path / "run"
    monkeypatch.setitem(SETTINGS, "checkpoint", {"every_steps": 1, "keep": 1})
    with monkeypatch.context() as full:
        fill_up(full, 3, 9)
        with pytest.raises(Interrupted, match="stopped after step 5 of 9, which could not be saved"):
            play_train(2, folder, steps=5)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (folder / "model").exists()
    monkeypatch.setitem(SETTINGS, "checkpoint", {"every_steps": 1, "keep": 99})
    assert play_train(3, folder, resume="yes") == []
    assert results(folder) == results(whole)
    expected = contents(whole / "checkpoints")
    assert contents(folder / "checkpoints") == {n: v for n, v in expected.items() if not n.startswith("step-00000001")}


@pytest.mark.parametrize("moment", ["rename", "fsync"])
def test_a_kill_at_any_instant_leaves_a_checkpoint(moment: str, whole: Path, tmp_path: Path, forked: Forked) -> None:
    folder = tmp_path / "run"

    def act(exchange: Exchange) -> None:
        import os
        import signal

        original, calls = getattr(os, moment), iter(range(1000))

        def die(*arguments: Any, **options: Any) -> Any:
            if any((folder / "checkpoints").glob(".step-00000003.*.part")) and next(calls) >= 2 * (moment == "fsync"):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, moment, die)
        train(exchange, folder)

    with pytest.raises(WorkerError, match="worker 0 was killed by SIGKILL"):
        forked(2, act)
    assert [path.name for path in checkpoints.list_checkpoints(folder / "checkpoints")] == [
        "step-00000001",
        "step-00000002",
    ]
    assert play_train(3, folder, resume="yes") == []
    assert results(folder) == results(whole)
    assert contents(folder / "checkpoints") == contents(whole / "checkpoints")
    assert all(path.name.startswith("step-") for path in (folder / "checkpoints").iterdir())


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "checkpoint", {"every_steps": 2, "keep": 2})
    play_train(2, tmp_path)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000008", "step-00000009"]


def test_another_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        play_train(1, tmp_path, steps=1)
    monkeypatch.setitem(SETTINGS, "train", {**SETTINGS["train"], "learning_rate": 0.1})
    with pytest.raises(RunFolderError, match=r"train.learning_rate = 0.1 \(was 0.05\)"):
        play_train(1, tmp_path, resume="yes")
