"""Ctrl-C, kill -9 and exceptions: one message, no process left behind, and the run goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import unisono
from toy import Launched, is_alive, launch_command, make_toy, wait_until_gone
from unisono.models.text.classification import TextClassification

LONG = ("--set", "train.epochs=40", "--set", "checkpoint.every_steps=20")
HASHES = ("weights_sha256", "optimizer_sha256")

pytestmark = pytest.mark.usefixtures("warm")


def begin(folder: Path, *options: object, workers: int = 2) -> Launched:
    """A training of 240 steps at work, seen to have done at least 24."""
    make_toy(folder)
    run = ("train", "toy.toml", "-w", workers, "--run-folder", "run", "--json", *LONG, *options)
    launched = launch_command(run, folder)
    launched.wait_for('"StepDone", "step": 24,')
    return launched


def read_steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "StepDone"]


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
    mine, expected = (json.loads((run / "summary.json").read_text()) for run in (folder / "run", uninterrupted))
    assert [mine[name] for name in HASHES] == [expected[name] for name in HASHES]
    assert mine["test"] == expected["test"]
    assert read_steps(folder / "run") == list(range(1, expected["steps"] + 1))


@pytest.mark.parametrize(("stop", "workers"), [(signal.SIGINT, 3), (signal.SIGTERM, 1)])
def test_interrupt_saves_and_resumes(tmp_path: Path, uninterrupted: Path, stop: signal.Signals, workers: int) -> None:
    launched = begin(tmp_path)
    children = launched.workers()
    os.kill(launched.pid, stop)
    assert launched.end() == 130, launched.err
    assert wait_until_gone(children) == []
    assert "stopping after this step" in launched.err
    assert "--resume" in launched.err
    assert "Traceback" not in launched.err
    last = read_steps(tmp_path / "run")[-1]
    assert f"stopped after step {last} of " in launched.err
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "state.json").is_file()
    assert not (tmp_path / "run" / "summary.json").exists()
    assert_resumes_to_the_same_bits(tmp_path, uninterrupted, workers)


def test_terminal_interrupts_the_whole_group(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the workers too; they leave it to the launcher."""
    launched = begin(tmp_path)
    os.killpg(launched.pid, signal.SIGINT)
    assert launched.end() == 130, launched.err
    assert launched.err.count("stopped after step") == 1
    assert "Traceback" not in launched.err


def test_second_interrupt_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: TextClassification, module: nn.Module, microbatch: object) -> tuple[torch.Tensor, int]:
        if (Path.cwd() / "hang").exists():
            time.sleep(60)
        return honest(self, module, microbatch)  # type: ignore[arg-type]

    honest = TextClassification.loss
    monkeypatch.setattr(TextClassification, "loss", loss)
    launched = begin(tmp_path)
    children = launched.workers()
    (tmp_path / "hang").touch()
    time.sleep(0.3)
    os.kill(launched.pid, signal.SIGINT)
    time.sleep(0.5)
    assert is_alive(launched.pid)  # the workers' step does not end
    began = time.monotonic()
    os.kill(launched.pid, signal.SIGINT)
    assert launched.end() == 130, launched.err
    assert time.monotonic() - began < 2
    assert wait_until_gone(children) == []
    assert "stopped at once" in launched.err


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_interrupt_before_the_first_step_leaves_nothing_behind(tmp_path: Path, delay: float) -> None:
    make_toy(tmp_path)
    launched = launch_command(("train", "toy.toml", "-w", 3, "--run-folder", "run", *LONG), tmp_path)
    while not launched.workers():
        assert launched.process.exitcode is None, launched.err
    time.sleep(delay)
    children = launched.workers()
    os.kill(launched.pid, signal.SIGINT)
    assert launched.end() == 130, launched.err
    assert wait_until_gone(children) == []
    assert "Traceback" not in launched.err
    if "before the first step" in launched.err:
        assert not (tmp_path / "run").exists()


def test_interrupt_within_the_first_step_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: TextClassification, module: nn.Module, microbatch: object) -> tuple[torch.Tensor, int]:
        if (Path.cwd() / "run").exists():  # the probe is over
            time.sleep(0.4)
        return honest(self, module, microbatch)  # type: ignore[arg-type]

    honest = TextClassification.loss
    monkeypatch.setattr(TextClassification, "loss", loss)
    make_toy(tmp_path)
    launched = launch_command(("train", "toy.toml", "-w", 2, "--run-folder", "run", "--json"), tmp_path)
    launched.wait_for('"RunStarted"')
    os.kill(launched.pid, signal.SIGINT)
    assert launched.end() == 130, launched.err
    assert "stopped after step 1 of " in launched.err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker_is_named_once(tmp_path: Path, uninterrupted: Path, rank: int) -> None:
    launched = begin(tmp_path)
    children = launched.workers()
    os.kill(children[rank], signal.SIGKILL)
    assert launched.end() == 1, launched.err
    assert wait_until_gone(children) == []
    assert launched.err.count(f"worker {rank} was killed by SIGKILL") == 1
    assert launched.err.count("worker ") == 1
    assert "Traceback" not in launched.err
    if rank == 0:
        assert_resumes_to_the_same_bits(tmp_path, uninterrupted, workers=1)


def test_killed_launcher_takes_its_workers_along(tmp_path: Path) -> None:
    launched = begin(tmp_path, workers=3)
    children = launched.workers()
    assert len(children) == 3
    os.kill(launched.pid, signal.SIGKILL)
    assert launched.end() == -signal.SIGKILL
    assert wait_until_gone(children) == []


def test_exception_in_a_worker_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: TextClassification, module: nn.Module, microbatch: object) -> tuple[torch.Tensor, int]:
        if torch.distributed.get_rank() == 1 and (Path.cwd() / "fail").exists():
            raise ZeroDivisionError("made for the test")
        return honest(self, module, microbatch)  # type: ignore[arg-type]

    honest = TextClassification.loss
    monkeypatch.setattr(TextClassification, "loss", loss)
    launched = begin(tmp_path, workers=3)
    children = launched.workers()
    (tmp_path / "fail").touch()
    assert launched.end() == 1, launched.err
    assert wait_until_gone(children) == []
    assert launched.err.count("worker 1 failed") == 1
    assert launched.err.count("Traceback") == 1
    assert launched.err.count("ZeroDivisionError: made for the test") == 1
    assert "worker 0" not in launched.err
    assert "worker 2" not in launched.err
