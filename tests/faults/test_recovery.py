"""A worker that is lost costs the unfinished step, and no bit: wherever it was, and however it was lost."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from histories import OFTEN, assert_same_history, read_ledger, read_summary
from torch import Tensor, nn

import unisono
import zoo
from toy import Command
from unisono.engine.state import TrainState
from unisono.errors import DivergedError, ImpureError, RecipeError, WorkerError
from unisono.exchange.shared_memory import Shared
from unisono.processes.fault_injection import KINDS
from unisono.processes.progress_table import PHASES
from unisono.runtime import hang_detection
from unisono.runtime import supervised_worker as handle
from unisono.runtime.restart_budget import RestartBudget

Disturbed = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("warm", "plain")


def recovered(run: Path) -> list[dict[str, Any]]:
    """Recovered events, their fields looked at."""
    found, begun = read_ledger(run, "Recovered"), read_ledger(run)[0]
    for line in found:
        assert set(line) == {
            "event", "step", "what", "workers", "wasted_seconds", "seconds", "trace", "clock", "when",
        }  # fmt: skip
        assert line["seconds"] > 0
        passed = line["when"] - begun.get("since", begun["when"])
        assert 0 <= line["wasted_seconds"] <= passed - line["seconds"] + 0.01, "no more than there was; rounded"
    return found


def places(run: Path) -> list[tuple[int, str]]:
    """Where it went on, and who was lost."""
    return [(line["step"], "; ".join(re.findall(r"worker \d+", line["what"]))) for line in recovered(run)]


# Killed at every verb of the loop, and around it


KILLS = {
    1: [(2, 0, "reduce"), (7, 0, "commit"), (9, 0, "report")],
    2: [(4, 0, "load"), (8, 1, "begin"), (12, 1, "update")],
    3: [(1, 0, "contribute"), (5, 2, "audit"), (12, 0, "update"), (14, 1, "commit")],
}


def test_every_verb_is_among_the_kills() -> None:
    verbs = PHASES[PHASES.index("begin") : PHASES.index("evaluate")]
    assert {phase for kills in KILLS.values() for _, _, phase in kills} == set(verbs)


@pytest.mark.parametrize("workers", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_any_verb(workers: int, disturbed: Disturbed, quiet: Any) -> None:
    kills = KILLS[workers]
    faults = [f"kill(worker={worker}, step={step}, phase={phase})" for step, worker, phase in kills]
    run = disturbed(*faults, workers=workers)
    # who is killed at its report has committed the step; at the commit worker 0 alone is waited for
    expected = [
        (step - (phase != "report" and (worker == 0 or phase != "commit")), f"worker {worker}")
        for step, worker, phase in kills
    ]
    assert places(run) == expected
    assert all("was killed by SIGKILL" in line["what"] and line["workers"] == workers for line in recovered(run))
    assert read_summary(run)["recoveries"] == len(kills)
    assert read_summary(run)["goodput"]["seconds"]["recovery"] > 0
    assert_same_history(run, quiet.run)


@pytest.mark.slow
def test_killed_around_the_loop(disturbed: Disturbed, quiet: Any) -> None:
    """While it starts, meets the others, evaluates, saves, tests and exports."""
    run = disturbed(
        "kill(worker=-1, step=0, phase=start)",
        "kill(worker=1, step=0, phase=join)",
        "kill(worker=0, step=3, phase=save)",
        "kill(worker=1, step=0, phase=evaluate, microbatch=1)",
        "kill(worker=0, step=18, phase=finish)",
        workers=2,
    )
    told = [(line["step"], line["what"]) for line in recovered(run)]
    assert [step for step, _ in told] == [0, 3, 6, 18], told
    assert told[0][1].count("was killed by SIGKILL") == 2, "while it started, and while it met the others"
    assert_same_history(run, quiet.run)


# Other ways to be lost


def test_crash_exit_exception_and_pause(disturbed: Disturbed, quiet: Any, capfd: pytest.CaptureFixture[str]) -> None:
    run = disturbed(
        "crash(worker=1, step=3, phase=contribute)",
        "quit(worker=0, step=6, phase=update)",
        "fail(worker=1, step=9, phase=reduce)",
        "pause(worker=0, step=12, phase=contribute)",
        workers=2,
    )
    assert [(line["step"], line["what"]) for line in recovered(run)] == [
        (2, "worker 1 was killed by SIGSEGV"),
        (5, "worker 0 ended with exit code 9"),
        (8, "worker 1 failed (OSError: a fault that was requested)"),
    ]
    told = "".join(capfd.readouterr())
    for sign in ("Fatal Python error: Segmentation fault", "OSError: a fault that was requested", "fault_injection.py"):
        assert sign in told, "the run goes on, and says why a worker was lost"
    assert [bool(line["trace"]) for line in read_ledger(run, "Recovered")] == [True, False, True]
    assert "fault_injection.py" in read_ledger(run, "Recovered")[2]["trace"]
    summary, done = read_summary(run), read_ledger(run, "StepDone")
    assert summary["steps"] == len(done) and "timed_steps" not in summary
    samples = sum(line["samples"] for line in done)  # of all steps, not of those since the last loss
    assert summary["samples_per_second"] * summary["seconds"] == pytest.approx(samples, rel=0.01)
    assert_same_history(run, quiet.run)


def test_stacks_of_a_crash_that_ends_the_run(disturbed: Disturbed, tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as told:
        disturbed("crash(worker=1, step=4, phase=update)", workers=2, recovery={"restarts": 0})
    assert "worker 1 was killed by SIGSEGV; this was loss 1, and recovery.restarts = 0" in str(told.value)
    assert "Fatal Python error: Segmentation fault" in str(told.value) and "fault_injection.py" in str(told.value)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_exception_that_comes_again_ends_the_run(command: Command, quiet: Any, tmp_path: Path) -> None:
    fault = "fail(worker=1, step=4, phase=contribute, times=2)"
    code, _, err = command("train", quiet.recipe, "--run-folder", "run", "-w", 2, "--fault", fault)
    assert code == 1
    assert "worker 1 failed (OSError: a fault that was requested) twice with the same error at step 4" in err
    assert err.count("Traceback") == 1 and err.count("OSError: a fault that was requested") == 2
    assert "--resume" in err
    assert places(tmp_path / "run") == [(3, "worker 1")], "it was tried again once"
    assert [line["step"] for line in read_ledger(tmp_path / "run", "StepDone")] == [1, 2, 3]


# Without an end: stopped, live-locked, blocked, stuck in an exchange


HANGS = {"recovery": {"hang_factor": 3.0}}  # seconds, since a step takes less than one: far more than load can cost


def read_stacks(run: Path, hang: int) -> dict[str, str]:
    (folder,) = (run / "hangs").glob(f"{hang:03d}-*")
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_a_worker_that_hangs_is_found_and_named(disturbed: Disturbed, quiet: Any) -> None:
    run = disturbed(
        "stop(worker=1, step=4, phase=update)",
        "hang(worker=0, step=7, phase=contribute)",
        "block(worker=1, step=10, phase=load)",
        workers=2,
        **HANGS,
    )
    stopped, hanging, blocked = recovered(run)
    assert (hanging["step"], blocked["step"]) == (6, 9)
    assert 3 <= stopped["step"] <= 6, "continued to write its stacks down, it may have gone on for a moment"
    assert re.fullmatch(
        r"worker 1 made no progress for \d+ s \(at update in step 4, stopped by a signal\); all stacks are in (.*)",
        stopped["what"],
    )
    assert re.match(
        r"worker 0 made no progress for \d+ s \(at contribute \(microbatch 0 of step 7\)\); all", hanging["what"]
    )
    assert re.match(
        r"worker 1 made no progress for \d+ s \(at load \(microbatch 2 of step 10\)\); all", blocked["what"]
    )
    assert len(list((run / "hangs").iterdir())) == 3
    frames = ((stopped, "File "), (hanging, "in _hang"), (blocked, "in _block"))  # who was stopped may have gone on
    for number, (line, frame) in enumerate(frames, start=1):
        stacks = read_stacks(run, number)
        assert list(stacks) == ["worker-0.txt", "worker-1.txt"]
        assert line["what"].startswith(stacks["worker-0.txt"].splitlines()[0]), "the same words"
        lost = int(line["what"][len("worker ")])
        assert frame in stacks[f"worker-{lost}.txt"]
        assert all("most recent call first" in text and "was at " in text for text in stacks.values())
        assert line["what"].count("worker ") == 1, "who waits for it is not suspected"
    assert_same_history(run, quiet.run)


@pytest.mark.slow
def test_who_takes_long_to_come_back_from_a_lost_group_is_not_suspected(
    disturbed: Disturbed, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SimpleNamespace(collect=lambda: time.sleep(7), freeze=lambda: None)  # as with a great many objects
    monkeypatch.setattr(handle, "gc", slow)
    run = disturbed("kill(worker=1, step=4, phase=load)", workers=2, **HANGS)
    (line,) = recovered(run)
    assert line["what"].startswith("worker 1 was killed by SIGKILL") and line["what"].count("worker ") == 1
    assert not (run / "hangs").exists()
    assert_same_history(run, quiet.run)


def test_a_worker_that_is_stuck_in_an_exchange(
    disturbed: Disturbed, quiet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has entered, as all others have, so all are found; from outside nobody can tell whose fault it is."""
    honest = Shared.add_integers

    def add_integers(self: Shared, values: Tensor) -> Tensor:
        if self.rank == 1 and (tmp_path / "run" / "checkpoints" / "step-00000006").exists():
            with stuck.open("a") as file:
                file.write("once\n")
            while stuck.read_text().count("once") == 1:
                time.sleep(0.05)
                if os.getppid() == 1:
                    os._exit(1)
        return honest(self, values)

    stuck = tmp_path / "stuck"
    monkeypatch.setattr(Shared, "add_integers", add_integers)
    run = disturbed(workers=2, **HANGS)
    (line,) = recovered(run)
    assert line["what"].count("in the exchange ") >= 1
    assert "worker 1 made no progress" in line["what"]
    assert "in add_integers" in read_stacks(run, 1)["worker-1.txt"]
    assert set(read_stacks(run, 1)) == {f"worker-{rank}.txt" for rank in range(2)}
    assert_same_history(run, quiet.run)


def test_a_task_that_blocks_while_others_wait_is_the_one_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, my_rank: Callable[[], int]
) -> None:
    class Blocking(zoo.Classified):
        def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
            if my_rank() == 2 and not mark.exists():
                mark.touch()
                time.sleep(600)
            return super().loss(module, microbatch)

    mark = tmp_path / "mark"
    mark.touch()  # not in the probe
    train = {"epochs": 2.0, "samples_per_step": 15, "microbatches": 4, "learning_rate": 0.05}
    expected = unisono.train(Blocking(zoo.bag), zoo.words(), workers=1, run=tmp_path / "one", quiet=True, **train)

    def commit(self: TrainState, step: int, *more: Any) -> None:
        committed(self, step, *more)
        if step == 2 and not first.exists():
            first.touch()
            mark.unlink(missing_ok=True)

    first, committed = tmp_path / "first", TrainState.commit
    monkeypatch.setattr(TrainState, "commit", commit)
    run = unisono.train(Blocking(zoo.bag), zoo.words(), workers=3, run=tmp_path / "three", quiet=True, **train, **HANGS)
    (line,) = recovered(run.folder)
    assert re.match(
        r"worker 2 made no progress for \d+ s \(at contribute \(microbatch 3 of step 3\)\); all", line["what"]
    )
    assert "in loss" in read_stacks(run.folder, 1)["worker-2.txt"]
    assert run.weights_sha256 == expected.weights_sha256


# Fewer workers, and when it ends


def test_the_others_take_over_the_share(command: Command, quiet: Any, tmp_path: Path) -> None:
    faults = ("kill(worker=2, step=5, phase=update)", "kill(worker=0, step=9, phase=commit)")
    options = [workload for fault in faults for workload in ("--fault", fault)]
    settings = [workload for setting in OFTEN for workload in ("--set", setting)]
    run = tmp_path / "run"
    code, _, err = command(
        "train", quiet.recipe, "--run-folder", run, "-w", 3, "--on-loss", "shrink", "-q", *options, *settings
    )
    assert code == 0, err
    assert [(line["step"], line["workers"]) for line in recovered(run)] == [(4, 2), (8, 1)]
    assert read_summary(run)["workers"] == 1 and read_summary(run)["recoveries"] == 2
    assert_same_history(run, quiet.run)


def test_the_last_worker_is_replaced_even_so(disturbed: Disturbed, quiet: Any) -> None:
    run = disturbed(
        *[f"kill(worker={worker}, step=5, phase=begin)" for worker in (0, 1)], workers=2, recovery={"on_loss": "shrink"}
    )
    (line,) = recovered(run)
    assert (line["step"], line["workers"]) == (4, 1)
    assert {f"worker {worker} was killed" in line["what"] for worker in (0, 1)} == {True}, "told together"
    assert_same_history(run, quiet.run)


@pytest.mark.parametrize("kind", ["first start", "replacement"])
def test_starts_that_do_not_end_spend_the_budget(
    disturbed: Disturbed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Starts hang again and again: the run says so, and ends."""
    mark = tmp_path / "starts hang"

    def kill() -> None:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def block() -> None:
        while mark.exists():
            signal.pause()

    monkeypatch.setattr(hang_detection, "START_PATIENCE", 0.02)
    monkeypatch.setitem(KINDS, "block", block)
    monkeypatch.setitem(KINDS, "kill", kill)
    if kind == "first start":
        mark.touch()
    faults = "block(worker=-1, step=0, phase=start, times=99)", "kill(worker=1, step=4, phase=update)"
    with pytest.raises(WorkerError, match=r"worker \d was not ready \d+ s after its start.*so the fault repeats"):
        disturbed(*faults, workers=2, recovery={"backoff_seconds": 0.0})


def test_no_restarts(disturbed: Disturbed, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"worker 0 was killed by SIGKILL.*recovery.restarts = 0.*--resume") as told:
        disturbed("kill(worker=0, step=5, phase=update)", workers=2, recovery={"restarts": 0})
    assert told.value.exit_code == 1
    assert recovered(tmp_path / "run") == []
    (step,) = re.findall(r"Everything up to step (\d) is saved", str(told.value))
    assert step in "45"  # an older one that was being written is given up for it
    assert (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" / "state.json").exists()


def test_a_fault_that_repeats_ends_the_run_after_waiting(command: Command, quiet: Any, tmp_path: Path) -> None:
    fault = "kill(worker=1, step=4, phase=update, times=5)"
    code, _, err = command(
        "train", quiet.recipe, "--run-folder", "run", "-w", 2, "--fault", fault, "-q", "--set", "recovery.backoff_seconds=0.4"
    )  # fmt: skip
    assert code == 1
    assert "worker 1 was killed by SIGKILL" in err and "so the fault repeats" in err
    assert "this was loss 3 in a row at step 4" in err, "the step that never ends, counted as the user counts"
    first, second = recovered(tmp_path / "run")
    assert (first["step"], second["step"]) == (3, 3)
    assert second["seconds"] >= 0.4, "the second attempt has waited"


# Models with something that is easily got wrong


CONVOLUTION = {"clip_norm": 0.5, "ema_decay": 0.8, "evaluate": {"every_steps": 2, "keep_best": True}}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], dict[str, Any]]] = {
    "convolution, clipped, averaged, best": (zoo.convolution, zoo.images, CONVOLUTION),
    "attention in bf16": (zoo.Attention, zoo.words, {"precision": "bf16"}),
    "tied, frozen, dropped": (zoo.Odd, zoo.words, {"optimizer": "lion", "learning_rate": 1e-3}),
}


def train_model(name: str, run: Path, workers: int, *faults: str) -> Path:
    build, data, settings = MODELS[name]
    every = {"samples_per_step": 20, "microbatches": 4, "epochs": 3.0, "learning_rate": 0.02}
    more = {"validation": data(11, seed=8), "test": data(9, seed=9), "checkpoint": {"every_steps": 2, "keep": 9}}
    return unisono.train(
        zoo.Classified(build),
        data(),
        workers=workers,
        run=run,
        quiet=True,
        faults=faults,
        **{**every, **more, **settings},
    ).folder


@pytest.fixture(scope="module")
def models(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of one worker each, to which nothing happens."""
    found: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in found:
            found[name] = train_model(name, tmp_path_factory.mktemp("model") / "run", 1)
        return found[name]

    return find


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        pytest.param(name, workers, marks=[pytest.mark.slow] * (workers == 2))
        for name, workers in zip(MODELS, (3, 2, 3), strict=True)
    ],
)
def test_models_survive(name: str, workers: int, models: Callable[[str], Path], tmp_path: Path) -> None:
    faults = f"kill(worker={workers - 1}, step=4, phase=update)", "kill(worker=0, step=7, phase=commit)"
    run = train_model(name, tmp_path / "run", workers, *faults)
    assert places(run) == [(3, f"worker {workers - 1}"), (6, "worker 0")]
    assert_same_history(run, models(name))


# Errors that no restart can help


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Losses that the budget has heard of."""
    heard: list[str] = []
    honest = RestartBudget.spend

    def spend(self: RestartBudget, loss: Any) -> str:
        heard.append(loss.what)
        return honest(self, loss)

    monkeypatch.setattr(RestartBudget, "spend", spend)
    return heard


class Forgetful(nn.Module):
    """Keeps a number where no snapshot finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, zoo.CLASSES)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x.float()) * self.calls


@pytest.mark.parametrize(
    ("build", "settings", "error", "message"),
    [
        (Forgetful, {}, ImpureError, "calls"),
        (zoo.bag, {"learning_rate": 1e38, "optimizer": "sgd"}, DivergedError, "not finite|is nan|is inf"),
        (zoo.bag, {"evaluate": {"every_steps": 2, "metric": "beauty"}}, RecipeError, "beauty"),
    ],
    ids=["impure", "diverged", "recipe"],
)
def test_errors_on_purpose_end_the_run_at_once(
    build: Callable[[], nn.Module],
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    losses: list[str],
) -> None:
    options = {"samples_per_step": 15, "microbatches": 4, "epochs": 3.0, "validation": zoo.words(11, 8), **settings}
    with pytest.raises(error, match=message):
        unisono.train(zoo.Classified(build), zoo.words(), workers=2, run=tmp_path / "run", quiet=True, **options)
    assert losses == []
    assert not (tmp_path / "run" / "summary.json").exists()
    assert np.all([not path.name.startswith(".") for path in tmp_path.rglob("*")])
