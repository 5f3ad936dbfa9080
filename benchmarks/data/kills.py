"""kill -9 of `unisono prepare` at random instants: the dataset that comes of it in the end, beside that of an
undisturbed one.

    python benchmarks/data/kills.py --times 50

Each time one preparation, on 1 to 3 workers, is killed at a random instant of its usual life (a third of them once
more, when it goes on), then left to end. It passes if every byte of the dataset's folder is equal and nothing else is
left in the store. Owns when the kill strikes, and the verdict.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py
from corpus import make_corpus
from record import Cell, record

RECIPE = """
[data]
validation_fraction = 0.1
[screen]
near_duplicates = "refuse"
[encode]
vocabulary_size = 2000
[model]
kind = "transformer"
"""
STAGES = (("part-", "encoding"), ("encoder", "encoding"), ("staged-", "reading"))


def command(folder: Path, store: Path, workers: int) -> list[str]:
    """The command line of a preparation."""
    options = ["--set", f"data.train={folder / 'input.jsonl'}", "--set", f"data.store={store}"]
    return [
        str(Path(sys.executable).parent / "unisono"),
        "prepare",
        str(folder / "recipe.toml"),
        "-w",
        str(workers),
        *options,
    ]


def hash_store(store: Path) -> str:
    """SHA-256 of all names and bytes in a store."""
    result = hashlib.sha256()
    for path in sorted(store.rglob("*")):
        result.update(str(path.relative_to(store)).encode() + (path.read_bytes() if path.is_file() else b""))
    return result.hexdigest()


def kill(folder: Path, store: Path, workers: int, after_seconds: float) -> str:
    """Start a preparation and kill it; return what it was at."""
    process = subprocess.Popen(command(folder, store, workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after_seconds)
    process.kill()
    if process.wait() == 0:
        return "over"
    names = [path.name for work in store.glob(".*.work") for path in work.iterdir()] if store.exists() else []
    if list(store.glob(".*.partial")):
        return "storing"
    return next((stage for begin, stage in STAGES if any(name.startswith(begin) for name in names)), "beginning")


def main() -> None:
    """Kill, let end, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=12)
    given = parser.parse_args()
    chosen = random.Random(given.seed)
    struck: Counter[str] = Counter()
    equal = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
        make_corpus(folder / "input.jsonl", given.megabytes << 20)
        lives: dict[int, float] = {}
        expected = set()
        for workers in (1, 2, 3):
            began = time.perf_counter()
            subprocess.run(command(folder, folder / f"whole-{workers}", workers), check=True, capture_output=True)
            lives[workers] = time.perf_counter() - began
            expected.add(hash_store(folder / f"whole-{workers}"))
        assert len(expected) == 1, "different numbers of workers made different datasets"
        for number in range(given.times):
            store, workers = folder / f"store-{number}", chosen.choice((1, 2, 3))
            for _ in range(chosen.choice((1, 1, 2))):
                struck[kill(folder, store, workers, chosen.uniform(0, 0.97) * lives[workers])] += 1
            last = chosen.choice((1, 2, 3))
            subprocess.run(command(folder, store, last), check=True, capture_output=True)
            same = hash_store(store) in expected
            equal += same
            print(f"{number + 1} of {given.times}: {'equal' if same else f'DIFFERENT: {store}'}", file=sys.stderr)
            if not same:
                sys.exit(json.dumps(sorted(str(path.relative_to(store)) for path in store.rglob("*"))))
    rows: list[dict[str, Cell]] = [
        {
            "kills": sum(struck.values()),
            "struck while": ", ".join(f"{stage} {count}" for stage, count in sorted(struck.items())),
            "datasets equal": f"{equal} of {given.times}",
        }
    ]
    record("data-kills", f"kill -9 of unisono prepare at {given.times} random instants", rows)


if __name__ == "__main__":
    main()
