"""From the raw text of 20 Newsgroups to test accuracy: the bag model beside scikit-learn and fastText.

    python benchmarks/bag.py --repeats 3 --sides raw prepared scikit-learn

Owns the peers' environment (`benchmarks/.envs/bag`, made when missing), the alternation and what is read from each
side. `bag_peer.py` holds what the peers do.

Settings of scikit-learn were searched on this very split: words or pairs of words, stop words or not, features of one
text or not, always with sublinear TF; hinge, modified Huber, logistic and squared hinge losses with alpha from 1e-6 to
3e-4. `scikit-learn` is the quickest at the accuracy that is usual here (words without stop words, modified Huber,
3e-4), `scikit-learn-pairs` the most accurate one (words and pairs, hinge, 3e-5).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from record import Cell, Spread, record
from world import WORKERS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ENVIRONMENT = HERE / ".envs" / "bag"
REQUIREMENTS = ["scikit-learn==1.9.1", "fasttext-wheel==0.9.2"]
RECIPE = ROOT / "examples" / "text" / "newsgroups.toml"
FILES = [str(ROOT / "data" / "newsgroups" / f"20newsgroups-{split}.tab") for split in ("train", "test")]
SIDES = {
    "raw": "unisono, from raw text",
    "prepared": "unisono, data prepared before",
    "scikit-learn": "scikit-learn, words",
    "scikit-learn-pairs": "scikit-learn, words and pairs",
    "fasttext": "fastText, words and pairs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One side once. Seconds of the whole command include the start of its process and its imports."""

    featurise_seconds: float
    train_seconds: float
    whole_seconds: float
    accuracy: float


def prepare() -> Path:
    """Return the peers' Python; make their environment first if it is missing or has other versions."""
    constraints = [ROOT / "constraints.txt", HERE / "bag_constraints.txt"]
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "ready"
    wanted = "\n".join([*REQUIREMENTS, *(path.read_text(encoding="utf-8") for path in constraints)])
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        print(f"making {ENVIRONMENT.relative_to(ROOT)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += [part for path in constraints for part in ("--constraint", str(path))]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        ready.write_text(wanted, encoding="utf-8")
    return python


def run_peer(side: str) -> Run:
    """Run a peer as a script of its own."""
    began = time.perf_counter()
    command = [str(prepare()), "-W", "ignore", str(HERE / "bag_peer.py"), side, *FILES]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(printed)
    return Run(
        featurise_seconds=found["featurise"],
        train_seconds=found["train"],
        whole_seconds=time.perf_counter() - began,
        accuracy=found["accuracy"],
    )


def run_unisono(store: Path) -> Run:
    """Run the example as a user would, with one evaluation, at the end, as the peers have one."""
    unisono = Path(sys.executable).parent / "unisono"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        options = ["--workers", str(WORKERS), "--run-folder", str(folder), "--quiet"]
        options += ["--set", f"data.store={store}", "--set", "evaluate.every_epochs=0"]
        began = time.perf_counter()
        subprocess.run([str(unisono), "train", str(RECIPE), *options], check=True)
        whole = time.perf_counter() - began
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Run(
        featurise_seconds=summary["goodput"]["seconds"]["start"],
        train_seconds=summary["seconds"],
        whole_seconds=whole,
        accuracy=summary["test"]["accuracy"],
    )


def run(side: str, prepared: Path) -> Run:
    """Run one side once."""
    if side == "prepared":
        return run_unisono(prepared)
    if side == "raw":
        with tempfile.TemporaryDirectory() as store:
            return run_unisono(Path(store))
    return run_peer(side)


def table(runs: dict[str, list[Run]]) -> list[dict[str, Cell]]:
    """Return a row for each side."""

    def spread(side: str, name: str) -> Spread:
        return Spread(values=tuple(getattr(one, name) for one in runs[side]))

    return [
        {
            "side": SIDES[side],
            "read and featurise, s": spread(side, "featurise_seconds"),
            "train, s": spread(side, "train_seconds"),
            "whole command, s": spread(side, "whole_seconds"),
            "test accuracy": ", ".join(sorted({f"{one.accuracy:.2%}" for one in runs[side]})),
        }
        for side in runs
    ]


def main() -> None:
    """Measure the sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # cores are used by workers, jobs and threads of the sides' own
    prepare()
    runs: dict[str, list[Run]] = {side: [] for side in given.sides}
    with tempfile.TemporaryDirectory() as prepared:
        if "prepared" in runs:
            run_unisono(Path(prepared))
        for _ in range(given.repeats):
            for side, found in runs.items():
                found.append(run(side, Path(prepared)))
                print(side, found[-1], file=sys.stderr, flush=True)
    record("bag", f"20 Newsgroups, {WORKERS} cores, {given.repeats} repeats in turns", table(runs))


if __name__ == "__main__":
    main()
