"""Recipes, models and checkpoints that nobody wrote so: one line, exit code 2, and no endless reading."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import unisono
from toy import make_toy
from unisono.config import recipe as recipes
from unisono.config.small_files import read_small
from unisono.errors import DamagedError, DataError, ModelError, RecipeError, UserError
from unisono.storage import checkpoints
from unisono.storage.files import facts_sha256

pytestmark = pytest.mark.usefixtures("warm")


def put_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def put_endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


ODD = pytest.mark.parametrize("put", [put_pipe, put_endless])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", "inf"),
        ("train.epochs", "1e300"),
        ("train.learning_rate", "nan"),
        ("recovery.grace_seconds", "inf"),
        ("train.max_steps", "1" + "0" * 30),
        ("model.width", "1000000000"),
        ("data.train", r'"a\u0000b"'),
        ("data.store", r'"a\u0000b"'),
    ],
)
def test_values_that_no_run_can_have_are_refused(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"^'{key}' = .*(allowed is |should match|no path)"):
        recipes.load(make_toy(tmp_path), (f"{key}={value}",))


def test_as_many_layers_as_no_machine_holds(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.layers"):
        recipes.load(make_toy(tmp_path), ('model={kind="transformer", layers=1000000000}',))


@pytest.mark.parametrize("content", [b"a = " + b"[" * 100_000, b"\xff\xfe", b"a ="])
def test_a_recipe_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"not readable as TOML|UTF-16"):
        recipes.load(tmp_path / "a.toml")


@ODD
def test_a_recipe_that_is_no_file(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "a.toml")
    with pytest.raises(RecipeError, match="no regular file"):
        recipes.load(tmp_path / "a.toml")


def test_a_small_file_is_small(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1234")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_small(tmp_path / "link", 4) == "1234"
    with pytest.raises(OSError, match="larger than 3 bytes"):
        read_small(tmp_path / "a", 3)


@pytest.fixture
def model(trained: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of a model folder."""
    shutil.copytree(trained[1] / "model", tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"recipe": {}, "labels": [1]}', '{"recipe": 5}'])
def test_facts_of_a_model_that_are_damaged(model: Path, text: str) -> None:
    (model / "unisono.json").write_text(text)
    for use in (lambda: unisono.load(model.parent), lambda: unisono.predict(model.parent, {"text": ["a"]}, workers=1)):
        with pytest.raises(ModelError, match=r"unisono\.json' is damaged|'labels' = \[1\]; allowed are"):
            use()


@ODD
@pytest.mark.parametrize("name", ["unisono.json", "model.safetensors", "encoder.json"])
def test_a_file_of_a_model_that_is_no_file(model: Path, name: str, put: Callable[[Path], None]) -> None:
    put(model / name)
    with pytest.raises(UserError, match="no regular file"):
        unisono.load(model.parent)


@pytest.mark.parametrize("changes", [{"step": "1"}, {"step": -1}, {"recipe": []}, {"fingerprint": 5}], ids=str)
def test_facts_of_a_checkpoint_that_nobody_wrote(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Their own SHA-256 is right."""
    content = checkpoints.Content(parameters={}, buffers={}, optimizer={}, facts={"step": 3, "recipe": {}})
    path = checkpoints.write(content, tmp_path, keep=1)
    facts = json.loads((path / "state.json").read_text()) | changes
    del facts["sha256"]
    (path / "state.json").write_text(json.dumps({**facts, "sha256": facts_sha256(facts)}))
    with pytest.raises(DamagedError, match="is not what was written"):
        checkpoints.verify(path)


@ODD
def test_a_file_of_a_checkpoint_that_is_no_file(tmp_path: Path, put: Callable[[Path], None]) -> None:
    content = checkpoints.Content(parameters={}, buffers={}, optimizer={}, facts={"step": 3})
    path = checkpoints.write(content, tmp_path, keep=1)
    put(path / "state.json")
    with pytest.raises(DamagedError, match="no regular file"):
        checkpoints.verify(path)


# ---- outputs


def test_an_output_is_a_file_of_its_own(trained: dict[int, Path], tmp_path: Path) -> None:
    """Whatever others have put beside it, under any name that was used before, and under its own."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".out.csv.part", "out.csv"):
        (tmp_path / name).symlink_to(victim)
    assert unisono.predict(trained[1], {"text": ["goal match"]}, tmp_path / "out.csv", workers=1) == 1
    assert victim.read_text() == "mine" and not (tmp_path / "out.csv").is_symlink()
    assert (tmp_path / "out.csv").read_text().startswith("text,predicted")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.csv.part", "out.csv", "victim"]


def test_an_output_with_a_name_that_no_system_has(trained: dict[int, Path]) -> None:
    with pytest.raises(DataError, match="NUL"):
        unisono.predict(trained[1], {"text": ["goal match"]}, "a\0b.csv", workers=1)
