"""Wall time and accuracy of the examples, each once, from nothing: the data are prepared anew.

python benchmarks/demo.py               all of them
python benchmarks/demo.py newsgroups    one
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Cell, record
from world import WORKERS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ("newsgroups", "bbc")


def train(name: str) -> dict[str, Cell]:
    """Run one example as a user would; return its row."""
    recipe = ROOT / "examples" / "text" / f"{name}.toml"
    unisono = Path(sys.executable).parent / "unisono"
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        options = [
            "--workers",
            str(WORKERS),
            "--run-folder",
            str(run),
            "--quiet",
            "--set",
            f"data.store={scratch}/datasets",
        ]
        started = time.perf_counter()
        subprocess.run([str(unisono), "train", str(recipe), *options], check=True)
        seconds = time.perf_counter() - started
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "example": name,
        "wall seconds": round(seconds, 1),
        "of them in the run": summary["seconds"],
        "samples/s": summary["samples_per_second"],
        "test accuracy": f"{summary['test']['accuracy']:.2%}",
        "macro-F1": round(summary["test"]["macro_f1"], 4),
        "weights_sha256": summary["weights_sha256"][:16],
    }


def main(names: list[str]) -> None:
    """Run the named examples, or all."""
    record("demo", f"The examples, {WORKERS} workers, once each", [train(name) for name in names or EXAMPLES])


if __name__ == "__main__":
    main(sys.argv[1:])
