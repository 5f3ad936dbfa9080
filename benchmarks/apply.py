"""Texts per second of `unisono predict` and `unisono evaluate`, with 1 worker and with 2, in turns.

    python benchmarks/apply.py [--texts 20000] [--repeats 3]

A transformer of 4 layers of width 256 is trained for one step; then 20,000 texts of 20 Newsgroups, cut to 128 tokens,
are classified from a CSV file into another one, and scored. Each time is that of one call in a fresh process, after
imports: reading, encoding, computing, writing. "others" is the share of the cores' time that other processes had
meanwhile: a ratio says little where it is not small.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Cell, Spread, record

NEWS = Path(__file__).resolve().parent.parent / "data" / "newsgroups"
RECIPE = """
[data]
train = "train.csv"
store = "{folder}/datasets"

[encode]
vocabulary_size = 8000
max_tokens = 128

[model]
kind = "transformer"
layers = 4
width = 256

[train]
samples_per_step = 64
max_steps = 1
device = "cpu"
"""
CALLS = {
    "predict": 'unisono.predict("run", "texts.csv", "out-{workers}.csv", workers={workers})',
    "evaluate": 'unisono.evaluate("run", "texts.csv", workers={workers}, quiet=True)',
}
PROGRAM = """
import json, os, resource, time
import unisono, unisono.api.application, unisono.data.encoding.tokens, unisono.data.write
import torch.distributed
def cores():
    with open("/proc/stat") as file:
        numbers = list(map(int, file.readline().split()[1:]))
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")
def own():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
busy, mine, started = cores(), own(), time.perf_counter()
{call}
seconds = time.perf_counter() - started
others = max(0.0, cores() - busy - (own() - mine)) / seconds / os.cpu_count()
print(json.dumps([seconds, others]))
"""


def read_news(count: int) -> list[tuple[str, str]]:
    """So many texts with their classes; from the beginning again where there are not enough."""
    found: list[tuple[str, str]] = []
    for path in sorted(NEWS.glob("*.tab")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[3:]
        found += [(text, label) for label, _, text in (line.partition("\t") for line in lines) if text]
    return [found[number % len(found)] for number in range(count)]


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write texts and classes."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def run_python(program: str, folder: Path) -> str:
    """Run a program in `folder`, and return what it prints."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    """Measure each call with 1 and 2 workers in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows: list[dict[str, Cell]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        news = read_news(options.texts)
        write_csv(folder / "train.csv", news[:: max(1, len(news) // 2000)])
        write_csv(folder / "texts.csv", news)
        (folder / "news.toml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
        run_python('import unisono; unisono.train("news.toml", workers=1, run="run", quiet=True)', folder)
        for name, call in CALLS.items():
            seconds: dict[int, list[float]] = {1: [], 2: []}
            others: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(options.repeats):
                for workers in (1, 2):
                    program = PROGRAM.replace("{call}", call.format(workers=workers))
                    taken, busy = json.loads(run_python(program, folder).splitlines()[-1])
                    seconds[workers].append(taken)
                    others[workers].append(busy)
                    print(f"{name} {workers}: {taken:.1f} s, others {busy:.0%}", file=sys.stderr, flush=True)
                    time.sleep(1)
            rows += [
                {
                    "call": name,
                    "workers": workers,
                    "texts/s": Spread(values=tuple(options.texts / one for one in seconds[workers])),
                    "times one worker": f"{min(seconds[1]) / min(seconds[workers]):.2f}",
                    "others": f"{min(others[workers]):.0%} to {max(others[workers]):.0%}",
                }
                for workers in (1, 2)
            ]
        digests = {hashlib.sha256((folder / f"out-{workers}.csv").read_bytes()).hexdigest() for workers in (1, 2)}
        same = "the same bytes" if len(digests) == 1 else "OTHER BYTES"
    record("apply", f"{options.texts:,} texts, transformer of 4 × 256; 1 and 2 workers write {same}", rows)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
