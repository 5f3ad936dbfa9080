"""Random microbatches from a dataset on disk: unisono's store beside datasets and a plain torch DataLoader.

    python benchmarks/data/store.py

Each side reads the same samples (MiniLM's tokens of 100 MB of JSONL, as `prepare.py` makes them) in the same random
order, 32 at a time, in one process, and hands out tensors: unisono its tokens one after the other with offsets, which
is what its models take; datasets in torch's format, and a DataLoader over a dataset in memory, padded by a collate
function, which is what other models take (for datasets without padding as well: a list of tensors). Each side warms
up first. Owns the sides; the peers run in `peer_store.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py
import numpy as np
from corpus import make_corpus
from prepare import RECIPE, make_environment
from record import Cell, Spread, record

from unisono.config import recipe as recipes
from unisono.data.prepare import prepare

HERE = Path(__file__).resolve().parent
MICROBATCH, SECONDS = 32, 5.0
PEERS = ("datasets, padded", "datasets, lists", "DataLoader, padded")


def read_own(folder: Path, megabytes: int) -> tuple[float, Path]:
    """Return samples/s of unisono's store, and the file of tokens that the peers read."""
    source, recipe = folder / "input.jsonl", folder / "recipe.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    make_corpus(source, megabytes << 20)
    settings = (f'data.train="{source}"', f'data.store="{folder}/store"')
    dataset = prepare(recipes.load(recipe, settings), workers=2)
    split = dataset.split("train")
    assert split is not None
    order = np.random.default_rng(0).permutation(len(split))
    batches = [order[start : start + MICROBATCH] for start in range(0, len(order), MICROBATCH)]
    for batch in batches[:100]:
        split.take(batch)
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < SECONDS:
        split.take(batches[100 + count % (len(batches) - 100)])
        count += 1
    return count * MICROBATCH / spent, dataset.folder / "train.arrow"


def read_peer(side: str, arrow: Path) -> float:
    """Return samples/s of a peer."""
    command = [str(make_environment()), str(HERE / "peer_store.py"), side, str(arrow), str(MICROBATCH), str(SECONDS)]
    environment = {**os.environ, "HF_HOME": str(arrow.parent.parent), "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return float(json.loads(printed.splitlines()[-1]))


def main() -> None:
    """Measure the sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=100)
    given = parser.parse_args()
    rates: dict[str, list[float]] = {side: [] for side in ("unisono", *PEERS)}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(given.repeats):
            rate, arrow = read_own(Path(scratch), given.megabytes)
            rates["unisono"].append(rate)
            for side in PEERS:
                rates[side].append(read_peer(side, arrow))
    rows: list[dict[str, Cell]] = []
    for side, found in rates.items():
        ratios = tuple(own / other for own, other in zip(rates["unisono"], found, strict=True))
        row: dict[str, Cell] = {"side": side, "samples/s": Spread(values=tuple(found))}
        rows.append(row | {"unisono is faster by": Spread(values=ratios) if side != "unisono" else "1"})
    record("data-store", f"Random microbatches of {MICROBATCH}, {given.repeats} rounds in turns", rows)


if __name__ == "__main__":
    main()
