"""Preparations that are killed, or find no room: they go on where they were, to the same bytes, and leave nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toy import Launched, launch_command, wait_until_gone
from unisono.data import prepare as stages

pytestmark = pytest.mark.usefixtures("warm")

RECORDS = 1_200
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


@pytest.fixture
def held_at(held: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`held_at(stage)`: preparations come to this stage and not further, until the file "hold" is removed."""

    def after(owner: Any, name: str) -> None:
        honest = getattr(owner, name)

        def act(*given: Any, **more: Any) -> Any:
            found = honest(*given, **more)
            wait()
            return found

        monkeypatch.setattr(owner, name, act)

    def before(owner: Any, name: str) -> None:
        honest = getattr(owner, name)

        def act(*given: Any, **more: Any) -> Any:
            wait()
            return honest(*given, **more)

        monkeypatch.setattr(owner, name, act)

    def wait() -> None:
        while held.exists():
            time.sleep(0.005)

    def hold(stage: str) -> None:
        match stage:
            case "reading":
                after(stages, "stage")
            case "learning":
                before(stages._Stages, "_learn")
            case "encoder":
                before(stages._Stages, "_encode")
            case "encoding":
                after(stages, "write_part")
            case "storing":
                before(stages.store, "one_by_one")

    return hold


def start(folder: Path, store: Path, *options: str, workers: int = 2) -> Launched:
    """Prepare; what it prints goes to files in the folder that has the store."""
    arguments = ("prepare", folder / "recipe.toml", "-w", workers, "--set", f"data.store={store}", *options)
    return launch_command(arguments, store.parent)


def end(launched: Launched) -> str:
    """Wait for its end; return what it has printed."""
    assert launched.end() == 0, launched.out + launched.err
    return launched.out


def read_all(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(warm: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The input, and the store of a preparation to which nothing happened."""
    folder = tmp_path_factory.mktemp("whole")
    make_input(folder)
    end(start(folder, folder / "store", workers=3))
    return folder, read_all(folder / "store")


Held = Callable[[str], None]


@pytest.mark.parametrize("stage", STAGES)
def test_a_preparation_that_was_killed_goes_on(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, held: Path, held_at: Held, stage: str
) -> None:
    folder, expected = whole
    store = tmp_path / "store"
    held_at(stage)
    launched = start(folder, store)
    launched.wait_until(lambda: STAGES[stage](store))
    kill(launched)
    held.unlink()
    assert not [path for path in store.iterdir() if not path.name.startswith(".")], "nothing may look whole"
    told = end(start(folder, store))
    assert "going on with" in told
    assert read_all(store) == expected


def kill(launched: Launched) -> None:
    """As the kernel does it; what it has started ends with it."""
    children = launched.workers()
    os.kill(launched.pid, signal.SIGKILL)
    assert launched.end() == -signal.SIGKILL
    assert wait_until_gone(children) == []


def test_workers_do_not_outlive_a_preparation(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, held_at: Held
) -> None:
    held_at("reading")
    launched = start(whole[0], tmp_path / "store")
    launched.wait_until(lambda: STAGES["reading"](tmp_path / "store"))
    assert len(launched.workers()) >= 2
    kill(launched)


def test_ctrl_c_keeps_what_is_done(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, held: Path, held_at: Held
) -> None:
    folder, expected = whole
    held_at("encoder")
    launched = start(folder, tmp_path / "store")
    launched.wait_until(lambda: STAGES["encoder"](tmp_path / "store"))
    os.kill(launched.pid, signal.SIGINT)
    assert launched.end() == 130, launched.err
    assert "Traceback" not in launched.out + launched.err
    held.unlink()
    assert "going on with" in end(start(folder, tmp_path / "store"))
    assert read_all(tmp_path / "store") == expected


def test_settings_that_changed_meanwhile_begin_anew(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, held: Path, held_at: Held
) -> None:
    folder, _ = whole
    held_at("encoder")
    launched = start(folder, tmp_path / "store")
    launched.wait_until(lambda: STAGES["encoder"](tmp_path / "store"))
    kill(launched)
    held.unlink()
    told = end(start(folder, tmp_path / "store", "--set", "encode.vocabulary_size=200"))
    assert "going on with" not in told
    (work,) = (tmp_path / "store").glob(".*.work")
    assert (work / "encoder").exists(), "what another preparation could go on with stays"


def test_what_a_machine_left_when_it_was_cut_off_is_not_trusted(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, held: Path, held_at: Held
) -> None:
    """Files of a preparation at work are not forced to the disk: after the next start they may be anything."""
    folder, expected = whole
    store = tmp_path / "store"
    held_at("encoding")
    launched = start(folder, store)
    launched.wait_until(lambda: STAGES["encoding"](store))
    kill(launched)
    held.unlink()
    (mark,) = store.glob(".*.work/boot")
    mark.write_text("another start of the machine", encoding="utf-8")
    for path in [*store.glob(".*.work/staged-*"), *store.glob(".*.work/part-*")]:
        path.write_bytes(bytes(path.stat().st_size))
    told = end(start(folder, store))
    assert "going on with" not in told
    assert read_all(store) == expected
