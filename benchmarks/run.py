"""All measurements, one after another, each in a process of its own: `make bench`.

python benchmarks/run.py                     all
python benchmarks/run.py step faults/kills   these
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FAULTS = ("kills", "recover", "costs", "straggler", "resize")
NAMES = (
    "startup",
    "apply",
    "exchange",
    "step",
    "share",
    "promise",
    "peers/compare",
    "bag",
    "demo",
    "parallel",
    "algebra",
)
DATA = ("prepare", "store", "kills", "fuzz")
MEASUREMENTS = (*NAMES, *(f"data/{name}" for name in DATA), *(f"faults/{name}" for name in FAULTS))
OPTIONS = {"peers/compare": ["--quick"], "data/kills": ["--times", "5"], "data/fuzz": ["--minutes", "2"]}


def main(names: list[str]) -> None:
    """Run the named measurements, or all; end with an error if one fails."""
    if unknown := set(names) - set(MEASUREMENTS):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(MEASUREMENTS)}")
    folder = Path(__file__).resolve().parent
    failed = [
        name
        for name in names or MEASUREMENTS
        if subprocess.run([sys.executable, str(folder / f"{name}.py"), *OPTIONS.get(name, [])], check=False).returncode
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
