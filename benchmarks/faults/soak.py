"""All faults mixed, on one run after another, for some minutes: each run has to end as if nothing had happened.

    python benchmarks/faults/soak.py --minutes 3
    python benchmarks/faults/soak.py --seed 0 --only 17       one case again

A case draws, from its seed and number alone: workers, what happens on a loss, faults within (`--fault`: kill, crash,
quit, stop, hang, block, fail, pause, each at a step and phase), events from outside (kill -9 of a worker, the
supervisor or the writer of a checkpoint, SIGSTOP, SIGTERM, resizes), and perhaps a disk that is full for a while. Who
was stopped or killed is started again with the same command and `--resume auto`. Instants from outside are seconds, so
a case replayed on a busier machine may strike elsewhere. Owns the mixture; the verdict is `subject.py`'s.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py and workloads.py
from record import RESULTS, record
from subject import (
    Begun,
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

from unisono.processes.fault_injection import KINDS, parse
from unisono.processes.progress_table import PHASES

EVERY_STEPS = 5
MOST_WORKERS = 4
MOST_STARTS = 12
AGAIN_AT_MOST = 2  # starts with the faults within
HANGING = ("stop", "hang", "block")
VERBS = ("begin", "load", "contribute", "reduce", "update", "commit", "report")
OUTSIDE = ("kill worker", "kill supervisor", "kill writer", "stop worker", "terminate", "resize")
RULES = ("recovery.hang_factor=3", "recovery.backoff_seconds=0.05", "recovery.attempts=9")
"""Of a soak: who hangs is lost after three seconds, and several faults may meet at one step."""
DISK_BYTES, LEFT_BYTES = 4 << 20, 30_000  # of the small disk, and while it is full
FULL_DISK_CHANCE = 0.15
RESUMED = ("75", "SIGKILL")
DISK_IS_FULL = "2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What happens from outside, so many seconds after a start. number: of workers, or which of them."""

    at: float
    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}{f' {self.number}' if self.kind == 'resize' else ''} at {self.at:.2f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One case."""

    workers: int
    on_loss: str
    faults: list[str]
    events: list[Event]
    full_disk: bool

    def __str__(self) -> str:
        parts = [f"{self.workers} workers, {self.on_loss}", *self.faults, *map(str, self.events)]
        return "; ".join(parts + (["full disk"] if self.full_disk else []))


def draw_plan(random: Random, steps: int, life: float) -> Plan:
    """What is to happen to a run of so many steps, and usually so many seconds."""
    workers = random.randint(1, MOST_WORKERS)
    faults = []
    for _ in range(random.choice((0, 0, 1, 1, 2))):
        kind, first = random.choice(list(KINDS)), 1
        if kind in HANGING:
            first = 3  # before the first step is measured, nobody knows how long is long
        step, phase = random.randint(first, steps), random.choice(VERBS)
        fault = f"{kind}(worker={random.randrange(workers)}, step={step}, phase={phase})"
        assert parse(fault, PHASES)
        faults.append(fault)
    events = [
        Event(at=random.uniform(0, life), kind=random.choice(OUTSIDE), number=random.randint(1, MOST_WORKERS))
        for _ in range(random.choice((1, 1, 2, 3)))
    ]
    return Plan(
        workers=workers,
        on_loss=random.choice(("replace", "shrink")),
        faults=faults,
        events=sorted(events, key=lambda event: event.at),
        full_disk=random.random() < FULL_DISK_CHANCE,
    )


class Case:
    """One run, brought to its end through everything that its plan has in store. done: what has happened."""

    def __init__(self, subject: Subject, plan: Plan, folder: Path, disk: Path | None) -> None:
        self.faults: list[str] = []
        self.done: Counter[str] = Counter()
        self.recoveries = 0
        self._subject = subject
        self._plan = plan
        self._folder = folder
        self._disk = disk
        self._run = (disk or folder) / "run"
        self._asked: list[Begun] = []

    def bring_to_end(self) -> None:
        """Start it, disturb it, start it again; then judge."""
        events, code, starts = list(self._plan.events), "", 0
        rules = [part for rule in (*RULES, f"recovery.on_loss={self._plan.on_loss}") for part in ("--set", rule)]
        inside = [part for fault in self._plan.faults for part in ("--fault", fault)]
        filler = self._disk / "filler" if self._disk else None
        if filler:
            filler.write_bytes(b"\1" * (DISK_BYTES - LEFT_BYTES))
            self.done["full disk"] += 1
        while code != "0" and starts < MOST_STARTS:
            starts += 1
            command = self._subject.command(
                *rules,
                *(inside if starts <= AGAIN_AT_MOST else []),
                workers=self._plan.workers,
                resume=True,
                run=str(self._run),
            )
            run = begin(command, self._folder)
            while events and not run.is_over():
                if not run.wait(lambda event=events[0], run=run: time.monotonic() - run.started > event.at):
                    break
                self._happen(run, events.pop(0))
                if filler:
                    filler.unlink(missing_ok=True)
            code = run.end()
            self.faults += run.find_left()
            if filler and code == DISK_IS_FULL:
                filler.unlink(missing_ok=True)
            elif code not in ("0", *RESUMED):
                self.faults.append(f"start {starts} ended with {code}: {run.output[-3000:]}")
                break
        if code != "0" and not self.faults:
            self.faults.append(f"no end after {starts} starts: {run.output[-3000:]}")
        for asked in self._asked:
            if asked.end(10.0) == "hangs":
                self.faults.append("`unisono resize` hangs")
        for kind in self._plan.faults if code == "0" else []:
            self.done[f"asked for within: {kind.partition('(')[0]}"] += 1
        self.recoveries = len(choose(read_ledger(self._run)[0], "Recovered"))
        self.faults += find_faults(self._run, self._subject) + find_left_files(self._folder) + _find_own_ports()
        self.faults += _verify(self._run, self._folder)

    def _happen(self, run: Begun, event: Event) -> None:
        """Let an event happen, if there is somebody for it to happen to."""
        workers, writer, target = run.workers(), run.writer(), 0
        if event.kind in ("kill worker", "stop worker"):
            target = workers[event.number % len(workers)] if workers else 0
            if event.kind == "stop worker" and not choose(read_ledger(self._run)[0], "StepDone"):
                return  # see draw_plan
        elif event.kind == "kill writer":
            run.wait(run.writer, seconds=1.0)
            target = run.writer() or writer or 0
        elif event.kind in ("kill supervisor", "terminate"):
            target = run.pid
        else:
            place = self._folder / f"asked-{len(self._asked)}"
            place.mkdir()
            self._asked.append(begin(["resize", str(self._run), "--workers", str(event.number)], place))
            self.done["resize asked for"] += 1
            return
        if not target or run.is_over():
            return
        signum = {"stop worker": signal.SIGSTOP, "terminate": signal.SIGTERM}.get(event.kind, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(target, signum)
            self.done[event.kind] += 1


@contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[Path | None]:
    """A small file system, where it is wanted and may be mounted."""
    place = folder / "disk"
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if wanted:
        place.mkdir()
    if not wanted or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _verify(run: Path, folder: Path) -> list[str]:
    """What `unisono checkpoints RUN --verify` finds fault with."""
    place = folder / "verified"
    place.mkdir(exist_ok=True)
    asked = begin(["checkpoints", str(run), "--verify"], place)
    return [] if asked.end() == "0" else [f"the checkpoints do not verify: {asked.output}"]


def _find_own_ports() -> list[str]:
    """Listening sockets of this process; who else of ours could hold one has been seen to be gone."""
    sockets = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            sockets.add(str(path.readlink()))
    lines = [line.split() for name in ("tcp", "tcp6") for line in _read_lines(Path("/proc/net") / name)[1:]]
    return [
        f"port {int(line[1].rpartition(':')[2], 16)} is left"
        for line in lines
        if line[3] == "0A" and f"socket:[{line[9]}]" in sockets
    ]


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="ascii").splitlines() if path.exists() else []


def _list_shared() -> set[str]:
    place = Path("/dev/shm")
    found = {path.name for path in place.iterdir()} if place.exists() else set()
    return {name for name in found if name.startswith(("unisono", "torch", "psm", "gloo"))}


def soak(
    subject: Subject, life: float, seed: int, numbers: Sequence[int] | None, minutes: float
) -> tuple[int, int, Counter[str]]:
    """Run cases until the time is over; return how many there were, how many failed, and what happened in all."""
    done: Counter[str] = Counter()
    deadline, number, failed, cases = time.monotonic() + 60 * minutes, -1, 0, 0
    while (time.monotonic() < deadline) if numbers is None else (cases < len(numbers)):
        number = number + 1 if numbers is None else numbers[cases]
        cases += 1
        plan, shared, began = (
            draw_plan(draw(seed, "soak", number), len(subject.steps), life),
            _list_shared(),
            time.monotonic(),
        )
        with case_folder(f"soak {number}") as (folder, faults), small_disk(folder, plan.full_disk) as disk:
            case = Case(subject, plan, folder, disk)
            try:
                case.bring_to_end()
            except BaseException as error:
                case.faults.append(f"{type(error).__name__}: {error}")
                if not isinstance(error, Exception):
                    raise
            finally:
                faults += case.faults + [f"/dev/shm/{name} is left" for name in _list_shared() - shared]
            if plan.full_disk and disk is None:
                done["full disk skipped: mounting is not permitted"] += 1
        done.update(case.done)
        done["recoveries"] += case.recoveries
        print(
            f"{number}: {plan}: {'FAILED' if faults else 'ok'}, {time.monotonic() - began:.1f} s",
            file=sys.stderr,
            flush=True,
        )
        if faults:
            failed += 1
            print("\n".join(faults), file=sys.stderr)
            print(
                f"kept in {RESULTS / 'failed'}; again: python benchmarks/faults/soak.py --seed {seed} --only {number}"
            )
    return cases, failed, done


def main() -> None:
    """Soak, or see one case again; end with an error if a case fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these cases")
    parser.add_argument("--times", type=int, help="so many cases, instead of minutes")
    given = parser.parse_args()
    numbers = given.only or (list(range(given.times)) if given.times else None)
    warm()
    with tempfile.TemporaryDirectory() as place:
        subject = make_subject(Path(place), EVERY_STEPS)
        life = measure_life(subject, 2)
        cases, failed, done = soak(subject, life, given.seed, numbers, given.minutes)
    rows = [{"what": "runs that ended as if nothing had happened", "times": f"{cases - failed} of {cases}"}]
    rows += [{"what": what, "times": str(times)} for what, times in done.most_common()]
    record(
        "faults_soak", f"Soak, seed {given.seed}: {len(subject.steps)} steps of a small transformer with dropout", rows
    )
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
