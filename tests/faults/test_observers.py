"""Observers of real runs: the step at which one ends a run, what its failure leaves, and loggers over losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from histories import read_ledger, read_warnings

import unisono
from toy import make_toy
from unisono.tracking import logger

STEPS = 18
KILL = "kill(worker=1, step=3, phase=update)"


@pytest.fixture
def recipe(warm: None, tmp_path: Path) -> Path:
    return make_toy(tmp_path)


class Recorder:
    """A logger that appends the step, or the name, of each event to a file."""

    def __init__(self, context: logger.LoggerContext) -> None:
        context.folder.mkdir(parents=True, exist_ok=True)
        self._file = (context.folder / "seen.txt").open("a")

    def observe(self, event: unisono.events.Event) -> None:
        name = event.step if isinstance(event, unisono.events.StepDone) else type(event).__name__
        self._file.write(f"{name}\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Killed(Recorder):
    """One that takes its whole process with it, as a tool's crash would."""

    def observe(self, event: unisono.events.Event) -> None:
        if isinstance(event, unisono.events.StepDone) and event.step == 4:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logger, "_registered", {"recorder": Recorder, "killed": Killed})
    yield


def read_steps(run: Path) -> list[int]:
    lines = (run / "recorder" / "seen.txt").read_text().splitlines()
    return [int(line) for line in lines if line.isdigit()]


class Stopper:
    """Asks for the end at a step."""

    def __init__(self, at: int, answer: Any = unisono.STOP) -> None:
        self.at, self.answer = at, answer
        self.seen: list[int] = []
        self.ends: list[str] = []

    def observe(self, event: unisono.events.Event) -> Any:
        if isinstance(event, unisono.events.StepDone):
            self.seen.append(event.step)
            if event.step == self.at:
                if isinstance(self.answer, Exception):
                    raise self.answer
                return self.answer
        if isinstance(event, unisono.events.RunEnded):
            self.ends.append(event.summary["stopped_by"])
        return None

    def close(self) -> None:
        self.ends.append("closed")


def test_a_run_ends_at_the_same_step_for_any_number_of_workers_and_losses(recipe: Path, tmp_path: Path) -> None:
    """Asked at step 3, it ends after step 4; also where a worker is lost before or after that step is committed."""
    histories: tuple[tuple[int, tuple[str, ...]], ...] = (
        (1, ()), (2, ()), (3, ()), (2, ("kill(worker=0, step=4, phase=update)",)), (2, ("kill(worker=0, step=4, phase=report)",)),
    )  # fmt: skip
    hashes = set()
    for number, (workers, faults) in enumerate(histories):
        stopper = Stopper(3)
        done = unisono.train(
            recipe, workers=workers, run=tmp_path / f"run-{number}", quiet=True, observers=[stopper], faults=faults
        )
        assert (done.summary["steps"], done.summary["stopped_by"]) == (4, "observer Stopper")
        assert stopper.seen == [1, 2, 3, 4]
        assert stopper.ends == ["observer Stopper", "closed"]
        assert done.summary["test"] and (done.folder / "model" / "model.safetensors").exists()
        hashes.add((done.weights_sha256, done.summary["optimizer_sha256"]))
    assert len(hashes) == 1


def test_a_slow_observer_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    """The step waits until it has been seen, and that is no hang."""
    import time

    class Slow(Stopper):
        def observe(self, event: unisono.events.Event) -> Any:
            time.sleep(0.05)
            return super().observe(event)

    done = unisono.train(recipe, workers=2, run=tmp_path / "run", quiet=True, observers=[Slow(2)])
    assert done.summary["steps"] == 3 and done.summary["recoveries"] == 0


def test_asking_at_the_last_step_changes_nothing(recipe: Path, tmp_path: Path) -> None:
    done = unisono.train(recipe, workers=1, run=tmp_path / "run", quiet=True, observers=[Stopper(STEPS)])
    assert (done.summary["steps"], done.summary["stopped_by"]) == (STEPS, None)


def test_a_failing_observer_ends_the_run_by_its_name_and_what_was_trained_is_kept(recipe: Path, tmp_path: Path) -> None:
    bad = Stopper(5, ValueError("my fault"))
    with pytest.raises(
        unisono.ObserverError, match=r"Stopper failed on StepDone of step 5: ValueError: my fault\..*is saved"
    ) as raised:
        unisono.train(recipe, workers=2, run=tmp_path / "run", quiet=True, observers=[bad])
    assert isinstance(raised.value.__cause__, ValueError)
    assert bad.ends == ["closed"]
    done = unisono.train(recipe, workers=1, run=tmp_path / "run", resume=True, quiet=True)
    whole = unisono.train(recipe, workers=1, run=tmp_path / "whole", quiet=True)
    assert done.weights_sha256 == whole.weights_sha256


def test_a_logger_gets_each_step_once_over_a_loss_and_a_resume(recipe: Path, tmp_path: Path, offered: None) -> None:
    given: dict[str, Any] = {
        "workers": 2,
        "run": tmp_path / "run",
        "quiet": True,
        "overrides": ['tracking.loggers=["recorder"]', "checkpoint.every_steps=4"],
    }
    with pytest.raises(unisono.WorkerError):  # ends in the middle of step 11: the newest checkpoint on disk may be any
        unisono.train(recipe, **given, recovery={"restarts": 1}, faults=[KILL, "kill(worker=1, step=11, phase=update)"])
    before = read_steps(tmp_path / "run")
    assert before == list(range(1, len(before) + 1)) and len(before) >= 9
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:  # go on from an older one: steps come again
        import shutil

        shutil.rmtree(folder)
    unisono.train(recipe, **given, resume=True)
    assert read_steps(tmp_path / "run") == list(range(1, STEPS + 1))
    assert "Recovered" in (tmp_path / "run" / "recorder" / "seen.txt").read_text()


def test_a_crash_of_the_loggers_costs_a_warning(recipe: Path, tmp_path: Path, offered: None) -> None:
    done = unisono.train(recipe, workers=2, run=tmp_path / "run", quiet=True, overrides=['tracking.loggers=["killed"]'])
    assert done.summary["steps"] == STEPS
    warnings = read_warnings(tmp_path / "run")
    assert len(warnings) == 1 and "the process of the loggers was killed by SIGKILL" in warnings[0]


def test_what_cannot_be_logged_to_is_refused_before_anything_begins(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(unisono.RecipeError, match="'wandbb'"):
        unisono.train(recipe, run=tmp_path / "run", overrides=['tracking.loggers=["wandbb"]'])
    assert not (tmp_path / "run").exists()


def test_stopping_early_is_said_in_the_summary(recipe: Path, tmp_path: Path) -> None:
    settings = (
        "data.validation_fraction=0.2",
        "evaluate.every_steps=1",
        "evaluate.patience=1",
        "train.learning_rate=1e-12",
        'evaluate.metric="accuracy"',
    )
    done = unisono.train(recipe, workers=1, run=tmp_path / "run", quiet=True, overrides=settings)
    assert done.summary["steps"] < STEPS and done.summary["stopped_by"] == "evaluate.patience"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped_by"] == "evaluate.patience"
    assert read_ledger(tmp_path / "run", "Notice")
