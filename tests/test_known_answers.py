"""Weights that portable numerics are to give on every processor with AVX2; known_answers.json has them.

They hold for the libraries that are named there. After a change that means to give other bits: run this file with
UNISONO_WRITE_ANSWERS=1, and say in CHANGELOG.md that trained weights change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toy import make_records
from unisono.determinism.instruction_sets import check_processor
from unisono.errors import NumericsError

ANSWERS = Path(__file__).with_name("known_answers.json")
MINILM = Path(__file__).parents[1] / "data" / "minilm"
MODELS = {
    "bag": 'kind = "bag"\nwidth = 8\ndropout = 0.1',
    "transformer": 'kind = "transformer"\nlayers = 2\nwidth = 32\nheads = 2\nfeedforward = 64',
    "minilm": f'kind = "pretrained"\nfolder = "{MINILM}"',
}
RECIPE = """
[data]
train = "records.csv"
test_fraction = 0.25

[encode]
max_tokens = 32
vocabulary_size = 200
features = 512

[model]
{model}

[train]
numerics = "portable"
device = "cpu"
epochs = 9
max_steps = 3
samples_per_step = 16
microbatches = 4
learning_rate = 1e-3
"""


def train(folder: Path, model: str) -> tuple[dict[str, object], dict[str, object]]:
    """Train in a process of its own, by the command line; returns summary and fingerprint."""
    (folder / "records.csv").write_text("text,label\n" + "\n".join(make_records(60)) + "\n")
    (folder / "recipe.toml").write_text(RECIPE.format(model=MODELS[model]))
    command = [sys.executable, "-m", "unisono", "train", "recipe.toml", "--workers", "1", "--run-folder", "run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary, found = (json.loads((folder / "run" / name).read_text()) for name in ("summary.json", "fingerprint.json"))
    return summary, found


@pytest.mark.parametrize("model", ["bag", "transformer", pytest.param("minilm", marks=pytest.mark.slow)])
def test_portable_numerics_give_the_known_weights(tmp_path: Path, model: str) -> None:
    try:
        check_processor()
    except NumericsError as error:
        pytest.skip(str(error))
    if model == "minilm" and not MINILM.is_dir():
        pytest.skip("`make data` fetches MiniLM")
    summary, found = train(tmp_path, model)
    limited = {"numerics": "portable", "instructions": "AVX2", "bf16_products": "rounded, in float32"}
    assert limited.items() <= found.items()
    answer = {name: summary[name] for name in ("weights_sha256", "optimizer_sha256")}
    libraries = {"torch": str(found["torch"]).partition("+")[0], "libraries": found["libraries"]}
    known = json.loads(ANSWERS.read_text())
    if os.environ.get("UNISONO_WRITE_ANSWERS"):
        known |= {"under": libraries, model: answer}
        ANSWERS.write_text(json.dumps(known, indent=1) + "\n")
    if known["under"] != libraries:
        pytest.skip(f"the answers are known under {known['under']}; these are {libraries}")
    assert answer == known[model]
