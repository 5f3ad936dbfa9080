"""Seconds from the SIGKILL of one of two workers to the next finished step, for the peers.

    python benchmarks/faults/peers.py --repeats 5

Owns the peers' environments (`benchmarks/.envs/NAME`, made when missing), their start and their end, the kill, and
what counts as recovered. `recover` runs one peer once, so that another script can take turns with them; a process of
another kind that writes the same journal can be measured with `measure`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for peer_work.py, also when this module is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py
from peer_work import Step, Work, read_journal
from record import Cell, Spread, record

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
ENVIRONMENTS = HERE.parent / ".envs"
TORCH = "torch==2.13.0"
REQUIREMENTS = {"lightning": "lightning==2.6.6", "torchft": "torchft-nightly==2026.10.26"}
"""Peers with an environment of their own; constraints.txt and peer_constraints.txt pin the rest of it."""

WORKERS = 2
MARK = "UNISONO_FAULTS_RUN"
"""An environment variable by which every process of a run is known, also those whose parents are dead."""
HEARTBEAT_TIMEOUT_MS = 500
"""torchft's default of 5,000 would be most of what is measured; managers send one each 100 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is trained, and when a worker is killed."""

    samples_per_step: int = 8
    tokens: int = 64
    checkpoint_every: int = 1
    """for the peers that recover from checkpoints"""
    steps_before: int = 5
    """that all workers have finished together before anything happens"""
    window: float = 3.0
    """seconds after that, in which the kill falls at random"""
    limit: float = 120.0
    """seconds after which a run has failed"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What one kill cost."""

    peer: str
    seconds_to_next_step: float
    """from the signal to the first step beyond all that the old team finished, its step in flight included"""
    seconds_to_full_team: float
    """from the signal to the first such step that as many workers contributed to as before"""
    recomputed_steps: int
    """finished by the old team, and again by the new one"""
    seconds_per_step: float
    """median of the undisturbed steps before"""
    killed_rank: int
    steps_before: int


Start = Callable[[Work, Mapping[str, str]], Callable[[], None]]
"""Start training with this environment; return what must be called before its processes are killed."""


def recover(peer: str, plan: Plan, random: Random) -> Recovery:
    """Start a peer, kill one of its workers, wait until it has recovered, and end it."""
    return measure(peer, _STARTS[peer], plan, random)


def prepare(peer: str) -> Path:
    """Return the peer's Python; make its environment first if it is missing or has other versions."""
    if peer not in REQUIREMENTS:
        return Path(sys.executable)
    folder, constraints = ENVIRONMENTS / peer, [REPOSITORY / "constraints.txt", HERE / "peer_constraints.txt"]
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = "\n".join([TORCH, REQUIREMENTS[peer], *(path.read_text(encoding="utf-8") for path in constraints)])
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        print(f"making {folder.relative_to(REPOSITORY)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += [part for path in constraints for part in ("--constraint", str(path))]
        for wish in ([TORCH], [REQUIREMENTS[peer]], ["--editable", str(REPOSITORY)]):
            subprocess.run([*pip, *wish], check=True)
        ready.write_text(wanted, encoding="utf-8")
    return python


def measure(peer: str, start: Start, plan: Plan, random: Random) -> Recovery:
    """Run whatever `start` starts, kill one of its workers, and tell what that cost. Leaves no process behind.

    Raises:
        TimeoutError: it ended before it had recovered, or needed more than the plan's limit.
    """
    mark = uuid.uuid4().hex
    environment = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(
            folder=Path(scratch),
            journal=Path(scratch) / "journal",
            steps=1_000_000,
            samples_per_step=plan.samples_per_step,
            tokens=plan.tokens,
            checkpoint_every=plan.checkpoint_every,
        )
        stop: Callable[[], None] | None = None
        try:
            stop = start(work, environment)
            _wait(work, mark, plan.limit, lambda steps: len(_together(steps)) > plan.steps_before)
            time.sleep(random.uniform(0, plan.window))
            victim = random.choice(_latest(read_journal(work.journal)))
            killed_at = time.time()
            os.kill(victim.pid, signal.SIGKILL)
            _wait(work, mark, plan.limit, lambda steps: judge(peer, steps, killed_at, victim.rank) is not None)
            found = judge(peer, read_journal(work.journal), killed_at, victim.rank)
        finally:
            if stop is not None:
                stop()
            _end(mark)
    assert found is not None
    return found


def judge(peer: str, steps: Sequence[Step], killed_at: float, killed_rank: int) -> Recovery | None:
    """Return what the kill cost, or None while training has not recovered.

    A survivor may still finish the step in flight, with gradients that the victim sent before it died. Such a step is
    the old team's: where all start anew it is lost with them, and where the survivor goes on it tells nothing.
    """
    old = next(step.team for step in reversed(steps) if step.time <= killed_at)
    before = [step for step in steps if step.team == old]
    after = [step for step in steps if step.team != old and step.time > killed_at]
    last = max(step.number for step in before)
    beyond = [step for step in after if step.number > last]
    full = [step for step in beyond if step.workers == WORKERS]
    if not full:
        return None
    ends = _together(before)
    return Recovery(
        peer=peer,
        seconds_to_next_step=min(step.time for step in beyond) - killed_at,
        seconds_to_full_team=min(step.time for step in full) - killed_at,
        recomputed_steps=max(0, last - min(step.number for step in after) + 1),
        seconds_per_step=median(late - early for early, late in pairwise(ends[1:])),
        killed_rank=killed_rank,
        steps_before=last,
    )


def _together(steps: Sequence[Step]) -> list[float]:
    """When each step of a full team was finished first, in order."""
    ends: dict[int, float] = {}
    for step in steps:
        if step.workers == WORKERS:
            ends.setdefault(step.number, step.time)
    return list(ends.values())


def _latest(steps: Sequence[Step]) -> list[Step]:
    """The last step of each rank."""
    return list({step.rank: step for step in steps}.values())


def _wait(work: Work, mark: str, limit: float, done: Callable[[Sequence[Step]], bool]) -> None:
    started = time.monotonic()
    looks = 0
    while not done(read_journal(work.journal)):
        looks += 1
        if time.monotonic() - started > limit or (looks % 100 == 0 and not _marked(mark)):
            seconds = time.monotonic() - started
            raise TimeoutError(f"nothing after {seconds:.0f} seconds; its output ends with\n{_output(work)[-4000:]}")
        time.sleep(0.05)


def _start_ddp(work: Work, environment: Mapping[str, str]) -> Callable[[], None]:
    return _start_torchrun("ddp", "peer_ddp.py", work, environment)


def _start_lightning(work: Work, environment: Mapping[str, str]) -> Callable[[], None]:
    return _start_torchrun("lightning", "peer_lightning.py", work, environment)


def _start_torchrun(peer: str, script: str, work: Work, environment: Mapping[str, str]) -> Callable[[], None]:
    launch = ["--standalone", "--nproc-per-node", str(WORKERS), "--max-restarts", "3", "--monitor-interval", "0.1"]
    command = [str(prepare(peer)), "-m", "torch.distributed.run", *launch, str(HERE / script), *work.arguments()]
    # Sharing torchrun's own store, the default, lets a restarted process read the address of its dead predecessor there
    # and wait for it until a timeout of half an hour; this is the documented way out.
    process = _spawn(command, work, {**environment, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    def stop() -> None:
        process.kill()  # first of all, or it would start its workers again
        process.wait()

    return stop


def _start_torchft(work: Work, environment: Mapping[str, str]) -> Callable[[], None]:
    python = prepare("torchft")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    lighthouse = {
        "--bind": address,
        "--min_replicas": 1,
        "--join_timeout_ms": 1000,
        "--quorum_tick_ms": 20,
        "--heartbeat_timeout_ms": HEARTBEAT_TIMEOUT_MS,
    }
    options = [str(part) for option in lighthouse.items() for part in option]
    server = _spawn([str(python.with_name("torchft_lighthouse")), *options], work, environment)
    groups = [
        _Supervised(
            [str(python), str(HERE / "peer_torchft.py"), *work.arguments()],
            work,
            {
                **environment,
                "TORCHFT_LIGHTHOUSE": f"http://{address}",
                "REPLICA_GROUP_ID": str(group),
                "NUM_REPLICA_GROUPS": str(WORKERS),
            },
        )
        for group in range(WORKERS)
    ]

    def stop() -> None:
        for group in groups:
            group.stop()
        server.kill()
        server.wait()

    return stop


class _Supervised:
    """A process that is started anew as soon as it has ended, as torchrun does for a group, but without its delay."""

    def __init__(self, command: list[str], work: Work, environment: Mapping[str, str]) -> None:
        self._command, self._work, self._environment = command, work, environment
        self._process = _spawn(command, work, environment)
        self._lock, self._stopped = threading.Lock(), False
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """End the process for good."""
        with self._lock:
            self._stopped = True
            self._process.kill()
        self._process.wait()

    def _watch(self) -> None:
        while True:
            self._process.wait()
            with self._lock:
                if self._stopped:
                    return
                self._process = _spawn(self._command, self._work, self._environment)


def _spawn(command: list[str], work: Work, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with _output_path(work).open("ab") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
        )


def _output_path(work: Work) -> Path:
    return work.folder / "output"


def _output(work: Work) -> str:
    return _output_path(work).read_text(encoding="utf-8", errors="replace") if _output_path(work).exists() else ""


def _end(mark: str) -> None:
    """Kill all processes of a run; torchrun's workers have sessions of their own, so no group holds them all."""
    while alive := _marked(mark):
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _marked(mark: str) -> list[int]:
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


_STARTS: dict[str, Start] = {"ddp": _start_ddp, "lightning": _start_lightning, "torchft": _start_torchft}
PEERS = {
    "ddp": "torchrun, DDP, a checkpoint",
    "lightning": "torchrun, Lightning, a checkpoint",
    "torchft": "torchft, two groups of one",
}


def table(recoveries: Sequence[Recovery], names: Mapping[str, str] = PEERS) -> list[dict[str, Cell]]:
    """Return a row for each side, in the order of `names`."""

    def spread(values: Sequence[float]) -> Spread:
        return Spread(values=tuple(values))

    sides = {name: [found for found in recoveries if found.peer == name] for name in names}
    return [
        {
            "side": names[name],
            "seconds to the next step": spread([found.seconds_to_next_step for found in all_]),
            "to a step of both workers": spread([found.seconds_to_full_team for found in all_]),
            "steps recomputed": ", ".join(str(found.recomputed_steps) for found in all_),
            "seconds per step before": spread([found.seconds_per_step for found in all_]),
        }
        for name, all_ in sides.items()
        if all_
    ]


def main() -> None:
    """Measure the peers in turns."""
    usual = Plan()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--seed", type=int, default=0, help="of the instants and victims")
    parser.add_argument("--samples", type=int, default=usual.samples_per_step, help="per step, of both workers")
    parser.add_argument("--tokens", type=int, default=usual.tokens)
    parser.add_argument("--checkpoint-every", type=int, default=usual.checkpoint_every, help="steps")
    given = parser.parse_args()
    plan = Plan(samples_per_step=given.samples, tokens=given.tokens, checkpoint_every=given.checkpoint_every)
    random, recoveries = Random(given.seed), []
    for peer in given.peers:
        prepare(peer)
    for _ in range(given.repeats):
        for peer in given.peers:
            recoveries.append(recover(peer, plan, random))
            print(recoveries[-1], file=sys.stderr, flush=True)
    size = f"{plan.samples_per_step} samples of {plan.tokens} tokens a step"
    often = "every step" if plan.checkpoint_every == 1 else f"every {plan.checkpoint_every} steps"
    title = (
        f"One of {WORKERS} workers is killed: MiniLM, {size}, a checkpoint {often}, {given.repeats} repeats in turns"
    )
    record("faults_peers", title, table(recoveries))


if __name__ == "__main__":
    main()
