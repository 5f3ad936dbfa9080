"""The peers' environments: one folder under `benchmarks/.envs` for each set of packages, made when it is missing.

Owns their names, what is installed in each and when one is made again. `pins/NAME.txt` pins every package of it; torch
is the project's own version everywhere. DDP and transformers' Trainer share one: they need the same packages.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / ".envs"
TORCH = "torch==2.13.0"
REQUIREMENTS = {
    "transformers": ("transformers==5.23.0", "accelerate==1.15.0"),
    "lightning": ("transformers==5.23.0", "lightning==2.6.6"),
    "deepspeed": ("transformers==5.23.0", "deepspeed==0.19.8", "ninja==1.13.2"),
    "ray": ("transformers==5.23.0", "ray[default,train]==2.60.0"),
}


def pins(name: str) -> Path:
    """The constraints file of an environment."""
    return HERE / "pins" / f"{name}.txt"


def folder(name: str) -> Path:
    """Where an environment lies."""
    return FOLDER / f"train-{name}"


def make(name: str) -> Path:
    """Return an environment's Python; make the environment first if it is missing or has other versions."""
    place = folder(name)
    python, ready = place / "bin" / "python", place / "ready"
    wanted = "\n".join([TORCH, *REQUIREMENTS[name], pins(name).read_text(encoding="utf-8")])
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making {place.relative_to(HERE.parent.parent)}", file=sys.stderr, flush=True)
    started = time.monotonic()
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [
        str(python),
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "install",
        "--constraint",
        str(pins(name)),
    ]
    for wish in (
        [TORCH],
        list(REQUIREMENTS[name]),
    ):  # torch first, so that the build for CPUs is taken where there is one
        subprocess.run([*pip, *wish], check=True)
    ready.write_text(wanted, encoding="utf-8")
    print(f"made in {time.monotonic() - started:.0f} seconds", file=sys.stderr, flush=True)
    return python
