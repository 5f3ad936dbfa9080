"""From JSONL to a dataset on disk: `unisono prepare` beside Hugging Face's datasets, and its memory for a large input.

    python benchmarks/data/prepare.py                     200 MB, three rounds in turns
    python benchmarks/data/prepare.py --megabytes 4096 --sides unisono-2 --repeats 1

Both read the same file, drop empty texts and exact duplicates, tokenise with MiniLM's WordPiece to at most 128 tokens
and write. unisono screens besides, draws its report, hashes what it reads and writes, and has its files synced to the
disk. Seconds are those of the whole command, with its start. Owns the sides, the alternation, and the peer's
environment (`benchmarks/.envs/data`); `corpus.py` makes the input, `peer_prepare.py` is the peer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py
from corpus import make_corpus
from record import Cell, Spread, record
from watched import Watched, run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = HERE.parent / ".envs" / "data"
REQUIREMENTS = ["datasets==5.2.0", "tokenizers==0.23.3", "torch==2.13.0"]
TOKENIZER = ROOT / "data" / "minilm" / "tokenizer.json"
MOST_TOKENS = 128
SIDES = ("unisono-2", "unisono-1", "datasets-2")
RECIPE = f"""
[encode]
kind = "tokenizer"
tokenizer = "{TOKENIZER}"
max_tokens = {MOST_TOKENS}
[model]
kind = "pretrained"
folder = "{TOKENIZER.parent}"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One run of a side."""

    watched: Watched
    kept: int


def make_environment() -> Path:
    """Return the peer's Python; make its environment first if it is missing or has other versions."""
    constraints = ROOT / "constraints.txt"
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "ready"
    wanted = "\n".join([*REQUIREMENTS, constraints.read_text(encoding="utf-8")])
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        print(f"making {ENVIRONMENT.relative_to(ROOT)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--constraint", str(constraints), *REQUIREMENTS], check=True)
        ready.write_text(wanted, encoding="utf-8")
    return python


def run_side(side: str, source: Path, recipe: Path, *, memory: bool) -> Side:
    """Prepare once, in a folder that is removed afterwards."""
    name, workers = side.split("-")
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        if name == "datasets":
            command = [str(make_environment()), str(HERE / "peer_prepare.py"), str(source), str(TOKENIZER), scratch]
            environment = {**os.environ, "HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            watched = run([*command, workers, str(MOST_TOKENS)], environment, memory=memory)
            return Side(watched=watched, kept=json.loads(watched.output.splitlines()[-1])["kept"])
        command = [str(Path(sys.executable).parent / "unisono"), "prepare", str(recipe), "--workers", workers]
        command += ["--set", f"data.train={source}", "--set", f"data.store={scratch}/store"]
        watched = run(command, memory=memory)
        (manifest,) = Path(scratch).glob("store/*/manifest.json")
        kept = json.loads(manifest.read_text(encoding="utf-8"))["splits"]["train"]["samples"]
        return Side(watched=watched, kept=kept)


def table(runs: dict[str, list[Side]], records: int) -> list[dict[str, Cell]]:
    """Return a row for each side."""
    ours = [one.watched.seconds for one in runs.get("unisono-2", [])]
    rows: list[dict[str, Cell]] = []
    for side, found in runs.items():
        seconds = [one.watched.seconds for one in found]
        ratio: Cell = "1"
        if ours and side != "unisono-2":
            ratio = Spread(values=tuple(theirs / mine for theirs, mine in zip(seconds, ours, strict=True)))
        rows.append(
            {
                "side": side,
                "records/s": Spread(values=tuple(records / second for second in seconds)),
                "seconds": Spread(values=tuple(seconds)),
                "times as long as unisono-2": ratio,
                "peak memory of all processes, MB": Spread(values=tuple(one.watched.peak_bytes / 1e6 for one in found)),
                "records kept": ", ".join(sorted({f"{one.kept:,}" for one in found})),
            }
        )
    return rows


def main() -> None:
    """Measure the sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--no-memory", action="store_true", help="do not sample memory, which takes some time itself")
    given = parser.parse_args()
    if any(side.startswith("datasets") for side in given.sides):
        make_environment()
    with tempfile.TemporaryDirectory() as scratch:
        source, recipe = Path(scratch) / "input.jsonl", Path(scratch) / "recipe.toml"
        recipe.write_text(RECIPE, encoding="utf-8")
        records = make_corpus(source, given.megabytes << 20)
        runs: dict[str, list[Side]] = {side: [] for side in given.sides}
        for _ in range(given.repeats):
            for side, found in runs.items():
                found.append(run_side(side, source, recipe, memory=not given.no_memory))
                print(side, f"{found[-1].watched.seconds:.1f} s", file=sys.stderr, flush=True)
    title = f"{given.megabytes:,} MB of JSONL, {records:,} records, {given.repeats} rounds in turns"
    record(f"data-prepare-{given.megabytes}", title, table(runs, records))


if __name__ == "__main__":
    main()
