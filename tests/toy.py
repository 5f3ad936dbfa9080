"""A toy to train on, and two ways to run the command line on it.

Owns made-up texts in three classes, which a few steps learn, and the recipe for them. Each test has its own copy.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import pytest

WORDS = {
    "sport": "goal match team win coach ball league",
    "tech": "chip code data cloud phone app screen",
    "food": "soup bread salt oven apple rice spoon",
}

RECIPE = """
[data]
train = "toy.csv"
test_fraction = 0.2
store = "{folder}/datasets"

[encode]
features = 512

[model]
kind = "bag"
width = 8
dropout = 0.1

[train]
epochs = 3
samples_per_step = 16
microbatches = 4
learning_rate = 0.05
"""

SECONDS_AT_MOST = 180.0
"""After which a test gives up waiting. No result depends on it: it only ends what hangs, on a busy machine too."""

DAMAGES = [
    pytest.param(file, harm, marks=[] if row == column else [pytest.mark.slow], id=f"{harm}-{file}")
    for row, file in enumerate(("parameters.safetensors", "optimizer.safetensors", "state.json"))
    for column, harm in enumerate(("truncated", "altered", "missing"))
]
"""Each file of a checkpoint in each way; among the quick tests each once."""

Command = Callable[..., tuple[int, str, str]]
"""The command line, called in this process: arguments → exit code, output, errors."""


def make_records(count: int = 120) -> list[str]:
    """CSV lines "text,label", all different, the classes in turn."""
    lines = []
    for number, (label, words) in zip(range(count), itertools.cycle(WORDS.items()), strict=False):
        words_of_class = words.split()
        chosen = [words_of_class[(number * factor + shift) % 7] for factor, shift in ((1, 0), (3, 2), (5, 4), (2, 1))]
        lines.append(f"{' '.join(chosen)} n{number},{label}")
    return lines


def make_toy(folder: Path, records: Iterable[str] | None = None, recipe: str = RECIPE) -> Path:
    """Write toy.csv and toy.toml; return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = make_records() if records is None else records
    (folder / "toy.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    path = folder / "toy.toml"
    path.write_text(recipe.format(folder=folder), encoding="utf-8")
    return path


def run_command(arguments: Sequence[object], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m unisono ARGUMENTS` in `folder`, in a process of its own."""
    return run_python(["-m", "unisono", *arguments], folder, **variables)


def run_python(arguments: Sequence[object], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in `folder`, to its end."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=SECONDS_AT_MOST,
        check=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A command line at work in a process of its own, forked from the tests: it starts at once, all being imported."""

    process: BaseProcess
    folder: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def out(self) -> str:
        """Standard output so far."""
        return (self.folder / "out.txt").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """Standard error so far."""
        return (self.folder / "err.txt").read_text(encoding="utf-8")

    def workers(self) -> list[int]:
        """Process ids of the workers, in order of rank; after them that of who writes a checkpoint just now."""
        return [
            int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii").split()
        ]

    def wait_for(self, sign: str) -> None:
        """Wait until standard output or standard error has `sign`."""
        self.wait_until(lambda: sign in self.out or sign in self.err)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait until `is_so`; it must be before the process ends."""
        deadline = time.monotonic() + SECONDS_AT_MOST
        while not is_so():
            assert self.process.exitcode is None, self.out + self.err
            assert time.monotonic() < deadline, self.out + self.err
            time.sleep(0.01)

    def end(self) -> int:
        """Wait for the end; return the exit code, or minus the number of the signal that killed it."""
        self.process.join(SECONDS_AT_MOST)
        assert self.process.exitcode is not None, f"still running: {self.out}{self.err}"
        return self.process.exitcode


def launch_command(arguments: Sequence[object], folder: Path) -> Launched:
    """Begin `unisono ARGUMENTS` in `folder`."""

    def main() -> None:
        from unisono import cli

        os.setsid()
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, descriptor in (("out.txt", 1), ("err.txt", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["unisono", *map(str, arguments)]
        cli.main()

    for name in ("out.txt", "err.txt"):
        (folder / name).write_text("", encoding="utf-8")
    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return Launched(process=process, folder=folder)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until_gone(pids: Iterable[int], seconds: float = SECONDS_AT_MOST) -> list[int]:
    """Wait until none of the processes is left; return those that are."""
    deadline = time.monotonic() + seconds
    left = list(pids)
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = [pid for pid in left if is_alive(pid)]
    return left


@contextmanager
def ends() -> Iterator[None]:
    """Within, something must end at all: after minutes of this process's own work, which others cannot use up, it is
    taken for one that does not."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError("it does not end")

    before = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_AT_MOST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
