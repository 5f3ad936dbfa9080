"""Seconds from the SIGKILL of one of two workers to the next finished step: unisono and its peers, in turns.

    python benchmarks/faults/recover.py --repeats 5
    python benchmarks/faults/recover.py --sides replace shrink ddp

All train MiniLM on the very same samples. unisono twice: the lost worker is replaced, or the other one goes on alone
(`recovery.on_loss`); then, so that both columns have a figure, a second worker is asked for with `unisono resize` as
soon as the next step is there. The kill, and what counts as recovered, is `peers.py`'s, the same for all sides.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py and workloads.py
from peer_work import Work, read_journal
from peers import PEERS, Plan, Start, measure, prepare, recover, table
from record import record

from unisono.errors import UnisonoError
from unisono.storage.run_lock import ask_for_workers

HERE = Path(__file__).resolve().parent
WORKERS = 2
OURS = {"replace": "unisono, the worker is replaced", "shrink": "unisono, the other goes on; then `unisono resize`"}
SIDES = OURS | PEERS
ASK_SECONDS = 0.05


def start_ours(on_loss: str) -> Start:
    """How `peers.measure` starts unisono."""

    def start(work: Work, environment: Mapping[str, str]) -> Callable[[], None]:
        command = [sys.executable, str(HERE / "unisono_work.py"), on_loss, *work.arguments()]
        with (work.folder / "output").open("ab") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
            )
        over = threading.Event()
        growth = threading.Thread(target=_grow, args=(work, over), daemon=True)
        if on_loss == "shrink":
            growth.start()

        def stop() -> None:
            over.set()
            process.kill()
            process.wait()

        return stop

    return start


def _grow(work: Work, over: threading.Event) -> None:
    """Ask for the second worker again when the first step was finished without it."""
    while not over.wait(ASK_SECONDS):
        steps = read_journal(work.journal)
        if steps and steps[-1].workers < WORKERS:
            with suppress(UnisonoError):  # it is recovering just now: ask again
                ask_for_workers(work.folder / "run", WORKERS)
                return


def main() -> None:
    """Measure the sides in turns."""
    usual = Plan()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", "--times", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--seed", type=int, default=0, help="of the instants and victims")
    parser.add_argument("--samples", type=int, default=usual.samples_per_step, help="per step, of both workers")
    parser.add_argument("--tokens", type=int, default=usual.tokens)
    given = parser.parse_args()
    plan = Plan(samples_per_step=given.samples, tokens=given.tokens)
    random, recoveries = Random(given.seed), []
    for side in given.sides:
        if side in PEERS:
            prepare(side)
    for _ in range(given.repeats):
        for side in given.sides:
            began = time.monotonic()
            found = measure(side, start_ours(side), plan, random) if side in OURS else recover(side, plan, random)
            recoveries.append(found)
            print(f"{found} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    title = (
        f"One of {WORKERS} workers is killed: MiniLM, {plan.samples_per_step} samples of {plan.tokens} tokens a step, "
        f"peers with a checkpoint every step, {given.repeats} repeats in turns, seed {given.seed}"
    )
    record("faults_recover", title, table(recoveries, {side: SIDES[side] for side in given.sides}))


if __name__ == "__main__":
    main()
