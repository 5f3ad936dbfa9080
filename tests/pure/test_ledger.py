"""The ledger: every step exactly once and whole, whatever is told twice, forgotten, removed, or refused by the disk."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unisono.errors import RunFolderError
from unisono.tracking import events
from unisono.tracking import ledger as metrics
from unisono.tracking.ledger import Ledger, read_ledger

SUMMARY = {"name": "toy", "steps": 3}


def started(start_step: int = 0, steps: int = 9) -> events.RunStarted:
    return events.RunStarted(
        name="toy", folder="run", workers=2, device="cpu", threads=1, microbatches_each=[2, 2], samples_per_step=16,
        train_samples=96, steps=steps, steps_per_epoch=6, start_step=start_step, parameters=10, fingerprint="f", pure=True,
    )  # fmt: skip


def done(step: int, seconds: float = 0.5) -> events.StepDone:
    return events.StepDone(
        step=step, epoch=step / 6, loss=1 / step, gradient_norm=1.0, learning_rate=0.1, samples=16, tokens=64, seconds=seconds,
    )  # fmt: skip


def evaluated(step: int, split: str = "validation") -> events.Evaluated:
    return events.Evaluated(step=step, epoch=step / 6, split=split, scores={"loss": 1.0, "accuracy": 0.5}, best=False)


def saved(step: int) -> events.CheckpointWritten:
    return events.CheckpointWritten(step=step, path=f"step-{step}")


def recovered(step: int) -> events.Recovered:
    return events.Recovered(
        step=step, what="worker 1 was killed by SIGKILL", workers=2, wasted_seconds=0.1, seconds=0.2
    )


def names(folder: Path) -> list[Any]:
    """Each line in short: its name, and its step if it has one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["event"], line["step"]) if "step" in line else line["event"] for line in lines]


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_ledger(folder / "metrics.jsonl") if line["event"] == "StepDone"]


class Disk:
    """Stands in for `os.write`: works, fails with an error, or takes `room` bytes more and fails then."""

    def __init__(self) -> None:
        self.error = 0
        self.room = 0
        self._write = os.write

    def write(self, file: int, content: Any) -> int:
        if not self.error:
            return self._write(file, content)
        if self.room:
            taken = min(self.room, len(content))
            self.room -= taken
            return self._write(file, bytes(content[:taken]))
        raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(metrics.os, "write", disk.write)
    return disk


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def ledger(tmp_path: Path, told: list[str]) -> Iterator[Ledger]:
    """Of a run that has started, in tmp_path/run."""
    ledger = Ledger(tmp_path / "run", warn=told.append)
    ledger.observe(started())
    yield ledger
    ledger.close()


def observe_all(ledger: Ledger, *told: events.Event) -> None:
    for event in told:
        ledger.observe(event)


# What a line is


def test_a_line_is_the_event_and_when(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.time, "time", lambda: 1_700_000_000.123456)
    observe_all(ledger, done(1), events.Notice(message="mind", warning=True), recovered(1))
    lines = read_ledger(tmp_path / "run" / "metrics.jsonl")
    assert lines[1]["event"] == "StepDone" and lines[1]["loss"] == 1.0
    assert list(lines[2].items()) == [
        ("event", "Notice"), ("message", "mind"), ("warning", True), ("clock", lines[2]["clock"]),
        ("when", 1_700_000_000.123),
    ]  # fmt: skip
    assert all(list(line)[-1] == "when" for line in lines)
    assert lines[0]["since"] <= lines[0]["when"]


def test_a_line_is_there_when_observe_returns(ledger: Ledger, tmp_path: Path) -> None:
    for step in range(1, 5):
        ledger.observe(done(step))
        assert steps(tmp_path / "run")[-1] == step


def test_nothing_is_made_before_the_run_starts_and_nothing_told_is_lost(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run")
    observe_all(ledger, events.Notice(message="preparing"), recovered(0))
    assert not (tmp_path / "run").exists()
    observe_all(ledger, started(), done(1))
    assert names(tmp_path / "run") == ["RunStarted", "Notice", ("Recovered", 0), ("StepDone", 1)]
    ledger.close()
    never = Ledger(tmp_path / "never")
    never.observe(events.Notice(message="preparing"))
    never.close()
    assert not (tmp_path / "never").exists()


# Told twice


def test_what_is_told_twice_is_there_once(ledger: Ledger, tmp_path: Path) -> None:
    observe_all(ledger, done(1), done(2), evaluated(2), saved(2), recovered(2))
    observe_all(ledger, done(2), evaluated(2), saved(2), done(1), evaluated(2, "test"), done(3), saved(3))
    assert names(tmp_path / "run") == [
        "RunStarted", ("StepDone", 1), ("StepDone", 2), ("Evaluated", 2), ("CheckpointWritten", 2), ("Recovered", 2),
        ("Evaluated", 2), ("StepDone", 3), ("CheckpointWritten", 3),
    ]  # fmt: skip


def test_two_alike_losses_are_two(ledger: Ledger, tmp_path: Path) -> None:
    observe_all(ledger, recovered(0), recovered(0))
    assert names(tmp_path / "run").count(("Recovered", 0)) == 2


# Resumed


def go_on(folder: Path, start_step: int, *told: events.Event) -> list[Any]:
    ledger = Ledger(folder)
    observe_all(ledger, started(start_step), *told)
    ledger.close()
    return names(folder)


def test_resuming_forgets_later_steps_and_says_so(ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    observe_all(
        ledger, done(1), saved(1), recovered(1), done(2, 0.25), evaluated(2), saved(2), done(3, 0.5), recovered(3)
    )
    ledger.close()
    found = go_on(folder, 1, done(1), saved(1), done(2), evaluated(2), saved(2))
    assert found == [
        "RunStarted", ("StepDone", 1), ("CheckpointWritten", 1), ("Recovered", 1), ("Recovered", 3),  # what befell it stays
        "RunStarted", ("Resumed", 1), ("StepDone", 2), ("Evaluated", 2), ("CheckpointWritten", 2),
    ]  # fmt: skip
    resumed = read_ledger(folder / "metrics.jsonl")[6]
    assert list(resumed) == ["event", "step", "dropped_steps", "wasted_seconds", "clock", "when"]
    assert (resumed["dropped_steps"], resumed["wasted_seconds"]) == (2, 0.75)


def test_starting_over_is_told_as_resuming_from_nothing(ledger: Ledger, tmp_path: Path) -> None:
    observe_all(ledger, done(1), done(2))
    ledger.close()
    assert go_on(tmp_path / "run", 0, done(1)) == ["RunStarted", "RunStarted", ("Resumed", 0), ("StepDone", 1)]


def test_a_first_start_resumes_nothing(ledger: Ledger, tmp_path: Path) -> None:
    assert names(tmp_path / "run") == ["RunStarted"]


def test_a_run_that_starts_twice_in_one_session(ledger: Ledger, tmp_path: Path) -> None:
    observe_all(ledger, done(1), done(2), started(1), done(1), done(2))
    assert steps(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize("tail", [b'{"event": "StepDone", "st', b"\0\0\0\0", b"\xff\xfe", b"{}", b"7"])
def test_half_a_line_of_a_crash_is_removed(ledger: Ledger, tmp_path: Path, tail: bytes) -> None:
    observe_all(ledger, done(1), done(2))
    ledger.close()
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert read_ledger(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2
    assert go_on(tmp_path / "run", 2, done(3))[-4:] == [("StepDone", 2), "RunStarted", ("Resumed", 2), ("StepDone", 3)]


# The disk


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("room", [0, 1, 150])
def test_lines_wait_for_the_disk(
    ledger: Ledger, tmp_path: Path, disk: Disk, told: list[str], error: int, room: int
) -> None:
    folder = tmp_path / "run"
    ledger.observe(done(1))
    before = (folder / "metrics.jsonl").read_bytes()
    disk.error, disk.room = error, room
    observe_all(ledger, done(2), evaluated(2), done(3), done(3))
    assert (folder / "metrics.jsonl").read_bytes() == before, "half a line"
    assert len(told) == 1 and os.strerror(error) in told[0] and "metrics.jsonl" in told[0]
    disk.error = 0
    ledger.observe(done(4))
    assert names(folder)[1:] == [("StepDone", 1), ("StepDone", 2), ("Evaluated", 2), ("StepDone", 3), ("StepDone", 4)]
    assert len(told) == 2 and "written again" in told[1]
    disk.error = errno.ENOSPC
    ledger.observe(done(5))
    assert len(told) == 3, "each trouble is told"


def test_half_a_line_that_cannot_be_taken_back_at_once(
    ledger: Ledger, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk.error, disk.room = errno.EIO, 20
    with monkeypatch.context() as patched:
        patched.setattr(metrics.os, "ftruncate", fail)
        ledger.observe(done(1))
        disk.error = 0
        ledger.observe(done(2))
    ledger.observe(done(3))
    assert names(tmp_path / "run") == ["RunStarted", ("StepDone", 1), ("StepDone", 2), ("StepDone", 3)]


def test_a_write_that_is_short_for_once_is_finished(
    ledger: Ledger, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(metrics.os, "write", lambda file, content: write(file, bytes(content[:7])))
    observe_all(ledger, done(1), done(2))
    assert steps(tmp_path / "run") == [1, 2] and told == []


def test_close_tries_a_last_time(tmp_path: Path, disk: Disk) -> None:
    told: list[str] = []
    ledger = Ledger(tmp_path, warn=told.append)
    ledger.observe(started())
    disk.error = errno.ENOSPC
    ledger.observe(done(1))
    disk.error = 0
    ledger.close()
    ledger.close()
    assert steps(tmp_path) == [1] and len(told) == 2


def test_close_says_what_is_lost(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, write: object) -> None:
        raise RunFolderError("no place can be written")

    monkeypatch.setattr("unisono.tracking.ledger.write_or_rescue", refuse)
    told: list[str] = []
    ledger = Ledger(tmp_path, warn=told.append)
    ledger.observe(started())
    disk.error = errno.ENOSPC
    observe_all(ledger, done(1), done(2))
    ledger.close()
    assert len(told) == 2 and "2 lines" in told[1] and "No space" in told[1]


def test_the_disk_is_full_when_the_run_goes_on(ledger: Ledger, tmp_path: Path, disk: Disk) -> None:
    folder = tmp_path / "run"
    observe_all(ledger, done(1), done(2), done(3))
    ledger.close()
    before = (folder / "metrics.jsonl").read_bytes()
    disk.error = errno.ENOSPC
    second = Ledger(folder, warn=lambda _: None)
    observe_all(second, started(2), done(2), done(3), done(4))
    assert (folder / "metrics.jsonl").read_bytes() == before
    summary = second.complete(events.RunEnded(folder="run", summary=SUMMARY)).summary
    assert summary["resumes"] == 1, "what waits counts"
    disk.error = 0
    second.close()
    assert names(folder)[1:] == [
        ("StepDone", 1), ("StepDone", 2), "RunStarted", ("Resumed", 2), ("StepDone", 3), ("StepDone", 4),
    ]  # fmt: skip
    assert list(folder.iterdir()) == [folder / "metrics.jsonl"], "nothing temporary is left"


def test_warning_may_be_told_to_the_ledger_itself(tmp_path: Path, disk: Disk) -> None:
    told: list[str] = []

    def warn(message: str) -> None:
        told.append(message)
        ledger.observe(events.Notice(message=message, warning=True))

    ledger = Ledger(tmp_path, warn=warn)
    observe_all(ledger, started(), done(1))
    disk.error = errno.ENOSPC
    observe_all(ledger, done(2), done(3))
    disk.error = 0
    ledger.observe(done(4))
    ledger.close()
    assert len(told) == 2
    assert names(tmp_path)[1:] == [
        ("StepDone", 1),
        ("StepDone", 2),
        "Notice",
        ("StepDone", 3),
        ("StepDone", 4),
        "Notice",
    ]


# The folder


def remove_file(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()


def replace_file(folder: Path) -> None:
    other = folder / "other"
    other.write_text('{"event": "StepDone", "step": 1}\nhalf a li')
    other.rename(folder / "metrics.jsonl")


def move_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def cut_file(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 5)


@pytest.mark.parametrize("harm", [remove_file, shutil.rmtree, replace_file, move_folder])
def test_what_somebody_removed_is_put_back(
    ledger: Ledger, tmp_path: Path, told: list[str], harm: Callable[[Path], None]
) -> None:
    folder = tmp_path / "run"
    observe_all(ledger, done(1), evaluated(1))
    harm(folder)
    ledger.observe(done(2))
    ledger.observe(done(2))
    assert names(folder) == ["RunStarted", ("StepDone", 1), ("Evaluated", 1), ("StepDone", 2)]
    assert told == []


def test_no_line_is_glued_to_what_somebody_cut(ledger: Ledger, tmp_path: Path) -> None:
    observe_all(ledger, done(1), done(2))
    cut_file(tmp_path / "run")
    ledger.observe(done(3))
    assert names(tmp_path / "run") == ["RunStarted", ("StepDone", 1), ("StepDone", 3)]


def test_only_whole_lines_are_put_back(ledger: Ledger, tmp_path: Path) -> None:
    observe_all(ledger, done(1), done(2))
    cut_file(tmp_path / "run")
    remove_file(tmp_path / "run")
    ledger.observe(done(3))
    assert names(tmp_path / "run") == ["RunStarted", ("StepDone", 1), ("StepDone", 3)]


def test_the_folder_is_a_file_for_a_while(ledger: Ledger, tmp_path: Path, told: list[str]) -> None:
    folder = tmp_path / "run"
    ledger.observe(done(1))
    shutil.rmtree(folder)
    folder.write_text("in the way")
    observe_all(ledger, done(2), done(3))
    assert len(told) == 1
    folder.unlink()
    ledger.observe(done(4))
    assert steps(folder) == [1, 2, 3, 4]


# A real full disk


def in_child(act: Callable[[], object]) -> int:
    """Fork, act, and return the exit code: 0, 77 if `act` returned "skip", 1 if it raised."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 77 if act() == "skip" else 0
        except BaseException:  # noqa: BLE001 - told by the exit code
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fill_and_free(folder: Path, fill: Callable[[], object], free: Callable[[], object]) -> None:
    told: list[str] = []
    ledger = Ledger(folder, warn=told.append)
    observe_all(ledger, started(), done(1))
    fill()
    step = 1
    while len(told) < 1:  # until it is full to the last byte
        step += 1
        assert step < 1000
        ledger.observe(done(step))
        assert (folder / "metrics.jsonl").read_bytes().endswith(b"}\n"), "half a line"
    assert steps(folder) == list(range(1, step))
    observe_all(ledger, done(step + 1), done(step + 2))
    free()
    ledger.observe(done(step + 3))
    ledger.close()
    assert steps(folder) == list(range(1, step + 4)) and len(told) == 2


def test_file_size_limit(tmp_path: Path) -> None:
    """The kernel cuts the line that crosses the limit, and refuses the next."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        fill_and_free(
            tmp_path,
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3333, unlimited[1])),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, unlimited),
        )

    assert in_child(act) == 0


def test_full_disk(tmp_path: Path) -> None:
    """On a file system of 64 KiB, in a mount namespace of its own; skipped where the kernel allows none."""

    def act() -> str | None:
        if not mount_tiny(tmp_path):
            return "skip"
        folder, filler = tmp_path / "run", tmp_path / "filler"

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError as error:
                    assert error.errno == errno.ENOSPC

        fill_and_free(folder, fill, filler.unlink)
        return None

    code = in_child(act)
    if code == 77:
        pytest.skip("no mount namespaces here")
    assert code == 0
    assert list(tmp_path.iterdir()) == [], "the mount stayed in the child"


def mount_tiny(folder: Path) -> bool:
    """Mount a file system of 64 KiB, seen by this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, mounts, private = 0x10000000, 0x00020000, (1 << 14) | (1 << 18)
    if os.geteuid() == 0:
        if libc.unshare(mounts):
            return False
    else:
        uid, gid = os.geteuid(), os.getegid()
        if libc.unshare(user | mounts):
            return False
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    if libc.mount(b"none", b"/", None, private, None):
        return False
    return not libc.mount(b"tiny", str(folder).encode(), b"tmpfs", 0, b"size=64k")


# Numbers that JSON does not have


def refuse_constants(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_every_line_and_the_summary_are_valid_json(ledger: Ledger, tmp_path: Path) -> None:
    """NaN is null, an infinite number a text; read back they are numbers again."""
    folder = tmp_path / "run"
    scores = {"loss": math.nan, "perplexity": math.inf, "gain": -math.inf, "accuracy": 0.5}
    event = events.Evaluated(step=1, epoch=0.5, split="test", scores=scores, best=False)
    observe_all(ledger, done(1), event, events.RunEnded(folder="run", summary={**SUMMARY, "test": scores}))
    written = {"loss": None, "perplexity": "Infinity", "gain": "-Infinity", "accuracy": 0.5}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[2], parse_constant=refuse_constants)["scores"] == written
    assert json.loads((folder / "summary.json").read_text(), parse_constant=refuse_constants)["test"] == written
    read = read_ledger(folder / "metrics.jsonl")[2]["scores"]
    assert math.isnan(read.pop("loss")) and read == {name: scores[name] for name in read}
    assert (folder / "curves.svg").exists(), "they are drawn all the same"


# The end


def test_the_end_completes_the_summary(ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    observe_all(ledger, done(1), recovered(1), done(2), evaluated(2), done(3), recovered(3), evaluated(3, "test"))
    complete = ledger.complete(events.RunEnded(folder="run", summary=SUMMARY))
    assert not (folder / "summary.json").exists(), "completing writes nothing"
    ledger.observe(complete)
    assert ledger.complete(complete) is complete
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == complete.summary
    assert list(summary) == [*SUMMARY, "seconds", "samples_per_second", "recoveries", "resumes", "goodput"]
    assert (summary["recoveries"], summary["resumes"]) == (2, 0)
    assert ElementTree.parse(folder / "curves.svg").getroot().tag.endswith("svg")
    assert names(folder)[-1] == ("Evaluated", 3), "RunEnded is no line"
    ledger.close()
    second = Ledger(folder)
    observe_all(second, started(3), evaluated(3, "test"), events.RunEnded(folder="run", summary=SUMMARY))
    second.close()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["recoveries"], summary["resumes"]) == (2, 1)
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "curves.svg", "summary.json"}


def test_goodput_of_a_run_with_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a clock that the test turns; events are told twice, and the second telling changes nothing."""
    now = 1000.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)

    def tell(ledger: Ledger, after: float, *told: events.Event) -> None:
        nonlocal now
        now += after
        observe_all(ledger, *told)

    first = Ledger(tmp_path)
    tell(first, 3.0, started())
    tell(first, 1.0, done(1, 1.0))
    tell(first, 1.0, done(2, 1.0), done(1, 1.0))
    tell(first, 0.5, saved(2))
    tell(first, 0.5, done(3, 1.0))
    tell(first, 0.7, recovered(3), done(3, 1.0))  # it claims 0.3 of them
    tell(first, 1.0, done(4, 1.0))
    first.close()
    now += 3600
    second = Ledger(tmp_path)
    tell(second, 2.0, started(2))
    tell(second, 1.0, done(3, 1.0))
    tell(second, 0.5, evaluated(3), evaluated(3))
    now += 0.25
    goodput = second.complete(events.RunEnded(folder="run", summary={})).summary["goodput"]
    second.close()
    # wasted: the forgotten steps 3 and 4, and, of the wait for the recovery (which forgotten time precedes), its claim
    seconds = {
        "steps": 3.0,
        "start": 5.0,
        "data": 0.0,
        "evaluation": 0.75,
        "saving": 0.0,
        "recovery": 0.2,
        "waste": 2.1,
    }
    assert goodput["seconds"] == seconds
    assert goodput["wall_seconds"] == 11.05
    assert goodput["share"] == round(3 / 11.05, 4)


def test_the_summary_is_written_though_no_curve_can_be_drawn(
    ledger: Ledger, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    (folder / "curves.svg").mkdir()
    ledger.observe(events.RunEnded(folder="run", summary=SUMMARY))
    assert (folder / "summary.json").exists()
    assert len(told) == 1 and str(folder / "curves.svg") in told[0]


def test_a_summary_that_cannot_be_written_is_an_error(ledger: Ledger, tmp_path: Path) -> None:
    (tmp_path / "run" / "summary.json").mkdir()
    with pytest.raises(RunFolderError, match=r"summary\.json"):
        ledger.observe(events.RunEnded(folder="run", summary=SUMMARY))


def test_the_folder_is_gone_at_the_end(ledger: Ledger, tmp_path: Path) -> None:
    observe_all(ledger, done(1))
    shutil.rmtree(tmp_path / "run")
    ledger.observe(events.RunEnded(folder="run", summary=SUMMARY))
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"summary.json", "curves.svg"}


# Any history


class Histories(RuleBasedStateMachine):
    """A run with a worker 0 that is killed and replaced, resumed from checkpoints, on a disk that comes and goes.

    What is promised: after every event while the disk works, and at the end, each committed step that was told stands
    there once, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(mkdtemp()) / "run"
        self.disk = Disk()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(metrics.os, "write", self.disk.write)
        self.warnings: list[str] = []
        self.committed = 0
        self.told = 0
        self.checkpoints = {0}
        self.sessions = self.losses = 0
        self.is_open = False  # nobody can put back what was never there
        self.ledger = Ledger(self.folder, warn=self.warnings.append)

    @initialize(error=st.sampled_from([0, errno.ENOSPC]))
    def begin(self, error: int) -> None:
        self.disk.error = error
        self.ledger.observe(started(0))
        self.sessions = 1

    def tell_state(self) -> None:
        """What worker 0 tells of the committed step, be it the first one to do so or not."""
        if not self.committed:
            return
        self.ledger.observe(done(self.committed))
        if self.committed % 2 == 0:
            self.ledger.observe(evaluated(self.committed))
            self.ledger.observe(evaluated(self.committed, "test"))
        if self.committed % 3 == 0:
            self.checkpoints.add(self.committed)
            self.ledger.observe(saved(self.committed))
        self.told = self.committed

    @rule(count=st.integers(1, 4))
    def commit(self, count: int) -> None:
        for _ in range(count):
            self.committed += 1
            self.tell_state()

    @rule(was_committed=st.booleans(), is_lost_told=st.booleans())
    def kill_worker_0(self, was_committed: bool, is_lost_told: bool) -> None:
        """Before or after a step was committed, of which it had told nothing yet."""
        self.committed += was_committed
        if is_lost_told:
            self.ledger.observe(recovered(self.committed))
            self.losses += 1
        self.tell_state()

    @rule(error=st.sampled_from([errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT]), room=st.integers(0, 300))
    def fail_disk(self, error: int, room: int) -> None:
        self.disk.error, self.disk.room = error, room

    @rule()
    def mend_disk(self) -> None:
        self.disk.error = 0

    @rule(harm=st.sampled_from([remove_file, shutil.rmtree, replace_file]))
    def harm(self, harm: Callable[[Path], None]) -> None:
        if self.is_open and (self.folder / "metrics.jsonl").exists():
            harm(self.folder)

    @precondition(lambda self: not self.disk.error)
    @rule(data=st.data(), is_killed=st.booleans(), tail=st.sampled_from([b"", b'{"event": "Step', b"\0"]))
    def resume(self, data: st.DataObject, is_killed: bool, tail: bytes) -> None:
        """The session ends, by close or by a kill; another goes on from any checkpoint."""
        self.tell_state()  # nothing waits, and the file is in its place
        self.ledger.observe(events.Notice(message="the end"))
        if not is_killed:
            self.ledger.close()
        with (self.folder / "metrics.jsonl").open("ab") as file:
            file.write(tail)
        self.committed = self.told = data.draw(st.sampled_from(sorted(self.checkpoints)))
        self.checkpoints = {step for step in self.checkpoints if step <= self.committed}
        old, self.ledger = self.ledger, Ledger(self.folder, warn=self.warnings.append)
        self.ledger.observe(started(self.committed))
        self.sessions += 1
        if is_killed and old._file is not None:
            os.close(old._file)  # as the kernel would

    @invariant()
    def is_exact(self) -> None:
        if self.disk.error or not self.sessions:
            return
        self.ledger.observe(events.Notice(message="a chance to catch up"))
        self.is_open = True
        self.check()

    def check(self) -> None:
        raw = (self.folder / "metrics.jsonl").read_bytes()
        lines = [json.loads(line) for line in raw.splitlines()]
        assert not raw or raw.endswith(b"}\n")
        found = {
            event: [line["step"] for line in lines if line["event"] == event]
            for event in ("StepDone", "Evaluated", "CheckpointWritten")
        }
        assert found["StepDone"] == list(range(1, self.told + 1))
        even = range(2, self.told + 1, 2)
        assert found["Evaluated"] == list(itertools.chain(*zip(even, even, strict=True)))
        assert found["CheckpointWritten"] == list(range(3, self.told + 1, 3))
        assert [line["event"] for line in lines].count("RunStarted") == self.sessions
        assert [line["event"] for line in lines].count("Resumed") == self.sessions - 1
        assert [line["event"] for line in lines].count("Recovered") == self.losses

    def teardown(self) -> None:
        try:
            if self.sessions:
                self.mend_disk()
                self.is_exact()
                self.ledger.close()
                self.check()
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder.parent)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
