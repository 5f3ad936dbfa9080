"""Kill -9 at random instants: of a worker, of the supervisor, and while a checkpoint is being written.

    python benchmarks/faults/kills.py                                   a few of each
    python benchmarks/faults/kills.py --times 200 --supervisors 50 --writes 50
    python benchmarks/faults/kills.py --seed 0 --only worker:17         one case again

A case passes if the run ends with the SHA-256 of weights and optimizer of the undisturbed run, with every step in the
ledger exactly once and the same figures, with checkpoints that verify, and with nothing left behind. A case that fails
is kept under `results/failed`. Owns when and whom a kill strikes; what a run is, and the verdict, is `subject.py`'s.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py
from record import RESULTS, Cell, record
from subject import (
    Begun,
    Outcome,
    Subject,
    begin,
    case_folder,
    choose,
    draw,
    find_faults,
    find_left_files,
    make_subject,
    measure_life,
    read_ledger,
    warm,
)

WORKERS = (2, 3, 4)
EVERY_STEPS = 6
NEARLY = 0.95  # of a run's usual life, in which kills fall
DRAWS = 20  # of an instant, until one falls within the run
AGAIN = 0.3  # chance of another kill after each
MOST_KILLS = 4
MOST_WRITING_SECONDS = 0.05  # after a write has begun, in which the kill falls


class Kills:
    """One row of the table at a time, on one subject. lives: usual seconds by number of workers."""

    def __init__(self, subject: Subject, lives: dict[int, float], seed: int) -> None:
        self._subject = subject
        self._lives = lives
        self._seed = seed

    def worker(self, number: int) -> Outcome:
        """Kill a random worker at a random instant: the same process trains on to the end."""
        random = draw(self._seed, "worker", number)
        for attempt in range(DRAWS):
            workers = random.choice(WORKERS)
            at, chosen = random.uniform(0, NEARLY * self._lives[workers]), random.random()
            outcome = Outcome(row="worker", number=number)
            with case_folder(f"worker {number}") as (folder, outcome.faults):
                run = begin(self._subject.command(workers=workers), folder)
                struck = _strike_worker(run, workers, at, chosen)
                outcome.told = f"{workers} workers, draw {attempt}: {struck} after {at:.3f} s"
                outcome.phases.append(struck)
                code = run.end()
                if not struck and code == "0":
                    continue  # it had ended before
                outcome.faults += [] if code == "0" else [f"ended with {code}: {run.output[-2000:]}"]
                outcome.faults += [
                    *find_faults(folder / "run", self._subject),
                    *run.find_left(),
                    *find_left_files(folder),
                ]
                _note_recoveries(outcome, folder / "run")
            return outcome
        raise RuntimeError("no instant falls within the run")

    def supervisor(self, number: int) -> Outcome:
        """Kill the supervisor at a random instant, perhaps again and again: the same command goes on."""
        random = draw(self._seed, "supervisor", number)
        outcome = Outcome(row="supervisor", number=number)
        with case_folder(f"supervisor {number}") as (folder, outcome.faults):
            code, tries = "", 0
            while code != "0" and tries < DRAWS:
                tries += 1
                workers = random.choice(WORKERS)
                at = random.uniform(0, NEARLY * self._lives[workers])
                kills = sum(bool(phase) for phase in outcome.phases)
                wanted = kills == 0 or (kills < MOST_KILLS and random.random() < AGAIN)
                run = begin(self._subject.command(workers=workers, resume=True), folder)
                if wanted:
                    struck = _strike_supervisor(run, at)
                    outcome.phases += [struck] if struck else []
                    outcome.told += f"{workers} workers: {struck or 'nobody'} after {at:.3f} s; "
                code = run.end()
                outcome.faults += run.find_left()
                if code not in ("0", "SIGKILL"):
                    outcome.faults.append(f"ended with {code}: {run.output[-2000:]}")
                    break
                if code == "0" and not outcome.phases:  # it had ended before: begin anew
                    code = ""
                    _clear(folder)
            outcome.faults += [*find_faults(folder / "run", self._subject), *find_left_files(folder)]
        return outcome

    def write(self, number: int) -> Outcome:
        """Kill who writes a checkpoint, or its supervisor, while it is being written."""
        random = draw(self._seed, "write", number)
        of_all, outcome = number % 2 == 0, Outcome(row="write", number=number)
        with case_folder(f"write {number}") as (folder, outcome.faults):
            checkpoints, run_folder = folder / "run" / "checkpoints", folder / "run"
            for _ in range(DRAWS):
                workers, skipped = random.choice(WORKERS), random.randrange(4)
                delay = random.uniform(0, MOST_WRITING_SECONDS)
                run = begin(self._subject.command(workers=workers, resume=True), folder)
                struck = _strike_write(run, checkpoints, skipped, delay, of_all=of_all)
                if struck:
                    outcome.phases.append(struck)
                    outcome.told = (
                        f"{workers} workers: {struck}, write {skipped + 1}, {delay * 1e3:.1f} ms after its begin"
                    )
                if struck and of_all:
                    run.end()
                    outcome.faults += run.find_left() + _verify(run_folder)
                    run = begin(self._subject.command(workers=random.choice(WORKERS), resume=True), folder)
                if (code := run.end()) != "0":
                    outcome.faults.append(f"ended with {code}: {run.output[-2000:]}")
                outcome.faults += run.find_left()
                if struck or outcome.faults:
                    break
                _clear(folder)
            else:
                outcome.faults.append("no write was met")
            outcome.faults += [*find_faults(run_folder, self._subject), *_verify(run_folder), *find_left_files(folder)]
        return outcome


def _strike_worker(run: Begun, workers: int, at: float, chosen: float) -> str:
    """Kill one of the workers that are there `at` seconds after the first was forked; say what it was at."""
    run.wait_for_workers(1)
    time.sleep(at)
    alive = run.workers()
    if not alive or run.is_over():
        return ""
    slot = int(chosen * len(alive))
    with suppress(ProcessLookupError):
        os.kill(alive[slot], signal.SIGKILL)
        row = run.progress_table.row(slot)  # before any other process has this place
        return row.phase + (f" ({row.waiting})" if row.waiting and row.phase not in ("join", "commit") else "")
    return ""


def _strike_supervisor(run: Begun, at: float) -> str:
    """Kill the supervisor `at` seconds after its first worker was forked; say what its first worker was at."""
    run.wait_for_workers(1)
    time.sleep(at)
    if run.is_over():
        return ""
    os.kill(run.pid, signal.SIGKILL)
    return "writing" if _is_writing(run.folder / "run" / "checkpoints") else run.progress_table.row(0).phase


def _strike_write(run: Begun, checkpoints: Path, skipped: int, delay: float, *, of_all: bool) -> str:
    """Wait until a checkpoint is being written, the first after so many others; kill the supervisor, or the writer."""
    for number in range(skipped + 1):
        if not run.wait(lambda: _is_writing(checkpoints), step=0.0003):
            return ""
        if number < skipped and not run.wait(lambda: not _is_writing(checkpoints), step=0.0003):
            return ""
    time.sleep(delay)
    if run.is_over():
        return ""
    writer = run.writer()
    if not of_all and writer is None:
        return ""
    with suppress(ProcessLookupError):
        os.kill(run.pid if of_all or writer is None else writer, signal.SIGKILL)
        who = "supervisor" if of_all else "writer"
        return f"{who} killed, {'half-written' if _is_writing(checkpoints) else 'just written'}"
    return ""


def _is_writing(checkpoints: Path) -> bool:
    with suppress(OSError):
        return any(name.startswith(".step-") and name.endswith(".part") for name in os.listdir(checkpoints))  # noqa: PTH208
    return False


def _verify(run: Path) -> list[str]:
    """What `unisono checkpoints RUN --verify` finds fault with; a run that was killed early may have none at all."""
    with tempfile.TemporaryDirectory() as place:
        asked = begin(["checkpoints", str(run), "--verify"], Path(place))
        code, told = asked.end(), asked.output
    return [] if code == "0" or "has no checkpoints" in told else [f"the checkpoints do not verify: {told}"]


def _clear(folder: Path) -> None:
    """Let the next attempt begin anew."""
    shutil.rmtree(folder / "run", ignore_errors=True)


def _note_recoveries(outcome: Outcome, run: Path) -> None:
    for line in choose(read_ledger(run)[0], "Recovered"):
        outcome.lost_seconds.append(line["wasted_seconds"] + line["seconds"])


def follow(row: str, act: Callable[[int], Outcome], numbers: range | list[int], seed: int) -> list[Outcome]:
    """Run the cases of a row; say which fail, and how to see them again."""
    outcomes = []
    for number in numbers:
        began = time.monotonic()
        outcomes.append(outcome := act(number))
        passed = sum(not one.faults for one in outcomes)
        told = f"{row} {number}: {outcome.told}, {time.monotonic() - began:.1f} s; {passed} of {len(outcomes)} pass"
        print(told, file=sys.stderr, flush=True)
        if outcome.faults:
            print("\n".join(["FAILED", *outcome.faults, f"kept in {RESULTS / 'failed'}"]), file=sys.stderr)
            print(f"again: python benchmarks/faults/kills.py --seed {seed} --only {row}:{number}", file=sys.stderr)
    return outcomes


def make_row(name: str, outcomes: list[Outcome]) -> dict[str, Cell]:
    """A row of the table."""
    phases = Counter(phase.partition(" (")[0] for outcome in outcomes for phase in outcome.phases)
    lost = [seconds for outcome in outcomes for seconds in outcome.lost_seconds]
    return {
        "kill -9 of": name,
        "passed": f"{sum(not outcome.faults for outcome in outcomes)} of {len(outcomes)}",
        "kills": sum(phases.values()),
        "median seconds lost": round(median(lost), 3) if lost else "",
        "where it struck": ", ".join(f"{phase or 'nowhere'} {times}" for phase, times in phases.most_common()),
    }


ROWS = {
    "worker": "a random worker, at any instant",
    "supervisor": "the supervisor, at any instant; then `--resume auto`",
    "write": "the supervisor or the writer, while a checkpoint is written",
}


def main() -> None:
    """Measure every row, or one case of one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=24, help="kills of a worker")
    parser.add_argument("--supervisors", type=int, default=6, help="runs whose supervisor is killed")
    parser.add_argument("--writes", type=int, default=6, help="runs in which a checkpoint is struck")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="ROW:NUMBER", help="one case: worker:17, supervisor:3, write:5")
    given = parser.parse_args()
    numbers: dict[str, range | list[int]] = {
        "worker": range(given.times),
        "supervisor": range(given.supervisors),
        "write": range(given.writes),
    }
    if given.only:
        row, _, number = given.only.partition(":")
        numbers = {row: [int(number)]}
    warm()
    with tempfile.TemporaryDirectory() as place:
        subject = make_subject(Path(place), EVERY_STEPS)
        kills = Kills(subject, {workers: measure_life(subject, workers) for workers in WORKERS}, given.seed)
        found = {row: follow(row, getattr(kills, row), chosen, given.seed) for row, chosen in numbers.items()}
    rows = [make_row(ROWS[row], outcomes) for row, outcomes in found.items() if outcomes]
    if given.only:
        print(rows)
    else:
        trained = f"{len(subject.steps)} steps of a small transformer with dropout, 2 to 4 workers"
        title = f"Kill -9: {trained}, seed {given.seed}"
        record("faults_kills", title, rows)
    if any(outcome.faults for outcomes in found.values() for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
