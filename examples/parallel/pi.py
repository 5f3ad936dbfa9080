"""Estimate pi by throwing darts, with any number of workers and to the same digits.

python examples/parallel/pi.py                    one worker per core
python examples/parallel/pi.py --workers 3        the same output
python examples/parallel/pi.py --engine ray       on a Ray cluster (pip install 'unisono[ray]')
"""

from __future__ import annotations

import argparse

import numpy as np

from unisono import parallel

DARTS = 1_000_000


def throw(task: int) -> int:
    """How many of a task's darts hit the circle; drawn from the task's own key, whichever worker runs it."""
    x, y = np.random.default_rng(parallel.key()).random((2, DARTS))
    return int(np.count_nonzero(x * x + y * y < 1))


def main() -> None:
    """Parse, estimate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="auto", help="a number, or auto: one per core")
    parser.add_argument("--tasks", type=int, default=200, help=f"of {DARTS:,} darts each")
    parser.add_argument("--engine", default="processes", choices=["processes", "ray"])
    options = parser.parse_args()
    hits = parallel.map_reduce(
        throw,
        lambda a, b: a + b,
        range(options.tasks),
        workers=options.workers if options.workers == "auto" else int(options.workers),
        engine=options.engine,
    )
    print(f"pi is about {4 * hits / (DARTS * options.tasks)!r} ({options.tasks:,} million darts)")


if __name__ == "__main__":
    main()
