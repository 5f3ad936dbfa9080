"""A profiled run: the same bits, and where its time went, whoever trains it and whatever happens to them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from worlds import Forked, Heard, train_alone

import zoo
from toy import Command, make_toy
from unisono.config import recipe as recipes
from unisono.engine.profile import PHASES
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.runtime.setup import Job
from unisono.tasks.own_inputs import open_own

FILES = {"profile.md", "profile.json", "trace.json"}
HASHES = ("weights_sha256", "optimizer_sha256", "test")


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text(encoding="utf-8"))


def check_profile(run: Path, workers: int) -> dict[str, Any]:
    """What holds of every profile."""
    found: dict[str, Any] = read(run, "profile.json")
    assert list(found["phases"]) == list(PHASES)
    assert sum(phase["share"] for phase in found["phases"].values()) == pytest.approx(1.0, abs=1e-9)
    assert all(0.0 <= phase["lowest"] <= phase["seconds"] <= phase["highest"] for phase in found["phases"].values())
    assert (found["workers"], found["problems"], len(found["memory"])) == (workers, [], workers)
    for one in found["memory"]:
        assert one["peak_resident"] > one["activations"] > 0 and one["tree"] > 0 and one["optimiser"] > 0
    told = (run / "profile.md").read_text(encoding="utf-8")
    assert all(f"| {phase}" in told for phase in PHASES)
    return found


def check_trace(run: Path, workers: int) -> set[int]:
    """Each worker's spans follow one another; returns the steps that all have."""
    events = [one for one in read(run, "trace.json")["traceEvents"] if one["ph"] == "X"]
    rows = {rank: [one for one in events if one["tid"] == rank] for rank in range(workers)}
    assert sum(map(len, rows.values())) == len(events)
    for row in rows.values():
        steps: dict[int, list[Any]] = {}
        for one in row:
            steps.setdefault(one["args"]["step"], []).append(one)
        for spans in steps.values():
            gaps = [after["ts"] - before["ts"] - before["dur"] for before, after in pairwise(spans)]
            assert max(map(abs, gaps)) < 0.01, "microseconds"
        assert {"data", "forward", "backward", "tree"} <= {one["name"] for one in row if "microbatch" in one["args"]}
    return set.intersection(*({one["args"]["step"] for one in row} for row in rows.values()))


@pytest.mark.parametrize("task", ["attention", pytest.param("convolution", marks=pytest.mark.slow)])
def test_profile_changes_no_bit(forked: Forked, tmp_path: Path, task: str) -> None:
    """Forked workers, with audits and evaluations between the steps, and buffers that each microbatch changes."""
    make, data = (zoo.Attention, zoo.words) if task == "attention" else (zoo.convolution, zoo.images)
    train = {"epochs": 2.0, "samples_per_step": 20, "microbatches": 4, "audit_every": 2, "clip_norm": 1.0}
    recipe = recipes.check({"train": train, "evaluate": {"every_steps": 2}})

    def run(folder: Path, *, profile: bool) -> Any:
        def act(exchange: Exchange) -> list[str]:
            inputs = open_own(recipe, zoo.Classified(make), data(), test=data(9, seed=9))
            heard = Heard(folder)
            train_alone(Job(recipe=recipe, folder=folder, profile=profile), inputs, exchange, [heard])
            return heard.losses + heard.warnings

        return forked(2, act)

    assert run(tmp_path / "plain", profile=False) == run(tmp_path / "profiled", profile=True)
    plain, profiled = (read(tmp_path / name, "summary.json") for name in ("plain", "profiled"))
    assert [plain[name] for name in HASHES] == [profiled[name] for name in HASHES]
    assert {path.name for path in (tmp_path / "profiled").iterdir()} - FILES == {
        path.name for path in (tmp_path / "plain").iterdir()
    }
    found = check_profile(tmp_path / "profiled", 2)
    assert found["model"]["flop_per_step"] > 0
    assert check_trace(tmp_path / "profiled", 2) == set(range(1, plain["steps"] + 1))


def test_played_workers_wait_for_each_other(tmp_path: Path) -> None:
    """One works at a time, so each waits while the others compute."""
    recipe = recipes.check({"train": {"epochs": 1.0, "samples_per_step": 15, "microbatches": 3}})

    def act(exchange: Exchange) -> None:
        inputs = open_own(recipe, zoo.Classified(zoo.Attention), zoo.words(), test=zoo.words(9, seed=9))
        train_alone(Job(recipe=recipe, folder=tmp_path / "run", profile=True), inputs, exchange, [])

    play(3, act)
    assert check_profile(tmp_path / "run", 3)["phases"]["wait"]["lowest"] > 0


@pytest.mark.parametrize(
    "fault",
    [
        "kill(worker=1, step=7, phase=update)",
        pytest.param("kill(worker=0, step=18, phase=commit)", marks=pytest.mark.slow),
        pytest.param("kill(worker=1, step=18, phase=finish)", marks=pytest.mark.slow),
    ],
)
def test_a_loss_leaves_a_profile_of_the_rest(
    command: Command, tmp_path: Path, trained: dict[int, Path], fault: str
) -> None:
    make_toy(tmp_path)
    code, out, err = command("train", "toy.toml", "-w", 2, "--run-folder", "run", "--profile", "--fault", fault)
    assert (code, "# Where the time went: toy" in out) == (0, True), err
    run, step = tmp_path / "run", int(fault.partition("step=")[2].partition(",")[0])
    expected, found = read(trained[1], "summary.json"), read(run, "summary.json")
    assert [found[name] for name in HASHES] == [expected[name] for name in HASHES]
    told = read(run, "profile.json")
    if step == 7:
        assert told["steps"] == list(range(8, 19))  # the replaced worker knows of no others; the 7th is its first
        check_profile(run, 2)
    assert {path.name for path in run.iterdir()} >= FILES


@pytest.mark.slow
def test_torchrun_leaves_a_profile(tmp_path: Path, trained: dict[int, Path]) -> None:
    make_toy(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = ["--master-addr", "127.0.0.1", "--master-port", port, "--nproc-per-node", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "unisono", "train", "toy.toml"]
    done = subprocess.run(
        [*command, "--run-folder", "run", "--profile"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("# Where the time went: toy") == 1
    expected, found = read(trained[1], "summary.json"), read(tmp_path / "run", "summary.json")
    assert [found[name] for name in HASHES] == [expected[name] for name in HASHES]
    check_profile(tmp_path / "run", 2)
    assert check_trace(tmp_path / "run", 2) == set(range(1, 19))


@pytest.mark.slow
def test_what_cannot_be_written_ends_no_run(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import unisono.backends.torch_footprint
    import unisono.tracking.profile_report

    def fail(*arguments: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(unisono.backends.torch_footprint, "count_flop", fail)
    make_toy(tmp_path)
    options = ("-w", 2, "--profile", "--set", "train.max_steps=2")
    code, out, _ = command("train", "toy.toml", "--run-folder", "counted", *options)
    assert (code, "Not measured: floating-point operations: RuntimeError: no such thing" in out) == (0, True)
    monkeypatch.setattr(unisono.tracking.profile_report, "trace", fail)
    code, out, _ = command("train", "toy.toml", "--run-folder", "written", *options)
    assert (code, "warning: the profile was not written: no such thing" in out) == (0, True)
