"""The start of a run: several at once, each with a folder of its own; signals before the first step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import unisono
from learned import SETTINGS, Dropped, make_columns
from toy import SECONDS_AT_MOST, make_toy, run_python
from unisono.errors import Interrupted, Preempted, RecipeError, RunFolderError, UserError
from unisono.processes.forking import fork
from unisono.runtime import signals
from unisono.storage.run_folder import begin, choose_folder, new_folder, remove_begun
from unisono.tracking import ledger

TOGETHER = 6


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, warm: None) -> None:
    monkeypatch.setattr(ledger, "draw_curves", lambda lines, path: None)


def train(task: unisono.Task | None = None, **options: Any) -> unisono.Trained:
    return unisono.train(task or Dropped(), make_columns(), quiet=True, **{**SETTINGS, "workers": 1, **options})


def start_together(act: Callable[[int], str], count: int = TOGETHER) -> list[str]:
    """What `act(number)` gives, or the kind of its error, in so many processes that begin at the same moment."""
    waiting, opening = os.pipe()
    results, writing = os.pipe()

    def main(number: int) -> None:
        os.close(opening)
        os.read(waiting, 1)  # until all have been started
        try:
            found = act(number)
        except UserError as error:
            found = type(error).__name__
        os.write(writing, json.dumps(found).encode() + b"\n")
        os._exit(0)

    children = [fork(main, (number,), "start") for number in range(count)]
    os.close(opening)
    for child in children:
        child.join(SECONDS_AT_MOST)
    os.close(writing)
    with os.fdopen(results) as file:
        return [json.loads(line) for line in file]


def test_folders_without_a_name_are_all_different(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = start_together(lambda number: " ".join(str(new_folder("sweep", None, make=True)) for _ in range(20)))
    assert sorted(" ".join(found).split()) == [f"runs/sweep-{number:03d}" for number in range(1, 20 * TOGETHER + 1)]


def test_one_of_several_gets_the_folder_with_a_name(tmp_path: Path) -> None:
    found = start_together(lambda number: str(new_folder("sweep", tmp_path / "run", make=True)))
    assert sorted(found) == sorted([str(tmp_path / "run"), *["RunFolderError"] * (TOGETHER - 1)])


def test_one_of_several_begins_in_a_folder(tmp_path: Path) -> None:
    """Where workers choose alike, and worker 0 of each run makes the folder later."""

    def act(number: int) -> str:
        path = new_folder("sweep", tmp_path / "run", make=False)
        begin(path)
        return str(path)

    found = start_together(act)
    assert sorted(found) == sorted([str(tmp_path / "run"), *["RunFolderError"] * (TOGETHER - 1)])


def test_trainings_that_start_together_keep_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep: each has its own recipe, and its own model."""
    monkeypatch.chdir(tmp_path)
    found = start_together(lambda number: str(train(learning_rate=0.01 * (number + 1)).folder), 3)
    assert sorted(found) == [f"runs/Dropped-{number:03d}" for number in (1, 2, 3)]
    rates = {(tmp_path / place / "recipe.toml").read_text().split("learning_rate = ")[1].split()[0] for place in found}
    assert rates == {"0.01", "0.02", "0.03"}
    assert len({json.loads((tmp_path / place / "summary.json").read_text())["weights_sha256"] for place in found}) == 3


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="keep_best"):
        train(run=tmp_path / "run", evaluate={"keep_best": True, "metric": "loss"})
    with pytest.raises(RecipeError, match="observers"):
        train(run=tmp_path / "run", observers=[object()])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    counted: list[int] = []
    for place in (tmp_path / "file" / "run", tmp_path / ("n" * 300), "a\0b"):
        with pytest.raises(RunFolderError, match="cannot be made"):
            train(Dropped(on_loss=lambda: counted.append(1)), run=place)
    assert counted == []


@pytest.mark.parametrize("resume", [False, "auto", True])
def test_a_path_that_no_system_has_is_refused(tmp_path: Path, resume: bool | str) -> None:
    with pytest.raises(RunFolderError):
        choose_folder("run", "a\0b", resume=resume, make=True)


def test_only_what_a_start_has_written_is_removed(tmp_path: Path) -> None:
    for name in ("recipe.toml", "fingerprint.json", ".running"):
        (tmp_path / name).touch()
    (tmp_path / "metrics.jsonl").touch()
    assert "as it was" in remove_begun(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / "metrics.jsonl").unlink()
    assert remove_begun(tmp_path) == "no run folder was left behind."
    assert not tmp_path.exists()


# ---- signals before the first step

EARLY = """
import os
try:
    for number in os.environ["SENT"].split():
        os.kill(os.getpid(), int(number))
except Exception:
    pass  # as some imports do
"""


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ([signal.SIGTERM], 75),
        pytest.param([signal.SIGUSR1, signal.SIGTERM], 75, marks=pytest.mark.slow),
        pytest.param([signal.SIGHUP], 75, marks=pytest.mark.slow),
        pytest.param([signal.SIGINT], 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_the_command_line_imports(tmp_path: Path, sent: list[signal.Signals], code: int) -> None:
    """The task's module is imported before the run has a folder; what it swallows is an exception, not a signal."""
    make_toy(tmp_path)
    (tmp_path / "early.py").write_text(EARLY + "raise SystemExit('went on')\n")
    ended = run_python(
        ["-m", "unisono", "train", "toy.toml", "--task", "early.py:Task"],
        tmp_path,
        SENT=" ".join(str(int(signum)) for signum in sent),
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stderr == "unisono: stopped before the first step; no run folder was left behind.\n"
    assert not (tmp_path / "runs").exists()


def test_signals_between_the_folder_and_the_handlers_are_kept() -> None:
    """And those that no run took over come again."""
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda signum, frame: heard.append(signum))
    try:
        with signals.noted():
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            with signals.StopSignals() as stop:
                assert stop.asked == [signal.SIGUSR1] * 2
            assert heard == []
            os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


class Sender:
    """A launcher's name is looked up after the folder is made: asked for its methods, it sends signals."""

    def __init__(self, *sent: signal.Signals, name: str) -> None:
        self._sent = sent
        self._name = name

    def __getattr__(self, name: str) -> Any:
        from unisono.runtime.launchers.launcher import find_launcher

        if name == "train":
            for signum in self._sent:
                os.kill(os.getpid(), signum)
            self._sent = ()
        return getattr(find_launcher(self._name), name)


@pytest.mark.parametrize("name", ["in_process", "fork"])
@pytest.mark.parametrize("sent", [[signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]], ids=len)
def test_a_signal_after_the_folder_was_made_leaves_none(tmp_path: Path, name: str, sent: list[signal.Signals]) -> None:
    with pytest.raises(Preempted, match="before the first step; no run folder was left behind"):
        train(run=tmp_path / "run", launcher=Sender(*sent, name=name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["in_process", "fork"])
def test_a_signal_at_the_start_of_a_resumed_run_does_not_say_that_nothing_is_left(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    train(run=run, checkpoint={"every_steps": 4, "keep": 9}, max_steps=4)
    (run / "summary.json").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(Preempted, match=r"before the first step; '.*run' is as it was before. Go on with --resume"):
        options: dict[str, Any] = {"checkpoint": {"every_steps": 4, "keep": 9}, "max_steps": 4}
        train(run=run, resume=True, launcher=Sender(signal.SIGTERM, name=name), **options)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


class Chain:
    """Sends this process signals, one with each loss from the first one of a step on."""

    def __init__(self, *sent: signal.Signals, after: int) -> None:
        self._sent = list(sent)
        self._after = after

    def __call__(self) -> None:
        self._after -= 1
        if self._after < 0 and self._sent:
            os.kill(os.getpid(), self._sent.pop(0))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([signal.SIGTERM] * 3, "stopped after step"),
        ([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP], "stopped after step"),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], "stopped at once"),
    ],
    ids=["the same", "others", "at once"],
)
def test_a_chain_of_signals_loses_no_checkpoint(tmp_path: Path, sent: list[signal.Signals], message: str) -> None:
    run, checkpoint = tmp_path / "run", {"every_steps": 1, "keep": 99}
    whole = train(run=tmp_path / "whole", checkpoint=checkpoint)
    with pytest.raises(Preempted, match=message):
        train(Dropped(on_loss=Chain(*sent, after=20)), run=run, checkpoint=checkpoint)
    assert (run / "checkpoints" / "step-00000001").is_dir()
    resumed = train(run=run, checkpoint=checkpoint, resume=True)
    assert resumed.weights_sha256 == whole.weights_sha256


def test_a_second_signal_while_a_run_is_closed_changes_nothing(tmp_path: Path) -> None:
    """Whatever is closed at the end is closed, and the first signal names the end."""

    class Closing:
        closed = False

        def observe(self, event: object) -> None:
            pass

        def close(self) -> None:
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                os.kill(os.getpid(), signum)
            self.closed = True

    observer = Closing()
    with pytest.raises(Interrupted, match="stopped after step") as stopped:
        train(Dropped(on_loss=Chain(signal.SIGTERM, after=20)), run=tmp_path / "run", observers=[observer])
    assert type(stopped.value) is Preempted and observer.closed


def test_a_signal_after_the_end_does_not_change_the_exit_code(tmp_path: Path) -> None:
    """The command line ignores it: the process is ending."""
    script = (
        "import os, signal\n"
        "from unisono.runtime import signals\n"
        "signals.end_early()\n"
        "with signals.noted():\n"
        "    pass\n"
        "for signum in signals.ASKING:\n"
        "    os.kill(os.getpid(), signum)\n"
        "raise SystemExit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=SECONDS_AT_MOST, check=False).returncode == 3
