"""The claim on a run folder: one process at a time, for as long as it lives; and what others may ask of it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from unisono.errors import RecipeError, RunFolderError
from unisono.storage import run_lock as run_locks
from unisono.storage.run_lock import ANSWER, RUNNING, WANTED, RunLock, WorkersRequest, ask_for_workers


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_locks, "DYING_SECONDS", 0.1)
    monkeypatch.setattr(run_locks, "POLL_SECONDS", 0.005)


def begin_elsewhere(act: Callable[[], Any]) -> int:
    """Do something in another process, which then lives on; return its id when it has done it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            kept = act()
            os.write(writing, b"!")
            signal.pause()
            assert kept
        os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_exclusive_while_it_is_held(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.tell(workers=2, most_workers=4)
    with pytest.raises(RunFolderError, match=f"is being trained by process {os.getpid()} on ") as refused:
        RunLock(tmp_path)
    assert str(tmp_path) in str(refused.value) and "--run-folder" in str(refused.value)
    first.release()
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).release()


def test_another_process_is_named_and_its_death_ends_its_claim(tmp_path: Path) -> None:
    def act() -> RunLock:
        run_lock = RunLock(tmp_path)
        run_lock.tell(workers=2)
        return run_lock

    pid = begin_elsewhere(act)
    try:
        with pytest.raises(RunFolderError, match=f"by process {pid} "):
            RunLock(tmp_path)
    finally:
        end(pid)
    run_lock = RunLock(tmp_path)  # at once, though .running is still there
    assert json.loads((tmp_path / RUNNING).read_text())["pid"] == pid
    run_lock.tell(workers=1)
    assert json.loads((tmp_path / RUNNING).read_text())["pid"] == os.getpid()
    run_lock.release()


def test_workers_of_a_killed_supervisor_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have inherited the lock, and die a moment after it."""
    monkeypatch.setattr(run_locks, "DYING_SECONDS", 120.0)
    pid = begin_elsewhere(lambda: RunLock(tmp_path))
    killer = threading.Timer(0.1, end, (pid,))
    killer.start()
    RunLock(tmp_path).release()
    killer.join()


def test_a_folder_that_cannot_be_written_is_trained_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no claim then; nobody can ask for anything."""

    def refuse(*given: Any, **more: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as read_only:
        read_only.setattr(os, "open", refuse)
        run_lock = RunLock(tmp_path)
    run_lock.tell(workers=2)
    assert run_lock.next_request() is None
    run_lock.answer(WorkersRequest(name="1", workers=2), "no", done=False)
    run_lock.release()
    run_lock.release()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.release()
    second.release()


def test_files_left_by_a_killed_run_are_not_taken_for_wishes(tmp_path: Path) -> None:
    (tmp_path / f"{WANTED}1").write_text('{"workers": 7}')
    (tmp_path / f"{ANSWER}1").write_text('{"done": true, "text": "old"}')
    run_lock = RunLock(tmp_path)
    assert run_lock.next_request() is None
    assert not (tmp_path / f"{ANSWER}1").exists()
    run_lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"workers": 0}', '{"workers": "3"}', '{"workers": -1}', "{}"])
def test_a_wish_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    run_lock = RunLock(tmp_path)
    (tmp_path / f"{WANTED}1").write_text(text)
    assert run_lock.next_request() is None
    assert not (tmp_path / f"{WANTED}1").exists()
    run_lock.release()


def test_a_wish_is_heard_once(tmp_path: Path) -> None:
    run_lock = RunLock(tmp_path)
    (tmp_path / f"{WANTED}1").write_text('{"workers": 3}')
    assert run_lock.next_request() == WorkersRequest(name="1", workers=3)
    assert run_lock.next_request() is None
    run_lock.release()


def converse(folder: Path, workers: int, answer: Callable[[RunLock, WorkersRequest], None]) -> str | Exception:
    """Ask a run that answers like this; return what came of it."""
    run_lock = RunLock(folder)
    run_lock.tell(workers=2, most_workers=4)
    found: list[str | Exception] = []

    def ask() -> None:
        try:
            found.append(ask_for_workers(folder, workers))
        except Exception as error:  # noqa: BLE001 - looked at below
            found.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    deadline = time.monotonic() + 120
    while asking.is_alive() and time.monotonic() < deadline:
        if (request := run_lock.next_request()) is not None:
            answer(run_lock, request)
        time.sleep(0.002)
    asking.join(120)
    with suppress(OSError):
        run_lock.release()
    return found[0]


def grant(run_lock: RunLock, request: WorkersRequest) -> None:
    run_lock.answer(request, f"{request.workers} it is", done=True)


def test_asked_and_answered(tmp_path: Path) -> None:
    assert converse(tmp_path, 3, grant) == "3 it is"
    assert list(tmp_path.iterdir()) == []


def test_asked_and_refused(tmp_path: Path) -> None:
    found = converse(tmp_path, 3, lambda run_lock, wanted: run_lock.answer(wanted, "not now", done=False))
    assert isinstance(found, RunFolderError) and "not now" in str(found)


def test_each_of_several_askers_gets_its_own_answer(tmp_path: Path) -> None:
    """All requests are there before the first one is answered, and the last one is answered first."""
    run_lock = RunLock(tmp_path)
    run_lock.tell(workers=2, most_workers=40)
    found: dict[int, str] = {}
    asking = [
        threading.Thread(target=lambda count=count: found.update({count: ask_for_workers(tmp_path, count)}))
        for count in range(1, 9)
    ]
    for one in asking:
        one.start()
    requests: list[WorkersRequest] = []
    while len(requests) < len(asking):
        if (request := run_lock.next_request()) is not None:
            requests.append(request)
    for request in reversed(requests):
        grant(run_lock, request)
    for one in asking:
        one.join()
    run_lock.release()
    assert found == {count: f"{count} it is" for count in range(1, 9)}
    assert list(tmp_path.iterdir()) == []


def test_requests_are_taken_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    run_lock = RunLock(tmp_path)
    for name, workers, when in (("b", 3, 10), ("a", 5, 30), ("c", 4, 20)):
        path = tmp_path / f"{WANTED}{name}"
        path.write_text(json.dumps({"workers": workers}))
        os.utime(path, (when, when))
    taken = [run_lock.next_request() for _ in range(4)]
    assert [request and request.workers for request in taken] == [3, 4, 5, None]
    run_lock.release()


def make_odd(path: Path, kind: str) -> None:
    """Put something that is no file of ours at the path."""
    victim = path.parent / "victim"
    victim.write_text('{"workers": 3}')
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "endless"])
def test_a_request_is_read_from_a_regular_file_only(tmp_path: Path, kind: str) -> None:
    run_lock = RunLock(tmp_path)
    make_odd(tmp_path / f"{WANTED}1", kind)
    assert run_lock.next_request() is None
    run_lock.release()
    assert (tmp_path / "victim").read_text() == '{"workers": 3}'


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "endless"])
def test_a_lock_is_a_regular_file(tmp_path: Path, kind: str) -> None:
    make_odd(tmp_path / RUNNING, kind)
    with pytest.raises(RunFolderError, match=r"\.running' is (a symbolic link|no regular file).*Remove it"):
        RunLock(tmp_path)
    assert (tmp_path / "victim").read_text() == '{"workers": 3}'


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to another user")
def test_a_lock_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / RUNNING).touch()
    os.chown(tmp_path / RUNNING, 12345, 12345)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(RunFolderError, match="belongs to another user"):
        RunLock(tmp_path)


def test_others_may_not_open_the_lock(tmp_path: Path) -> None:
    """A reader could lock it. A file from before may have another mode."""
    (tmp_path / RUNNING).touch(mode=0o644)
    run_lock = RunLock(tmp_path)
    assert (tmp_path / RUNNING).stat().st_mode & 0o777 == 0o600
    run_lock.release()


def test_a_process_that_has_ended_is_not_blamed(tmp_path: Path) -> None:
    """Another one has the lock: a tool that reads the file, or a child that was forked behind our back."""
    dead = begin_elsewhere(lambda: True)
    end(dead)
    (tmp_path / RUNNING).write_text(json.dumps({"host": socket.gethostname(), "pid": dead}))
    with (tmp_path / RUNNING).open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        with pytest.raises(RunFolderError, match=f"process {dead}, which trained it, has ended.*fuser"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_an_old_answer_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / f"{ANSWER}1").write_text('{"done": true, "text": "old"}')
    assert converse(tmp_path, 3, lambda run_lock, wanted: run_lock.answer(wanted, "new", done=True)) == "new"


def test_a_run_that_ends_instead_of_answering(tmp_path: Path) -> None:
    found = converse(tmp_path, 3, lambda run_lock, wanted: run_lock.release())
    assert isinstance(found, RunFolderError) and "has ended" in str(found)


def test_a_run_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_locks, "ANSWER_SECONDS", 0.1)
    found = converse(tmp_path, 3, lambda run_lock, wanted: None)
    assert isinstance(found, RunFolderError) and "does not answer" in str(found)


@pytest.mark.parametrize("workers", [0, 5])
def test_what_no_run_can_do_is_refused_before_it_is_asked(workers: int, tmp_path: Path) -> None:
    asked: list[WorkersRequest] = []
    found = converse(tmp_path, workers, lambda run_lock, wanted: asked.append(wanted))
    assert isinstance(found, RecipeError) and "1 to 4 workers" in str(found)
    assert asked == []


def test_nobody_is_there_to_be_asked(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not being trained now"):
        ask_for_workers(tmp_path, 2)
    with pytest.raises(RunFolderError, match="is not being trained now"):
        ask_for_workers(tmp_path / "nowhere", 2)
    end(begin_elsewhere(lambda: RunLock(tmp_path)))
    assert (tmp_path / RUNNING).exists()
    with pytest.raises(RunFolderError, match="is not being trained now"):
        ask_for_workers(tmp_path, 2)
    assert not (tmp_path / f"{WANTED}1").exists()


def test_who_waited_for_a_claim_keeps_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock must be on the file that is there: the one before was removed when its holder let go."""
    monkeypatch.setattr(run_locks, "DYING_SECONDS", 120.0)
    first = RunLock(tmp_path)
    found: list[RunLock] = []
    waiting = threading.Thread(target=lambda: found.append(RunLock(tmp_path)))
    waiting.start()
    time.sleep(0.2)
    first.release()
    waiting.join()
    monkeypatch.setattr(run_locks, "DYING_SECONDS", 0.1)
    with pytest.raises(RunFolderError, match="is being trained by process"):
        RunLock(tmp_path)
    found[0].release()
    RunLock(tmp_path).release()
