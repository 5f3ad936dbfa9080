"""Ctrl-C, SIGTERM, kill -9 and exceptions: one message, no process left behind, and the run goes on to the same bits."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unisono
from toy import Launched, is_alive, launch_command, make_toy, wait_until_gone
from unisono.errors import RunFolderError
from unisono.storage import checkpoints
from unisono.tasks.text.classification import TextClassification

LONG = (
    "--set", "train.epochs=5", "--set", "checkpoint.every_steps=20", "--set", "recovery.hang_factor=0",
)  # fmt: skip
"""30 steps. Nobody is suspected of hanging, however slow the machine is."""
HELD = ("--fault", "pause(worker=0, step=25, phase=begin)")
HASHES = ("weights_sha256", "optimizer_sha256")

pytestmark = pytest.mark.usefixtures("warm", "held")


def begin(folder: Path, *options: object, workers: int = 2) -> Launched:
    """A training of 30 steps that has done 24, and goes on when the file "hold" is removed."""
    make_toy(folder)
    run = ("train", "toy.toml", "-w", workers, "--run-folder", "run", "--json", *LONG, *HELD, *options)
    launched = launch_command(run, folder)
    launched.wait_for('"StepDone", "step": 24,')
    return launched


def interrupt(launched: Launched, stop: signal.Signals) -> None:
    """Send the signal, and wait until it has been noted."""
    os.kill(launched.pid, stop)
    launched.wait_for("stopping after this step")


def read_ledger(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def read_steps(run: Path) -> list[int]:
    return [line["step"] for line in read_ledger(run, "StepDone")]


@pytest.fixture(scope="module")
def uninterrupted(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = make_toy(folder)
    return unisono.train(recipe, workers=1, run=folder / "run", quiet=True, overrides=LONG[1::2]).folder


def assert_resumes_to_the_same_bits(folder: Path, uninterrupted: Path, workers: int) -> None:
    resumed = launch_command(
        ("train", "toy.toml", "-w", workers, "--run-folder", "run", "--resume", "--quiet", *LONG), folder
    )
    assert resumed.end() == 0, resumed.err
    assert_same_bits(folder, uninterrupted)


def assert_same_bits(folder: Path, uninterrupted: Path) -> None:
    """The run in `folder` is as if nothing had happened to it."""
    mine, expected = (json.loads((run / "summary.json").read_text()) for run in (folder / "run", uninterrupted))
    assert [mine[name] for name in HASHES] == [expected[name] for name in HASHES]
    assert mine["test"] == expected["test"]
    assert read_steps(folder / "run") == list(range(1, expected["steps"] + 1))
    for name in ("loss", "gradient_norm", "learning_rate", "samples", "tokens"):
        curves = [[line[name] for line in read_ledger(run, "StepDone")] for run in (folder / "run", uninterrupted)]
        assert curves[0] == curves[1], name
    last = Path("checkpoints") / f"step-{expected['steps']:08d}"
    for part in ("parameters.safetensors", "optimizer.safetensors"):
        assert (folder / "run" / last / part).read_bytes() == (uninterrupted / last / part).read_bytes(), part


@pytest.mark.parametrize(
    ("stop", "code", "workers"),
    [(signal.SIGINT, 130, 3), (signal.SIGTERM, 75, 1), pytest.param(signal.SIGUSR1, 75, 4, marks=pytest.mark.slow)],
)
def test_interrupt_saves_and_resumes(
    tmp_path: Path, uninterrupted: Path, held: Path, stop: signal.Signals, code: int, workers: int
) -> None:
    launched = begin(tmp_path)
    children = launched.workers()
    interrupt(launched, stop)
    held.unlink()
    assert launched.end() == code, launched.err
    assert wait_until_gone(children) == []
    assert "--resume" in launched.err
    assert "Traceback" not in launched.err
    last = read_steps(tmp_path / "run")[-1]
    assert last == 25, "the step that was begun ends, and no other one begins"
    assert f"stopped after step {last} of " in launched.err
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "state.json").is_file()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert_resumes_to_the_same_bits(tmp_path, uninterrupted, workers)


@pytest.mark.parametrize("full", [False, True], ids=["slow disk", "full disk"])
def test_interrupt_while_a_checkpoint_is_being_written(
    tmp_path: Path, uninterrupted: Path, held: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """What is told to be saved is saved, and what could not be saved is not told to be."""

    def write(*arguments: Any, **options: Any) -> Path:
        while held.exists():  # it takes until the step that is begun ends
            time.sleep(0.01)
        if full and (tmp_path / "run" / "checkpoints" / "step-00000020").exists():
            raise RunFolderError("made for the test: the disk is full")
        return honest(*arguments, **options)

    honest = checkpoints.write
    monkeypatch.setattr(checkpoints, "write", write)
    launched = begin(tmp_path)
    interrupt(launched, signal.SIGINT)
    held.unlink()
    assert launched.end() == 130, launched.err
    last = read_steps(tmp_path / "run")[-1]
    assert last == 25
    assert launched.err.count(f"stopped after step {last} of 30") == 1
    assert ("could not be saved" in launched.err, "is saved" in launched.err) == (full, not full)
    assert ("made for the test" in launched.out) == full
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"step-00000020"} if full else f"step-{last:08d}" in kept
    monkeypatch.undo()
    assert_resumes_to_the_same_bits(tmp_path, uninterrupted, workers=3)


@pytest.mark.parametrize(
    ("stop", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow)]
)
def test_terminal_interrupts_the_whole_group(tmp_path: Path, held: Path, stop: signal.Signals, code: int) -> None:
    """Ctrl-C in a terminal, and a scheduler's signal, reach the workers too; they leave it to the supervisor."""
    launched = begin(tmp_path)
    os.killpg(launched.pid, stop)
    launched.wait_for("stopping after this step")
    held.unlink()
    assert launched.end() == code, launched.err
    assert launched.err.count("stopped after step") == 1
    last = read_steps(tmp_path / "run")[-1]
    assert f"stopped after step {last} of " in launched.err
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "state.json").is_file()
    assert read_ledger(tmp_path / "run", "Recovered") == []
    assert "Traceback" not in launched.err


@pytest.mark.parametrize(
    ("first", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_second_interrupt_ends_at_once(tmp_path: Path, first: signal.Signals, code: int) -> None:
    """The workers' step does not end: they are held up until the end of the test."""
    launched = begin(tmp_path)
    children = launched.workers()[:2]  # without what writes a checkpoint just now, and ends by itself
    interrupt(launched, first)
    assert is_alive(launched.pid) and all(map(is_alive, children))
    os.kill(launched.pid, signal.SIGINT)
    assert launched.end() == code, launched.err
    assert wait_until_gone(children) == []
    assert "stopped at once" in launched.err


@pytest.mark.parametrize("delay", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_interrupt_before_the_first_step_leaves_nothing_behind(tmp_path: Path, held: Path, delay: float) -> None:
    """Wherever in its start the signal meets the run."""
    make_toy(tmp_path)
    launched = launch_command(("train", "toy.toml", "-w", 3, "--run-folder", "run", *LONG, *HELD), tmp_path)
    launched.wait_until(lambda: bool(launched.workers()))
    time.sleep(delay)
    children = launched.workers()
    os.kill(launched.pid, signal.SIGINT)
    launched.process.join(1)  # or it is held up at step 25, after which it stops
    held.unlink()
    assert launched.end() == 130, launched.err
    assert wait_until_gone(children) == []
    assert "Traceback" not in launched.err
    if "before the first step" in launched.err:
        assert not (tmp_path / "run").exists()


def test_interrupt_within_the_first_step_saves_it(tmp_path: Path, held: Path) -> None:
    make_toy(tmp_path)
    fault = ("--fault", "pause(worker=0, step=1, phase=contribute)")
    launched = launch_command(("train", "toy.toml", "-w", 2, "--run-folder", "run", "--json", *LONG, *fault), tmp_path)
    launched.wait_for('"RunStarted"')
    interrupt(launched, signal.SIGINT)
    held.unlink()
    assert launched.end() == 130, launched.err
    assert "stopped after step 1 of " in launched.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_worker_is_named_once_and_replaced(tmp_path: Path, uninterrupted: Path, held: Path, rank: int) -> None:
    launched = begin(tmp_path)
    children = launched.workers()
    os.kill(children[rank], signal.SIGKILL)
    held.unlink()
    assert launched.end() == 0, launched.err
    assert wait_until_gone(children) == []
    (recovered,) = read_ledger(tmp_path / "run", "Recovered")
    assert recovered["what"].count(f"worker {rank} was killed by SIGKILL") == 1
    assert recovered["what"].count("worker ") == 1
    assert recovered["workers"] == 2
    assert recovered["step"] == 24
    assert launched.out.count('"Recovered"') == 1
    assert (launched.out + launched.err).count("was killed by SIGKILL") == 1
    assert launched.err == ""
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["recoveries"] == 1
    assert_same_bits(tmp_path, uninterrupted)


@pytest.mark.parametrize("every_steps", [20, 0])
def test_killed_worker_is_replaced_without_a_snapshot(
    tmp_path: Path, uninterrupted: Path, held: Path, every_steps: int
) -> None:
    """Where the size of files is limited no memory file is used: the run goes on from its last checkpoint, or anew."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, before[1]))
    try:
        launched = begin(tmp_path, "--set", f"checkpoint.every_steps={every_steps}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if every_steps:
        launched.wait_until((tmp_path / "run" / "checkpoints" / "step-00000020").exists)
    os.kill(launched.workers()[1], signal.SIGKILL)
    held.unlink()
    assert launched.end() == 0, launched.err
    (recovered,) = read_ledger(tmp_path / "run", "Recovered")
    assert "worker 1 was killed by SIGKILL" in recovered["what"]
    assert recovered["step"] == every_steps
    assert_same_bits(tmp_path, uninterrupted)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_worker_ends_a_run_that_may_not_recover(
    tmp_path: Path, uninterrupted: Path, held: Path, rank: int
) -> None:
    launched = begin(tmp_path, "--set", "recovery.restarts=0")
    children = launched.workers()
    os.kill(children[rank], signal.SIGKILL)
    held.unlink()
    assert launched.end() == 1, launched.err
    assert wait_until_gone(children) == []
    assert launched.err.count(f"worker {rank} was killed by SIGKILL") == 1
    assert launched.err.count("worker ") == 1
    assert "recovery.restarts = 0" in launched.err
    assert "--resume" in launched.err
    assert "Traceback" not in launched.err
    assert not (tmp_path / "run" / "summary.json").exists()
    if rank == 0:
        assert_resumes_to_the_same_bits(tmp_path, uninterrupted, workers=1)


def test_killed_launcher_takes_its_workers_along(tmp_path: Path) -> None:
    launched = begin(tmp_path, "--set", "checkpoint.every_steps=0", workers=3)  # nobody writes one just now
    children = launched.workers()
    assert len(children) == 3
    os.kill(launched.pid, signal.SIGKILL)
    assert launched.end() == -signal.SIGKILL
    assert wait_until_gone(children) == []


def test_exception_in_a_worker_is_told_once(
    tmp_path: Path, held: Path, monkeypatch: pytest.MonkeyPatch, my_rank: Callable[[], int]
) -> None:
    def loss(self: TextClassification, module: nn.Module, microbatch: object) -> tuple[torch.Tensor, int]:
        if my_rank() == 1 and (Path.cwd() / "fail").exists():
            raise ZeroDivisionError("made for the test")
        return honest(self, module, microbatch)  # type: ignore[arg-type]

    honest = TextClassification.loss
    monkeypatch.setattr(TextClassification, "loss", loss)
    launched = begin(tmp_path, "--fault", "pause(worker=1, step=25, phase=begin)", workers=3)
    children = launched.workers()
    (tmp_path / "fail").touch()
    held.unlink()
    assert launched.end() == 1, launched.err
    assert wait_until_gone(children) == []
    assert launched.err.count("worker 1 failed (ZeroDivisionError: made for the test) twice with the same error") == 1
    assert launched.err.count("worker 1 failed") == 1
    assert launched.err.count("Traceback") == 1
    assert launched.err.count("ZeroDivisionError: made for the test") == 2  # the message, and the traceback
    assert "worker 0" not in launched.err
    assert "worker 2" not in launched.err
    (recovered,) = read_ledger(tmp_path / "run", "Recovered")  # it was tried again once
    assert recovered["what"] == "worker 1 failed (ZeroDivisionError: made for the test)"
    assert recovered["step"] == 24 == read_steps(tmp_path / "run")[-1]
    assert f"at step {recovered['step'] + 1}" in launched.err


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_exception_that_comes_once_costs_one_step(
    tmp_path: Path,
    uninterrupted: Path,
    held: Path,
    monkeypatch: pytest.MonkeyPatch,
    my_rank: Callable[[], int],
    rank: int,
) -> None:
    def loss(self: TextClassification, module: nn.Module, microbatch: object) -> tuple[torch.Tensor, int]:
        if my_rank() == rank and (Path.cwd() / "fail").exists():
            (Path.cwd() / "fail").unlink()
            raise ZeroDivisionError("made for the test")
        return honest(self, module, microbatch)  # type: ignore[arg-type]

    honest = TextClassification.loss
    monkeypatch.setattr(TextClassification, "loss", loss)
    launched = begin(tmp_path, "--fault", f"pause(worker={rank}, step=25, phase=begin)", workers=3)
    (tmp_path / "fail").touch()
    held.unlink()
    assert launched.end() == 0, launched.err
    assert launched.err == ""
    (recovered,) = read_ledger(tmp_path / "run", "Recovered")
    assert recovered["what"] == f"worker {rank} failed (ZeroDivisionError: made for the test)"
    assert recovered["step"] == 24
    assert_same_bits(tmp_path, uninterrupted)
