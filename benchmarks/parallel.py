"""What a task costs, and how fast arrays pass through: `unisono.parallel` beside concurrent.futures and Ray.

    python benchmarks/parallel.py            5 rounds
    python benchmarks/parallel.py --quick    3 rounds of fewer tasks

Owns the alternation and the arithmetic; `parallel_sides.py` holds what each side does. Every side runs in a process of
its own, in turns, with 2 workers. A call's cost is that of one with a task for each worker, whatever is started in it
included (of Ray, whose cluster stands already, nothing is). A task's cost is what a call with many takes beyond that,
divided by their number; arrays are timed from the first result to the last. unisono seeds three generators before each
task unless it is told not to; nobody else does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from parallel_sides import ELEMENTS, SIDES, WORKERS
from record import Cell, Spread, record

SIDE = Path(__file__).resolve().parent / "parallel_sides.py"
ROUNDS, QUICK_ROUNDS = 5, 3
TASKS = {"unisono": 100_000, "unisono, seed=None": 100_000, "executor, tuned": 100_000, "unisono on Ray": 500_000}
FEWER_TASKS = 5_000  # of sides whose tasks cost many times as much
ARRAYS = 2_000


def run(side: str, share: int) -> dict[str, float]:
    """One side once: seconds of a call, microseconds of a task, MB/s of arrays, both ways together."""
    tasks, arrays = TASKS.get(side, FEWER_TASKS) // share, ARRAYS // share
    command = [sys.executable, str(SIDE), side, str(tasks), str(arrays)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    return {
        "call": seconds["first"] * 1e3,
        "task": (seconds["whole"] - seconds["first"]) / (tasks - WORKERS) * 1e6,
        "arrays": 2 * (arrays - 1) * ELEMENTS * 8 / 1e6 / seconds["arrays"],
    }


def main() -> None:
    """Alternate the sides, and record all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 rounds of a fifth of the tasks")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    rounds, share = (QUICK_ROUNDS, 5) if options.quick else (ROUNDS, 1)
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(rounds):
        for side in options.sides:
            found[side].append(run(side, share))
    ours = found[options.sides[0]]
    rows: list[dict[str, Cell]] = []
    for side, runs in found.items():
        pairs = list(zip(runs, ours, strict=True))
        rows.append(
            {
                "side": side,
                "a call, ms": Spread(values=tuple(one["call"] for one in runs)),
                "a task, µs": Spread(values=tuple(one["task"] for one in runs)),
                "1 MB arrays, MB/s in and out": Spread(values=tuple(one["arrays"] for one in runs)),
                f"task / {options.sides[0]}": round(median(one["task"] / our["task"] for one, our in pairs), 2),
                f"{options.sides[0]} / MB/s": round(median(our["arrays"] / one["arrays"] for one, our in pairs), 2),
            }
        )
    record("parallel", f"Tasks on {WORKERS} workers, {rounds} alternating rounds", rows)


if __name__ == "__main__":
    main()
