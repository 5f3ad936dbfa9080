"""Preparations that are killed, or find no room: they go on where they were, to the same bytes, and leave nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

RECORDS = 12_000
WORDS = ["tree", "step", "shard", "worker", "sum", "node", "exchange", "commit", "record", "sample", "recipe", "run"]
RECIPE = """
[data]
train = "records/*.jsonl"
test_fraction = 0.1
[encode]
vocabulary_size = 300
[model]
kind = "transformer"
"""
STAGES: dict[str, Callable[[Path], bool]] = {
    "reading": lambda store: bool(list(store.glob(".*.work/staged-*"))),
    "learning": lambda store: len(list(store.glob(".*.work/staged-*"))) >= 6,
    "encoder": lambda store: bool(list(store.glob(".*.work/encoder"))),
    "encoding": lambda store: bool(list(store.glob(".*.work/part-*"))),
    "storing": lambda store: bool(list(store.glob(".*.partial"))),
}


def make_input(folder: Path) -> None:
    chosen = random.Random(0)
    (folder / "records").mkdir()
    for number in range(6):
        with (folder / "records" / f"{number}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(RECORDS // 6):
                text = " ".join(chosen.choices(WORDS, k=12))
                file.write(json.dumps({"text": text, "label": chosen.choice("xy")}) + "\n")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "unisono", "prepare", str(folder / "recipe.toml"), *options]


def start(folder: Path, store: Path) -> subprocess.Popen[str]:
    options = ("-w", "2", "--set", f"data.store={store}")
    return subprocess.Popen(command(folder, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_all(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The input, and the store of a preparation to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    make_input(folder)
    options = ("-w", "3", "--set", f"data.store={folder / 'store'}")
    subprocess.run(command(folder, *options), check=True, capture_output=True)
    return folder, read_all(folder / "store")


@pytest.mark.parametrize("stage", STAGES)
def test_a_preparation_that_was_killed_goes_on(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, stage: str
) -> None:
    folder, expected = whole
    store = tmp_path / "store"
    process = start(folder, store)
    while process.poll() is None and not STAGES[stage](store):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    assert not [path for path in store.iterdir() if not path.name.startswith(".")], "nothing may look whole"
    again = start(folder, store)
    told, _ = again.communicate(timeout=60)
    assert again.returncode == 0, told
    assert "going on with" in told
    assert read_all(store) == expected


def test_workers_do_not_outlive_a_preparation(whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, _ = whole
    process = start(folder, tmp_path)
    children: set[int] = set()
    while process.poll() is None and not STAGES["reading"](tmp_path):
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children |= {int(pid) for pid in listed.split()}
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert len(children) >= 2
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in children if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive == []


def test_ctrl_c_keeps_what_is_done(whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, expected = whole
    process = start(folder, tmp_path / "store")
    while process.poll() is None and not STAGES["encoder"](tmp_path / "store"):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    again = start(folder, tmp_path / "store")
    told, _ = again.communicate(timeout=60)
    assert "going on with" in told
    assert read_all(tmp_path / "store") == expected


def test_settings_that_changed_meanwhile_begin_anew(whole: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    folder, _ = whole
    process = start(folder, tmp_path)
    while process.poll() is None and not STAGES["encoder"](tmp_path):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    options = ("--set", f"data.store={tmp_path}", "--set", "encode.vocabulary_size=200")
    told = subprocess.run(command(folder, *options), check=True, capture_output=True, text=True).stdout
    assert "going on with" not in told
    (work,) = tmp_path.glob(".*.work")
    assert (work / "encoder").exists(), "what another preparation could go on with stays"


def test_what_a_machine_left_when_it_was_cut_off_is_not_trusted(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """Files of a preparation at work are not forced to the disk: after the next start they may be anything."""
    folder, expected = whole
    store = tmp_path / "store"
    process = start(folder, store)
    while process.poll() is None and not STAGES["encoding"](store):
        time.sleep(0.001)
    process.kill()
    process.communicate()
    (mark,) = store.glob(".*.work/boot")
    mark.write_text("another start of the machine", encoding="utf-8")
    for path in [*store.glob(".*.work/staged-*"), *store.glob(".*.work/part-*")]:
        path.write_bytes(bytes(path.stat().st_size))
    again = start(folder, store)
    told, _ = again.communicate(timeout=60)
    assert again.returncode == 0, told
    assert "going on with" not in told
    assert read_all(store) == expected


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
