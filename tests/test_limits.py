"""Limits of the machine: raised where workers need more and may have it, else refused with the numbers."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import unisono
from learned import SETTINGS, Dropped, make_columns
from unisono.errors import RecipeError, WorkerError
from unisono.processes.limits import explain, within_limits
from unisono.runtime.launchers.fork import launch
from unisono.tracking import ledger

pytestmark = pytest.mark.usefixtures("warm")

FEW = 150


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "draw_curves", lambda lines, path: None)


@pytest.fixture
def files() -> Iterator[Callable[[int], None]]:
    """`files(number)`: so many may be open from now on, until more are requested."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda number: resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def with_most_files(number: int, main: Callable[[], None]) -> None:
    """Call `main` in a process that may never have more files open: a limit that was lowered cannot be raised."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, FEW), number))
        main()

    process = multiprocessing.get_context("fork").Process(target=limited)
    process.start()
    process.join()
    assert process.exitcode == 0


def train(folder: Path, **options: Any) -> unisono.Trained:
    settings = {**SETTINGS, "microbatches": 16, "samples_per_step": 48, "epochs": 1}
    return unisono.train(Dropped(), make_columns(), run=folder, quiet=True, **{**settings, **options})


def test_the_limit_is_raised_for_the_run(tmp_path: Path, files: Callable[[int], None]) -> None:
    """And is then as it was."""
    expected = train(tmp_path / "expected", workers=1).weights_sha256
    files(FEW)
    assert train(tmp_path / "run", workers=13).weights_sha256 == expected
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == FEW


def test_so_many_files_are_enough_and_fewer_are_refused(tmp_path: Path) -> None:
    """Before anything is started; and what the message says is true."""
    few = FEW + len(list(Path("/proc/self/fd").iterdir()))  # beside what other tests have left open
    found = multiprocessing.get_context("fork").SimpleQueue()

    def refuse() -> None:
        for start in (
            lambda: train(tmp_path / "refused", workers=16),
            lambda: launch(16, lambda *_: None, threads=1, device="cpu"),
        ):
            with pytest.raises(RecipeError) as raised:
                start()
            found.put(str(raised.value))
        assert not (tmp_path / "refused").exists()

    with_most_files(few, refuse)
    asked = []
    for told in (found.get(), found.get()):
        numbers = re.search(rf"needs up to (\d+) open files, and the system allows {few} .* Use (\d+) workers", told)
        assert numbers is not None, told
        asked.append((int(numbers[1]), int(numbers[2])))
    needed, most = asked[0]  # of a training
    assert needed > few and 1 < most < 16

    fault = ["kill(worker=1, step=1, phase=update)"]
    with_most_files(needed, lambda: train(tmp_path / "enough", workers=16, faults=fault) and None)
    with_most_files(few, lambda: train(tmp_path / "fewer", workers=most, faults=fault) and None)


def test_which_limit_an_error_comes_from() -> None:
    for number, sign in {errno.EMFILE: "ulimit -n", errno.EAGAIN: "ulimit -u", errno.ENOMEM: "ulimit -v"}.items():
        assert sign in explain(OSError(number, os.strerror(number)))
    assert "ulimit -v" in explain(MemoryError()) and "ulimit -u" in explain(RuntimeError("can't start new thread"))
    assert explain(OSError(errno.ENOENT, "x")) == explain(RuntimeError("another")) == explain(ValueError()) == ""
    with pytest.raises(RuntimeError, match="allocate memory") as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "ulimit -v" in explain(raised.value)
    with pytest.raises(WorkerError, match="ulimit -u"), within_limits(1):
        raise BlockingIOError(errno.EAGAIN, "fork")


def test_a_worker_that_cannot_be_started_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one; the first does not stay."""
    honest, forks = os.fork, []

    def fork() -> int:
        if forks:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        forks.append(honest())
        return forks[-1]

    for start in (
        lambda: train(tmp_path / "run", workers=3),
        lambda: launch(3, lambda *_: None, threads=1, device="cpu"),
    ):
        forks.clear()
        monkeypatch.setattr(os, "fork", fork)
        with pytest.raises(WorkerError, match=r"no further process .*ulimit -u"):
            start()
        monkeypatch.setattr(os, "fork", honest)
        assert not Path(f"/proc/{forks[0]}").exists()


def test_a_worker_without_files_or_memory_names_the_limit(tmp_path: Path) -> None:
    """In place of a traceback."""

    def use_up() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        os.pipe()

    for on_loss, sign in ((use_up, "too many open files: a process may have 3 "), (exhaust, "no memory could be")):
        with pytest.raises(WorkerError, match=sign) as raised:
            unisono.train(
                Dropped(on_loss=on_loss), make_columns(), run=tmp_path / sign[:3], workers=2, quiet=True, **SETTINGS
            )
        assert "Traceback" not in str(raised.value)


def exhaust() -> None:
    raise MemoryError
