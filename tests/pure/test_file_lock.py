"""A lock on a file: who holds it, who inherits it, and when it ends."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from unisono.processes.forking import fork
from unisono.storage.file_lock import HeldFile, Timeout, hold, is_held


@pytest.fixture
def killed() -> Iterator[list[int]]:
    """Processes to end after the test, whatever became of it."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def hold_elsewhere(path: Path, start: Callable[[], int]) -> tuple[int, int]:
    """Have a process hold a file and start another one; return the ids of both."""
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        with suppress(BaseException):
            held = HeldFile(path)
            os.write(writing, b"%d" % start())
            signal.pause()
            held.release()
        os._exit(1)
    os.close(writing)
    other = int(os.read(reading, 20))
    os.close(reading)
    return holder, other


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def fork_idle() -> int:
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(1)
    return pid


def start_program() -> int:
    return subprocess.Popen(["sleep", "600"], close_fds=False).pid


def test_one_holds_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    with hold(path):
        assert is_held(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(Timeout):
            HeldFile(path, seconds=0)
    assert not is_held(path)
    assert list(tmp_path.iterdir()) == []


def start_worker() -> int:
    process = fork(signal.pause, (), "worker")
    assert process.pid is not None
    return process.pid


def start_child_of_a_worker() -> int:
    reading, writing = os.pipe()

    def worker() -> None:
        os.write(writing, b"%d" % fork_idle())
        signal.pause()

    fork(worker, (), "worker")
    return int(os.read(reading, 20))


def test_workers_hold_it_until_they_end(tmp_path: Path, killed: list[int]) -> None:
    """A killed supervisor's workers may still write. Fails without the copy of the descriptor."""
    path = tmp_path / "lock"
    holder, worker = hold_elsewhere(path, start_worker)
    killed.append(worker)
    end(holder)
    assert is_held(path)
    os.kill(worker, signal.SIGKILL)  # it is a child of nobody here
    HeldFile(path).release()


def test_a_child_of_the_task_does_not_hold_it(tmp_path: Path, killed: list[int]) -> None:
    """It may outlive the run. Fails if every forked process kept the copy."""
    holder, child = hold_elsewhere(tmp_path / "lock", fork_idle)
    killed.append(child)
    end(holder)
    os.kill(child, 0)
    assert not is_held(tmp_path / "lock")


def test_a_child_of_a_worker_does_not_hold_it(tmp_path: Path, killed: list[int]) -> None:
    """Fails if what a worker forks counted as a worker."""
    path = tmp_path / "lock"
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        with suppress(BaseException):
            held = HeldFile(path)
            child = start_child_of_a_worker()
            workers = multiprocessing.active_children()
            os.write(writing, b"%d %d" % (child, workers[0].pid or 0))
            signal.pause()
            held.release()
        os._exit(1)
    child, worker = map(int, os.read(reading, 40).split())
    killed += [child, worker]
    end(holder)
    os.kill(worker, signal.SIGKILL)
    HeldFile(path).release()
    os.kill(child, 0)


def test_executed_programs_do_not_inherit_it(tmp_path: Path, killed: list[int]) -> None:
    """A program that a task has started may live on. Fails if the copy were inheritable."""
    path = tmp_path / "lock"
    holder, program = hold_elsewhere(path, start_program)
    killed.append(program)
    end(holder)
    os.kill(program, 0)
    assert not is_held(path)


def test_letting_go_counts_for_forked_processes_too(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = HeldFile(path)
    worker = fork_idle()
    held.release()
    HeldFile(path, seconds=0).release()
    end(worker)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """And leaves no file that would keep others out for ever, as a soft lock would."""

    def refuse(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(number)):
            HeldFile(tmp_path / "lock", seconds=0)
    assert not is_held(tmp_path / "lock")
