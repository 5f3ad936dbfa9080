"""The run that faults befall: a small transformer with dropout on made-up texts, and the verdict on what became of it.

Owns its recipe, its start in a process forked from this one (which has imported everything, so a run takes a second or
two), what /proc and the board tell of its processes, and what counts as "as if nothing had happened": the same SHA-256
of weights and optimizer, every step in the ledger exactly once with the same figures, and nothing left behind.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py and workloads.py
from record import RESULTS

from unisono.processes.progress_table import ProgressTable

MICROBATCHES = 4
MOST_SECONDS = 90.0
"""After which a run counts as hanging."""
GONE_SECONDS = 5.0
HASHES = ("weights_sha256", "optimizer_sha256", "test", "steps")
FIGURES = ("step", "epoch", "loss", "gradient_norm", "learning_rate", "samples", "tokens")
RECIPE = """
[data]
train = "texts.csv"
validation_fraction = 0.1
test_fraction = 0.1
store = "{store}"

[encode]
vocabulary_size = 128
max_tokens = 12

[model]
kind = "transformer"
layers = 1
width = 16
heads = 2
feedforward = 32
dropout = 0.1

[train]
epochs = 1.3
samples_per_step = 16
microbatches = {microbatches}
learning_rate = 0.01
device = "cpu"

[evaluate]
every_steps = 10

[checkpoint]
every_steps = {every_steps}
"""
WORDS = ("goal match team win coach ball league", "chip code data cloud phone app screen", "soup bread salt oven rice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is trained. recipe: its path. steps, summary: the ledger's and the result of the run that nothing befell."""

    recipe: Path
    steps: list[dict[str, Any]]
    summary: dict[str, Any]

    def command(self, *options: object, workers: int, resume: bool = False, run: str = "run") -> list[str]:
        """The arguments that train it in the folder `run`."""
        again = ["--resume", "auto"] if resume else []
        given = ["train", self.recipe, "--workers", workers, "--run-folder", run, "--json", *again, *options]
        return [str(part) for part in given]


@dataclass(slots=True, kw_only=True)
class Begun:
    """A command line at work in `folder`, in a process that leads a session of its own. board: is read along."""

    process: BaseProcess
    folder: Path
    progress_table: ProgressTable
    started: float

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        """What it has printed."""
        return "".join((self.folder / name).read_text("utf-8", "replace") for name in ("out.txt", "err.txt"))

    def is_over(self) -> bool:
        """Whether the supervisor has ended."""
        return self.process.exitcode is not None

    def children(self) -> list[int]:
        """The supervisor's children, oldest first."""
        with suppress(OSError):
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        return []

    def workers(self) -> list[int]:
        """The workers' processes, oldest first: as the writer of a checkpoint is nice."""
        return [pid for pid in self.children() if _stat(pid, 18) == "0"]

    def writer(self) -> int | None:
        """The process that writes a checkpoint just now."""
        return next((pid for pid in self.children() if _stat(pid, 18) not in ("0", "")), None)

    def wait_for_workers(self, number: int) -> list[int]:
        """Wait until so many workers are forked."""
        self.wait(lambda: len(self.workers()) >= number)
        return self.workers()

    def wait(self, happened: Callable[[], Any], seconds: float = MOST_SECONDS, step: float = 0.001) -> bool:
        """Wait until something has happened; return false if the run ends, or too much time passes, before."""
        deadline = time.monotonic() + seconds
        while not happened():
            if self.is_over() or time.monotonic() > deadline:
                return False
            time.sleep(step)
        return True

    def end(self, seconds: float = MOST_SECONDS) -> str:
        """Wait for its end; return the exit code, or the signal's name, or "hangs" (it is killed then)."""
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.kill()
            return "hangs"
        return signal.Signals(-code).name if code < 0 else str(code)

    def kill(self) -> None:
        """Kill all its processes."""
        for pid in [self.pid, *self.left()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.join()

    def left(self) -> list[int]:
        """Processes of its session that are alive, but the supervisor."""
        return [pid for pid in _processes() if pid != self.pid and _stat(pid, 5) == str(self.pid)]

    def find_left(self) -> list[str]:
        """What its end has left behind, after a moment: processes."""
        deadline = time.monotonic() + GONE_SECONDS
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [f"process {pid} is left ({_command(pid)})" for pid in left]


def warm() -> None:
    """Import once what every forked process would import for itself."""
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import pyarrow.compute
    import tokenizers
    import torch
    import torch._inductor.config

    import unisono.api.application
    import unisono.api.inventory
    import unisono.api.verification
    import unisono.cli
    import unisono.data.prepare
    import unisono.storage.run_lock
    import unisono.tasks.text.classification
    from unisono.engine import numerics

    torch.set_num_threads(1)  # forking stays safe
    numerics.battery(torch.device("cpu"))
    with suppress(ImportError):  # pyarrow would, where it is installed
        import pandas  # noqa: F401
    assert matplotlib and pyarrow and tokenizers and unisono


def begin(arguments: Sequence[str], folder: Path) -> Begun:
    """Begin `unisono ARGUMENTS` in `folder`."""

    def main() -> None:
        from unisono import cli

        sys.argv = ["unisono", *arguments]
        cli.main()

    return fork(main, folder, MICROBATCHES)


def fork(main: Callable[[], None], folder: Path, microbatches: int) -> Begun:
    """Begin what `main` does, a run of so many microbatches, in `folder`."""
    progress_table = ProgressTable(microbatches)

    def live() -> None:
        from unisono.runtime import supervisor

        supervisor.ProgressTable = lambda rows: progress_table  # the same memory, which this process can read along
        os.setsid()
        os.chdir(folder)
        tempfile.tempdir = str(folder / "temporary")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, descriptor in (("out.txt", 1), ("err.txt", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        main()

    (folder / "temporary").mkdir(exist_ok=True)
    for name in ("out.txt", "err.txt"):
        (folder / name).touch()
    process = multiprocessing.get_context("fork").Process(target=live)
    process.start()
    return Begun(process=process, folder=folder, progress_table=progress_table, started=time.monotonic())


def make_subject(folder: Path, every_steps: int) -> Subject:
    """Write texts and recipe, prepare the data, and train once with one worker and no disturbance."""
    lines = []
    for number in range(480):
        words = WORDS[number % 3].split()
        chosen = [words[(number * factor + shift) % len(words)] for factor, shift in ((1, 0), (3, 2), (2, 1))]
        lines.append(f"{' '.join(chosen)} n{number} n{number % 7},{'abc'[number % 3]}")
    (folder / "texts.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    recipe = folder / "recipe.toml"
    filled = RECIPE.format(store=folder / "datasets", microbatches=MICROBATCHES, every_steps=every_steps)
    recipe.write_text(filled, encoding="utf-8")
    subject = Subject(recipe=recipe, steps=[], summary={})
    run = begin(subject.command(workers=1), folder)
    if (code := run.end()) != "0":
        sys.exit(f"the undisturbed run ended with {code}:\n{run.output}")
    ledger, faults = read_ledger(folder / "run")
    assert not faults, faults
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    return Subject(recipe=recipe, steps=choose(ledger, "StepDone"), summary=summary)


def measure_life(subject: Subject, workers: int) -> float:
    """Seconds from the fork of the workers to the end of an undisturbed run."""
    with tempfile.TemporaryDirectory() as folder:
        run = begin(subject.command(workers=workers), Path(folder))
        run.wait_for_workers(1)
        forked = time.monotonic()
        code = run.end()
        seconds = time.monotonic() - forked
        if code != "0" or (faults := find_faults(Path(folder) / "run", subject)):
            sys.exit(f"an undisturbed run of {workers} workers: {code}, {faults}\n{run.output}")
        return seconds


def read_ledger(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl, and what is wrong with those that cannot be read."""
    lines, faults = [], []
    path = run / "metrics.jsonl"
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            lines.append(json.loads(text))
        except ValueError:
            faults.append(f"line {number} of the ledger is no JSON: {text[:60]!r}")
    return lines, faults


def choose(ledger: Sequence[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    """The lines of one event."""
    return [line for line in ledger if line["event"] == event]


def find_faults(run: Path, subject: Subject) -> list[str]:
    """In what a finished run differs from the undisturbed one; [] is a pass."""
    if not (run / "summary.json").exists():
        return ["there is no summary"]
    ledger, faults = read_ledger(run)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    faults += [
        f"{name}: {summary.get(name)} instead of {subject.summary[name]}"
        for name in HASHES
        if summary.get(name) != subject.summary[name]
    ]
    steps = choose(ledger, "StepDone")
    counted = Counter(line["step"] for line in steps)
    wrong = {step: counted[step] for step in range(1, len(subject.steps) + 1) if counted[step] != 1}
    if wrong or len(counted) != len(subject.steps):
        faults.append(f"the ledger has steps not exactly once: {wrong or sorted(counted)}")
    elif different := [
        f"step {mine['step']}: {name} {mine[name]} instead of {other[name]}"
        for mine, other in zip(steps, subject.steps, strict=True)
        for name in FIGURES
        if mine[name] != other[name]
    ]:
        faults.append(different[0])
    if (added := sum(line["samples"] for line in steps)) != (wanted := sum(line["samples"] for line in subject.steps)):
        faults.append(f"the ledger counts {added} samples instead of {wanted}")
    evaluated = Counter((line["step"], line["split"]) for line in choose(ledger, "Evaluated"))
    faults += [
        f"{split} evaluated {times} times after step {step}" for (step, split), times in evaluated.items() if times > 1
    ]
    if unwritten := list((run / "checkpoints").glob(".*")):
        faults.append(f"left in checkpoints: {', '.join(path.name for path in unwritten)}")
    return faults


def find_left_files(folder: Path) -> list[str]:
    """Temporary files that a run in `folder` has left."""
    return [f"{path.name} is left in the folder for temporary files" for path in (folder / "temporary").iterdir()]


@contextmanager
def case_folder(name: str) -> Iterator[tuple[Path, list[str]]]:
    """A folder for one case, and a list for its faults; it is kept under `results/failed` where there are some."""
    with tempfile.TemporaryDirectory(prefix="case-") as place:
        faults: list[str] = []
        yield Path(place), faults
        if faults:
            kept = RESULTS / "failed" / name.replace(" ", "-")
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(place, kept)
            (kept / "faults.txt").write_text("\n".join(faults) + "\n", encoding="utf-8")


def draw(seed: int, row: str, number: int) -> Random:
    """The random numbers of one case, whatever other cases there are."""
    return Random(f"{seed} {row} {number}")


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of one case. phases: what was at work when each kill struck. lost_seconds: of each recovery."""

    row: str
    number: int
    faults: list[str] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    lost_seconds: list[float] = field(default_factory=list)
    told: str = ""


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _stat(pid: int, position: int) -> str:
    """A field of /proc/PID/stat, counted from 0; "" where the process is gone, or only not reaped yet."""
    with suppress(OSError, IndexError):
        head, _, tail = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
        fields = [head, *tail.split()]  # head has the first two
        return "" if fields[1] == "Z" else fields[position - 1]
    return ""


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
    return "gone"
