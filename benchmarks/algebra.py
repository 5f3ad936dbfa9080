"""Sums and products of arrays: seconds beside torch's own, and errors beside float64.

    python benchmarks/algebra.py

`parallel.matmul` of two 4096 × 4096 float32 matrices by 2 workers, from the call to the result, against `torch.mm` on
2 threads; `parallel.add` of 32 arrays of 64 MB against adding them one by one in place, as NumPy does it. Errors are
relative to the largest element of the result in float64.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import Cell, Spread, record

from unisono import parallel

SIZE = 4096
PARTS, ELEMENTS = 32, 1 << 24


def clock(act: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that it took, and its result."""
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began, result


def hash_bits(array: Any) -> str:
    """The first digits of the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]


def add_in_turn(parts: list[np.ndarray]) -> np.ndarray:
    """The sum as a loop makes it."""
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def measure(sides: dict[str, Callable[[], Any]], exact: np.ndarray, repeats: int) -> list[dict[str, Cell]]:
    """Run the sides in turns; the last one is the peer."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for side, act in sides.items():
            spent, results[side] = clock(act)
            seconds[side].append(spent)
            print(side, f"{spent:.3f} s", file=sys.stderr, flush=True)
    peer = seconds[list(sides)[-1]]
    rows: list[dict[str, Cell]] = []
    for side, found in seconds.items():
        ratios = tuple(theirs / mine for theirs, mine in zip(peer, found, strict=True))
        error = np.abs(np.asarray(results[side], np.float64) - exact).max() / np.abs(exact).max()
        rows.append(
            {
                "side": side,
                "seconds": Spread(values=tuple(found)),
                "speed against the last row": Spread(values=ratios),
                "largest error": f"{error:.1e}",
                "bits": hash_bits(results[side]),
            }
        )
    return rows


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(2)
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((SIZE, SIZE), dtype=np.float32) for _ in range(2))
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    torch.mm(x, y)
    sides: dict[str, Callable[[], Any]] = {
        "parallel.matmul, torch tensors, 2 workers": lambda: parallel.matmul(x, y, workers=2),
        "parallel.matmul, NumPy arrays, 2 workers": lambda: parallel.matmul(a, b, workers=2),
        "parallel.matmul, torch tensors, 5 workers": lambda: parallel.matmul(x, y, workers=5),
        "torch.mm, 2 threads": lambda: torch.mm(x, y),
    }
    rows = measure(sides, a.astype(np.float64) @ b.astype(np.float64), repeats)
    record("matmul", f"Product of two {SIZE} × {SIZE} float32 matrices, {repeats} rounds in turns", rows)
    parts = [generator.standard_normal(ELEMENTS, dtype=np.float32) for _ in range(PARTS)]
    exact = np.zeros(ELEMENTS)
    for part in parts:
        exact += part
    sides = {
        "parallel.add, 2 workers": lambda: parallel.add(parts, workers=2),
        "parallel.add, 5 workers": lambda: parallel.add(parts, workers=5),
        "one by one, NumPy": lambda: add_in_turn(parts),
    }
    record(
        "add",
        f"Sum of {PARTS} arrays of {ELEMENTS:,} float32, {repeats} rounds in turns",
        measure(sides, exact, repeats),
    )


if __name__ == "__main__":
    main()
