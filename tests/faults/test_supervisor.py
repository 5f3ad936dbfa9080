"""The supervisor itself: killed and started again, asked to stop or for another number of workers; it leaves nothing
behind, and takes no folder that another one has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from histories import OFTEN, Quiet, assert_same_history, read_ledger, read_summary
from mounts import FORBIDDEN, mount_small
from torch import nn

from toy import Command, Launched, is_alive, launch_command, wait_until_gone
from unisono import cli
from unisono.processes.fault_injection import KINDS
from unisono.storage import checkpoints
from unisono.storage import run_lock as run_lock
from unisono.storage.run_lock import RUNNING, RunLock
from unisono.tasks.text.classification import TextClassification

SETTINGS = [part for setting in OFTEN for part in ("--set", setting)]

pytestmark = pytest.mark.usefixtures("warm", "plain")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the launched process makes its temporary folders."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def begin(quiet: Quiet, folder: Path, *options: object) -> Launched:
    """Train as the quiet run was trained, in `folder`/run."""
    run = ("train", quiet.recipe, "-w", 2, "--run-folder", "run", "--json", *SETTINGS, *options)
    return launch_command(run, folder)


def names(folder: Path | str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def new_in_memory(before: set[str]) -> set[str]:
    """What has come to /dev/shm and stays there; others may use it too."""
    deadline = time.monotonic() + 120
    while (new := names("/dev/shm") - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    return new


def read_steps(run: Path) -> list[int]:
    return [line["step"] for line in read_ledger(run, "StepDone")]


def wait_for_file(path: Path, launched: Launched) -> None:
    deadline = time.monotonic() + 180
    while not path.exists():
        assert launched.process.exitcode is None and time.monotonic() < deadline, launched.out + launched.err
        time.sleep(0.01)


def kill(launched: Launched) -> None:
    """As the kernel does it, without a warning; nobody is left."""
    children = launched.workers()
    os.kill(launched.pid, signal.SIGKILL)
    assert launched.end() == -signal.SIGKILL
    assert children and wait_until_gone(children) == []


# Killed


def test_the_same_command_goes_on_wherever_the_supervisor_was_killed(
    quiet: Quiet, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While workers start, before the first checkpoint, after one, and while one is being written."""

    def write(content: Any, folder: Path, **options: Any) -> Path:
        def at(phase: str) -> None:
            if int(content.facts["step"]) == 12 and phase == "optimizer" and not (tmp_path / "writing").exists():
                (tmp_path / "writing").touch()
                time.sleep(600)

        return honest(content, folder, at=at, **options)

    honest = checkpoints.write
    monkeypatch.setattr(checkpoints, "write", write)
    memory = names("/dev/shm")
    run = tmp_path / "run"

    launched = begin(quiet, tmp_path, "--resume", "auto")
    while len(launched.workers()) < 2:
        assert launched.process.exitcode is None, launched.err
    kill(launched)
    assert [path.name for path in run.iterdir()] == [RUNNING]

    launched = begin(quiet, tmp_path, "--resume", "auto", "--fault", "block(worker=1, step=3, phase=update)")
    launched.wait_for('"StepDone", "step": 2,')
    kill(launched)
    assert read_steps(run) == [1, 2] and not (run / "checkpoints").exists()
    assert json.loads((run / RUNNING).read_text())["pid"] == launched.pid

    launched = begin(quiet, tmp_path, "--resume", "auto", "--fault", "block(worker=0, step=8, phase=reduce)")
    launched.wait_for('"StepDone", "step": 7,')
    launched.wait_for('"CheckpointWritten", "step": 6,')
    kill(launched)

    launched = begin(quiet, tmp_path, "--resume", "auto", "--fault", "block(worker=0, step=13, phase=begin)")
    launched.wait_for('"StepDone", "step": 12,')
    wait_for_file(tmp_path / "writing", launched)
    assert len(launched.workers()) == 3
    kill(launched)
    unfinished, *whole = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert unfinished.startswith(".step-00000012.") and unfinished.endswith(".part")
    assert whole == ["step-00000003", "step-00000006", "step-00000009"]

    assert names(temporary) == set(), "it has no temporary folder that a kill would leave behind"
    launched = begin(quiet, tmp_path, "--resume", "auto")
    assert launched.end() == 0, launched.err
    assert names(temporary) == set()
    assert new_in_memory(memory) == set()
    resumed = [(line["step"], line["dropped_steps"]) for line in read_ledger(run, "Resumed")]
    assert resumed == [(0, 2), (6, 1), (9, 3)]
    assert read_summary(run)["resumes"] == 3 and read_summary(run)["recoveries"] == 0
    assert_same_history(run, quiet.run)
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    RunLock(run).release()


def test_resuming_a_finished_run_says_so(command: Command, quiet: Quiet, tmp_path: Path) -> None:
    shutil.copytree(quiet.run, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, out, err = command("train", quiet.recipe, "--run-folder", "run", "--resume", "auto", *SETTINGS)
    assert (code, err) == (0, "")
    assert "run has been trained to its end: nothing is left to do." in out
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# At work: another number of workers, another supervisor


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the working directory, files decide how long microbatches take: they wait for "go", and then take their time,
    until there is "hurry"."""

    def loss(self: TextClassification, module: nn.Module, microbatch: Any) -> tuple[torch.Tensor, int]:
        if (Path.cwd() / "run").exists() and not (Path.cwd() / "hurry").exists():
            time.sleep(0.1)
            while not any((Path.cwd() / name).exists() for name in ("go", "hurry")):
                time.sleep(0.01)
        return honest(self, module, microbatch)

    honest = TextClassification.loss
    monkeypatch.setattr(TextClassification, "loss", loss)


def test_resized_at_work_and_nobody_else_may_have_the_folder(
    quiet: Quiet, tmp_path: Path, temporary: Path, slow: None, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resize(*options: object) -> tuple[int, str, str]:
        """While steps go by: it takes place between two of them."""
        (tmp_path / "go").touch()
        answer = command("resize", "run", *options)
        (tmp_path / "go").unlink()
        return answer

    memory = names("/dev/shm")
    monkeypatch.setattr(run_lock, "DYING_SECONDS", 0.2)
    launched = begin(quiet, tmp_path, "--set", "recovery.hang_factor=0")
    (tmp_path / "go").touch()
    launched.wait_for('"StepDone", "step": 1,')
    (tmp_path / "go").unlink()
    workers = launched.workers()
    code, out, err = resize("-w", 3)
    assert code == 0 and "2 → 3 workers after step " in out, err
    assert set(workers) < set(launched.workers()), "who was there stays"
    code, out, err = command("resize", "run", "--workers", 3)
    assert code == 0 and "3 workers are at work already" in out, err
    for impossible in (5, 0):
        code, out, err = command("resize", "run", "-w", impossible)
        assert code == 2 and out == "", err
    assert "allowed is a whole number from 1" in err
    code, out, err = command("train", quiet.recipe, "-w", 1, "--run-folder", "run", "--resume", "auto", *SETTINGS)
    assert code == 2 and f"is being trained by process {launched.pid} on " in err
    code, out, err = resize("-w", 1)
    assert code == 0 and "3 → 1 workers after step " in out, err
    assert wait_until_gone(launched.workers()[1:]) == []
    (tmp_path / "hurry").touch()
    assert launched.end() == 0, launched.err
    run = tmp_path / "run"
    told = [(line["before"], line["workers"]) for line in read_ledger(run, "Resized")]
    assert told == [(2, 3), (3, 1)]
    assert all(line["seconds"] > 0 and 1 <= line["step"] < 18 for line in read_ledger(run, "Resized"))
    assert read_summary(run)["workers"] == 1 and read_summary(run)["recoveries"] == 0
    assert_same_history(run, quiet.run)
    assert names(temporary) == set() == new_in_memory(memory)
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("folder", ["finished", "nowhere"])
def test_only_a_run_at_work_can_be_resized(folder: str, command: Command, quiet: Quiet, tmp_path: Path) -> None:
    where = quiet.run if folder == "finished" else tmp_path / folder
    code, out, err = command("resize", where, "-w", 2)
    assert code == 2 and out == ""
    assert "is not being trained now" in err and "--resume" in err
    assert not any(where.glob(".wanted-*"))


# Asked to stop


def verified(command: Command, run: str = "run") -> list[int]:
    """Steps of its checkpoints, all verified."""
    code, out, err = command("checkpoints", run, "--verify", "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["state"] for row in rows} == {"verified"}
    return [row["step"] for row in rows]


def test_wanted_back_it_saves_and_leaves(quiet: Quiet, tmp_path: Path, temporary: Path, command: Command) -> None:
    launched = begin(quiet, tmp_path, "--fault", "pause(worker=1, step=5, phase=contribute)")
    launched.wait_for('"StepDone", "step": 4,')
    children = launched.workers()
    os.kill(launched.pid, signal.SIGUSR1)
    assert launched.end() == 75, launched.err
    assert read_steps(tmp_path / "run") == [1, 2, 3, 4, 5], "the step ends"
    assert verified(command) == [3, 5]
    assert "stopped after step 5 of 18, which is saved" in launched.err and "--resume" in launched.err
    assert wait_until_gone(children) == [] and names(temporary) == set()
    assert not (tmp_path / "run" / RUNNING).exists()


def test_a_step_that_does_not_end_is_given_up(
    quiet: Quiet, tmp_path: Path, command: Command, disturbed: Callable[..., Path]
) -> None:
    """The checkpoint is of the last committed step, from the snapshot."""
    launched = begin(
        quiet, tmp_path, "--set", "recovery.grace_seconds=1.0", "--fault", "block(worker=1, step=5, phase=contribute)"
    )
    launched.wait_for('"StepDone", "step": 4,')
    children = launched.workers()
    began = time.monotonic()
    os.kill(launched.pid, signal.SIGTERM)
    assert launched.end() == 75, launched.err
    assert time.monotonic() - began >= 0.5, "the step had time to end"
    assert wait_until_gone(children) == []
    assert "step 4 " in launched.err and "saved" in launched.err and "--resume" in launched.err
    run = tmp_path / "run"
    assert read_steps(run) == [1, 2, 3, 4]
    assert verified(command) == [3, 4]
    assert [line["step"] for line in read_ledger(run, "CheckpointWritten")] == [3, 4]
    assert disturbed(workers=3, resume=True) == run
    assert read_ledger(run, "Resumed")[0]["step"] == 4
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert_same_history(run, quiet.run)


def test_ctrl_c_twice_does_not_wait_for_a_slow_disk(
    quiet: Quiet, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(content: Any, folder: Path, **options: Any) -> Path:
        def at(phase: str) -> None:
            if int(content.facts["step"]) > 3 and phase == "seal":
                (tmp_path / "writing").touch()
                time.sleep(600)

        return honest(content, folder, at=at, **options)

    honest = checkpoints.write
    monkeypatch.setattr(checkpoints, "write", write)
    launched = begin(quiet, tmp_path)
    launched.wait_for('"StepDone", "step": 4,')
    os.kill(launched.pid, signal.SIGINT)
    wait_for_file(tmp_path / "writing", launched)
    time.sleep(0.3)
    children = launched.workers()
    assert is_alive(launched.pid) and len(children) == 3
    os.kill(launched.pid, signal.SIGINT)
    assert launched.end() == 130, launched.err
    assert "stopped at once" in launched.err and "Traceback" not in launched.err
    assert wait_until_gone(children) == []
    assert verified(command) == [3], "no half checkpoint is to be seen"


# What is on disk


def test_checkpoints_are_listed(command: Command, quiet: Quiet, tmp_path: Path) -> None:
    shutil.copytree(quiet.run, tmp_path / "run")
    every = [3, 6, 9, 12, 15, 18]
    code, out, _ = command("checkpoints", "run")
    assert code == 0 and [int(line.split()[0]) for line in out.splitlines()[1:-1]] == every
    assert "verified" not in out and "--verify" in out
    assert verified(command) == every
    code, out, _ = command("checkpoints", "run", "--verify")
    assert code == 0 and out.count("verified") == 6 and "the newest is run/checkpoints/step-00000018" in out

    files = tmp_path / "run" / "checkpoints"
    with (files / "step-00000015" / "optimizer.safetensors").open("r+b") as file:
        file.truncate(100)
    (files / "step-00000018").rename(files / "step-00000018.damaged")
    (files / ".step-00000021.part").mkdir()
    assert command("checkpoints", "run")[0] == 0, "not looked at"
    code, out, _ = command("checkpoints", "run", "--verify", "--json")
    rows = {row["step"]: row for row in map(json.loads, out.splitlines())}
    assert code == 1 and list(rows) == every
    assert rows[12]["state"] == "verified" and rows[12]["bytes"] > 10_000 and not rows[12]["fault"]
    assert "optimizer.safetensors" in rows[15]["fault"] and "truncated" in rows[15]["fault"]
    assert "set aside" in rows[18]["state"]
    code, out, _ = command("checkpoints", "run", "--verify")
    assert code == 1 and "damaged: " in out


@pytest.mark.parametrize("what", ["nowhere", "empty"])
def test_no_checkpoints_to_list(what: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    code, out, err = command("checkpoints", what)
    assert code == 2 and out == ""
    assert "has no checkpoints" in err and "checkpoint.every_steps" in err


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume=maybe"], "allowed is --resume, or --resume auto"),
        (["--fault", "nonsense"], ", ".join(KINDS)),
        (["--fault", "kill(worker=1, step=7, phase=lunch)"], "update"),
        (["--on-loss", "explode"], "recovery.on_loss"),
        (["--set", "recovery.attempts=0"], "recovery.attempts"),
        (["--set", "recovery.grace_seconds=0"], "recovery.grace_seconds"),
        (["--resume"], "has no checkpoints"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_values(options: list[str], message: str, command: Command, quiet: Quiet, tmp_path: Path) -> None:
    code, out, err = command("train", quiet.recipe, "--run-folder", "run", *options)
    assert code == 2 and out == ""
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


# A container's /dev/shm


@pytest.mark.slow
def test_a_tiny_dev_shm_does_no_harm(quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        mount_small(Path("/dev/shm"), "64k")
        assert shutil.disk_usage("/dev/shm").total == 64 * 1024
        honest()

    honest = cli.main
    monkeypatch.setattr(cli, "main", main)
    launched = begin(quiet, tmp_path, "--fault", "kill(worker=1, step=7, phase=update)")
    if (code := launched.end()) == FORBIDDEN:
        pytest.skip("this kernel forbids mount namespaces")
    assert code == 0, launched.err
    assert len(read_ledger(tmp_path / "run", "Recovered")) == 1
    assert_same_history(tmp_path / "run", quiet.run)
