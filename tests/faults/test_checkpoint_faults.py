"""Whatever happens to the disk, or to who writes: training goes on to the same bits, and what is on disk is whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from histories import OFTEN, Quiet, assert_same_history, read_checkpoints, read_ledger, read_summary, read_warnings
from mounts import FORBIDDEN, mount_small

import unisono
from toy import launch_command
from unisono import cli
from unisono.errors import DamagedError, WorkerError
from unisono.storage import checkpoints, files

Disturbed = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("warm", "plain")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def steps(*numbers: int) -> list[str]:
    return [f"step-{number:08d}" for number in numbers]


# Found damaged


@pytest.fixture(scope="module")
def broken_off(quiet: Quiet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended in step 11, with checkpoints of steps 3, 6 and 9."""
    run = tmp_path_factory.mktemp("broken") / "run"
    with pytest.raises(WorkerError):
        unisono.train(
            quiet.recipe, workers=2, run=run, quiet=True, overrides=(*OFTEN, "recovery.restarts=0"),
            faults=["kill(worker=0, step=11, phase=update)"],
        )  # fmt: skip
    assert names(run) == steps(3, 6, 9, 10)
    shutil.rmtree(run / "checkpoints" / steps(10)[0])  # which it has written in the end
    return run


def spoil(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        after = content[middle + 1 :] if damage == "altered" else b""
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + after)


@pytest.mark.parametrize(
    ("damage", "file", "resume", "workers"),
    [
        pytest.param("truncated", "optimizer.safetensors", True, 1, marks=pytest.mark.slow),
        ("altered", "parameters.safetensors", "auto", 2),
        pytest.param("missing", "state.json", "auto", 1, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    damage: str,
    file: str,
    resume: Any,
    workers: int,
    broken_off: Path,
    quiet: Quiet,
    tmp_path: Path,
    disturbed: Disturbed,
) -> None:
    shutil.copytree(broken_off, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / steps(9)[0]
    spoil(newest / file, damage)
    left = {path.name: path.read_bytes() for path in newest.iterdir()}
    run = disturbed(workers=workers, resume=resume)
    (warning,) = read_warnings(run)
    assert str(newest / file) in warning and "*.damaged" in warning and "going on from step-00000006" in warning
    aside = newest.with_name(newest.name + ".damaged")
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == left, "it is kept as it was"
    (resumed,) = read_ledger(run, "Resumed")
    assert (resumed["step"], resumed["dropped_steps"]) == (6, 4)
    shutil.rmtree(aside)
    assert_same_history(run, quiet.run)


# The disk, and the writer


Write = Callable[..., Path]


@pytest.fixture
def interfere(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, str, Path], None]], None]:
    """`interfere(act)` calls `act(step, phase, folder)` in the writer, before everything that it does."""
    honest: Write = checkpoints.write

    def begin(act: Callable[[int, str, Path], None]) -> None:
        def write(content: Any, folder: Path, **options: Any) -> Path:
            step = int(content.facts["step"])
            act(step, "begin", folder)
            return honest(content, folder, at=lambda phase: act(step, phase, folder), **options)

        monkeypatch.setattr(checkpoints, "write", write)

    return begin


def test_a_disk_that_is_full_or_read_only_costs_its_checkpoints(
    disturbed: Disturbed, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = safetensors.torch.save_file
    faults = {6: errno.ENOSPC, 9: errno.EROFS, 15: errno.EIO}

    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        honest(tensors, path, **options)
        for step, error in faults.items():
            if path.parent.name.startswith(f".{steps(step)[0]}.") and "optimizer" in path.name:
                raise OSError(error, os.strerror(error))

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    run = disturbed(workers=2)
    full, read_only, broken = read_warnings(run)
    assert all("no checkpoint, and training goes on" in told for told in (full, read_only, broken))
    assert "step-00000006" in full and "the disk is full" in full
    assert "step-00000009" in read_only and "Read-only file system" in read_only
    assert "step-00000015" in broken and "Input/output error" in broken
    assert names(run) == steps(3, 12, 18), "nothing half-written is left"
    assert [line["step"] for line in read_ledger(run, "CheckpointWritten")] == [3, 12, 18]
    assert_same_history(run, quiet.run, without=(6, 9, 15))


def test_the_last_good_checkpoint_outlives_a_full_disk(
    disturbed: Disturbed, quiet: Quiet, interfere: Any, tmp_path: Path
) -> None:
    """Also where only one is kept, and the run is lost on top."""

    def act(step: int, phase: str, folder: Path) -> None:
        if step > 6 and phase == "seal":
            raise OSError(errno.ENOSPC, "No space left on device")

    interfere(act)
    only_one = ("checkpoint.keep=1",)
    with pytest.raises(WorkerError):
        disturbed("kill(worker=1, step=14, phase=update)", workers=2, overrides=only_one, recovery={"restarts": 0})
    run = tmp_path / "run"
    assert names(run) == steps(6)
    assert {f"{steps(6)[0]}/{path.name}" for path in (run / "checkpoints" / steps(6)[0]).iterdir()} <= read_checkpoints(
        quiet.run
    ).keys()
    checkpoints.verify(run / "checkpoints" / steps(6)[0])
    tried = [number for number in range(19) for told in read_warnings(run) if f"{steps(number)[0]}' cannot" in told]
    assert tried in ([9, 12, 13], [9, 13]), "those that were due, unless given up for the last one"


def test_a_folder_that_vanishes_while_training(disturbed: Disturbed, quiet: Quiet, interfere: Any) -> None:
    """The checkpoints under the writer's hands, then the whole run folder: what is still to come is all there."""

    def act(step: int, phase: str, folder: Path) -> None:
        if (step, phase) == (6, "optimizer"):
            shutil.rmtree(folder)
        if (step, phase) == (12, "begin"):
            shutil.rmtree(folder.parent, ignore_errors=True)  # the ledger may come back into it meanwhile

    interfere(act)
    run = disturbed(workers=2)
    assert names(run) == steps(12, 15, 18)
    warnings = read_warnings(run)
    assert any("no checkpoint, and training goes on" in told and "step-00000006" in told for told in warnings)
    assert read_summary(run)["weights_sha256"] == read_summary(quiet.run)["weights_sha256"]
    assert_same_history(run, quiet.run, without=(3, 6, 9))


def test_a_writer_that_is_killed_leaves_nothing_to_be_seen(
    disturbed: Disturbed, quiet: Quiet, interfere: Any, tmp_path: Path
) -> None:
    """At every moment of its work; what it leaves is cleared away by the next one."""
    kills = {3: "optimizer", 6: "sync", 9: "rename", 12: "parameters"}
    seen: dict[int, list[str]] = {}

    def act(step: int, phase: str, folder: Path) -> None:
        if phase == "begin" and folder.exists():
            (tmp_path / f"before-{step}").write_text("\n".join(names(folder.parent)))
        if kills.get(step) == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    interfere(act)
    run = disturbed(workers=2)
    seen = {step: (tmp_path / f"before-{step}").read_text().split() for step in (6, 9, 12, 15, 18)}
    for before, step in ((3, 6), (6, 9), (9, 12), (12, 15)):
        (unfinished,) = seen[step]  # half a checkpoint, which nobody takes for one
        assert unfinished.startswith(f".{steps(before)[0]}.") and unfinished.endswith(".part")
    assert seen[18] == steps(15), "cleared away"
    assert ["the writer was killed by SIGKILL" in told for told in read_warnings(run)] == [True] * 4
    assert names(run) == steps(15, 18)
    assert_same_history(run, quiet.run, without=(3, 6, 9, 12))


def test_a_writer_that_is_killed_between_two_renames_loses_nothing(
    disturbed: Disturbed, quiet: Quiet, broken_off: Path, tmp_path: Path
) -> None:
    """A checkpoint that was about to be replaced comes back."""
    shutil.copytree(broken_off, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / steps(3)[0]).rename(folder / f".{steps(3)[0]}.old")
    shutil.copytree(folder / steps(6)[0], folder / f".{steps(9)[0]}.old")
    (folder / ".step-00000012.part").mkdir()
    run = disturbed(workers=1, resume=True)
    assert names(run) == steps(3, 6, 9, 12, 15, 18)
    assert_same_history(run, quiet.run)


@pytest.mark.slow
def test_checkpoints_that_are_due_while_one_is_being_written(
    disturbed: Disturbed, quiet: Quiet, interfere: Any, tmp_path: Path
) -> None:
    """Training waits for the one before, and none is left out; nor does a loss meanwhile spoil what is being written."""

    def act(step: int, phase: str, folder: Path) -> None:
        if phase == "optimizer" and step <= 9:
            while step + 2 not in done():
                time.sleep(0.01)
            time.sleep(0.2)  # for more steps, if training waits for nothing
            assert step + 4 not in done()

    def done() -> list[int]:
        return [line["step"] for line in read_ledger(tmp_path / "run", "StepDone")]

    interfere(act)
    run = disturbed("kill(worker=0, step=5, phase=update)", workers=2)
    written = read_ledger(run, "CheckpointWritten")
    assert sorted(line["step"] for line in written) == [3, 6, 9, 12, 15, 18]
    assert read_warnings(run) == []
    assert [line["step"] for line in read_ledger(run, "Recovered")] == [4]
    assert_same_history(run, quiet.run)


def test_every_byte_is_that_of_one_worker(disturbed: Disturbed, quiet: Quiet) -> None:
    """Those of two, and after losses, are compared wherever something happens."""
    run = disturbed(workers=3)
    assert len(read_checkpoints(run)) == 18
    assert_same_history(run, quiet.run)


# A real small disk


def test_a_real_disk_that_is_too_small(quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cli.main

    def main() -> None:
        place = tmp_path / "run" / "checkpoints"
        place.mkdir(parents=True)
        (place.parent / "recipe.toml").touch()
        mount_small(place, "48k")  # a checkpoint has 29 kB
        try:
            honest()
        finally:
            shutil.copytree(place, tmp_path / "left")

    monkeypatch.setattr(cli, "main", main)
    settings = [part for setting in OFTEN for part in ("--set", setting)]
    launched = launch_command(
        ("train", quiet.recipe, "-w", 2, "--run-folder", "run", "--resume", "auto", *settings), tmp_path
    )
    if (code := launched.end()) == FORBIDDEN:
        pytest.skip("this kernel forbids mount namespaces")
    assert code == 0, launched.err
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "left").rename(tmp_path / "run" / "checkpoints")
    assert names(tmp_path / "run") == steps(3)
    checkpoints.verify(tmp_path / "run" / "checkpoints" / steps(3)[0])
    warnings = read_warnings(tmp_path / "run")
    assert len(warnings) == 5 and all("the disk is full" in told for told in warnings)
    assert_same_history(tmp_path / "run", quiet.run, without=(6, 9, 12, 15, 18))


def test_with_no_whole_checkpoint_resume_refuses(broken_off: Path, tmp_path: Path, disturbed: Disturbed) -> None:
    shutil.copytree(broken_off, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*/state.json"):
        spoil(path, "altered")
    before = names(tmp_path / "run")
    with pytest.raises(DamagedError, match=r"step-00000009/state\.json"):
        disturbed(workers=2, resume=True)
    assert names(tmp_path / "run") == before, "nothing is renamed"


def test_a_writer_killed_while_it_retires_an_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was about to remove is there wholly, or not at all."""
    for number in (1, 2):
        (tmp_path / f"step-{number:08d}").mkdir()
        (tmp_path / f"step-{number:08d}" / "state.json").touch()

    def rmtree(path: Path, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        files.remove_folder(tmp_path / "step-00000001")
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-00000002"]
    monkeypatch.undo()
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
