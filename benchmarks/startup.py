"""Seconds from the prompt: to `--help`, and to the first finished step of a small model on prepared data.

    python benchmarks/startup.py

Runs the installed command, as a user would. The peer is `torchrun` with the plain loop of `peer.py` on a model of the
same size; its samples are random numbers, so it reads no data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import Cell, Spread, record
from world import WORKERS

REPEATS = 5
BIN = Path(sys.executable).parent
RECIPE = """
[data]
train = "texts.csv"
store = "{folder}/datasets"

[encode]
vocabulary_size = 200
max_tokens = 32

[model]
kind = "transformer"
layers = 2
width = 64
feedforward = 256

[train]
samples_per_step = 32
device = "cpu"
"""
PEER = """
import sys
sys.path.insert(0, {folder!r})
import dataclasses, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
import peer, workloads
workload = dataclasses.replace(workloads.transformer("float32", 2), steps=1, warm_up=0)
peer.train(workload, dist.get_rank(), dist.get_world_size())
print("first step", flush=True)
dist.destroy_process_group()
"""


def first_line(command: list[str], cwd: Path, sign: str) -> float:
    """Start a command; return the seconds until a line with `sign` appears, and let it come to its end."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = next((time.perf_counter() - started for line in process.stdout if sign in line), None)
        process.stdout.read()
    if found is None:
        sys.exit(f"{' '.join(command)} ended with code {process.returncode} before a line with {sign!r}")
    return found


def main() -> None:
    """Measure each command several times, in turns."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the peer would wait for a host name that may not resolve
        (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
        (folder / "peer_script.py").write_text(PEER.format(folder=str(Path(__file__).resolve().parent)))
        lines = [f"word{number % 17} and word{number % 13},{'ab'[number % 2]}" for number in range(400)]
        (folder / "texts.csv").write_text("\n".join(["text,label", *lines]) + "\n")
        unisono, done = str(BIN / "unisono"), json.dumps({"event": "StepDone"})[1:-1]
        train = [unisono, "train", "recipe.toml", "--workers", str(WORKERS), "--json"]
        torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(WORKERS), "peer_script.py"]
        commands = {
            "`unisono --help`": ([unisono, "--help"], "Usage"),
            f"`unisono train`, first step, {WORKERS} workers": (train, done),
            f"`torchrun` and DDP, first step, {WORKERS} workers": (torchrun, "first step"),
        }
        first_line(train, folder, done)  # prepares the data
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(REPEATS):
            for name, (command, sign) in commands.items():
                seconds[name].append(first_line(command, folder, sign))
    rows: list[dict[str, Cell]] = [
        {"command": name, "seconds": Spread(values=tuple(values))} for name, values in seconds.items()
    ]
    record("startup", f"From the prompt, {REPEATS} repeats in turns", rows)


if __name__ == "__main__":
    main()
