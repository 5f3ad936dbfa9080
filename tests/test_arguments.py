"""Arguments of a wrong kind: each call says what was given, what is allowed, and what to do, before anything begins."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisono
from toy import Command, make_toy

pytestmark = pytest.mark.usefixtures("warm")


class Own(unisono.Task):
    """Classifies `x`."""

    columns = ("x", "y")
    targets = ("y",)

    def build(self) -> nn.Module:
        return nn.Linear(4, 2)

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(module(microbatch["x"]), microbatch["y"], reduction="sum"), len(microbatch["y"])

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(module(microbatch["x"]), microbatch["y"], reduction="none")}


DATA = {"x": torch.ones(8, 4), "y": torch.arange(8) % 2}
SMALL = {"epochs": 1, "samples_per_step": 4, "microbatches": 2, "quiet": True}


def refuse(call: Callable[[], Any], *signs: str) -> None:
    with pytest.raises(unisono.UserError) as refused:
        call()
    for sign in signs:
        assert sign in str(refused.value), str(refused.value)


def train(what: Any = None, data: Any = DATA, **more: Any) -> unisono.Trained:
    return unisono.train(Own() if what is None else what, data, **{**SMALL, "run": "run", **more})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("call", [train, lambda what: unisono.verify(what, DATA)], ids=["train", "verify"])
@pytest.mark.parametrize(
    ("what", "signs"),
    [
        (nn.Linear(4, 2), ("a torch module", "allowed are a Task", "Write a Task whose build() returns")),
        (Own, ("Own", "a class", "Make an instance: Own()")),
        ({"train": 1}, ("dict", "allowed are a Task, a Recipe, or the path of one")),
        ("nowhere.toml", ("'nowhere.toml': no such file", "Give the path of a TOML recipe")),
    ],
)
def test_what_is_trained(call: Callable[[Any], Any], what: Any, signs: tuple[str, ...]) -> None:
    refuse(lambda: call(what), *signs)


@pytest.mark.parametrize("workers", ["two", "", 0, -1, 1.5, None, [1], True])
def test_numbers_of_workers(workers: Any, tmp_path: Path) -> None:
    allowed = f'workers = {workers!r} (--workers): allowed is a whole number from 1, or "auto"'
    refuse(lambda: train(workers=workers), allowed)
    refuse(lambda: unisono.evaluate("nowhere", DATA, workers=workers), allowed)
    refuse(lambda: unisono.predict("nowhere", DATA, workers=workers), allowed)
    refuse(lambda: unisono.prepare(make_toy(tmp_path), workers=workers), allowed)
    refuse(lambda: unisono.verify(Own(), DATA, workers=[1, workers]), allowed)
    refuse(lambda: unisono.parallel.map(abs, [1], workers=workers), f"workers = {workers!r}: allowed are whole numbers")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "signs"),
    [
        ({"run": 5}, ("run is int", "allowed is a path")),
        ({"trace": 5}, ("trace is int", "allowed is a path")),
        ({"name": "a b"}, ("'name' = 'a b'",)),
        ({"overrides": "train.epochs=1"}, ("overrides (--set) is 'train.epochs=1'", "a list of texts")),
        ({"overrides": ["train.epochs=1"]}, ("for the path of a recipe, and a task was given", "epochs=3")),
        ({"faults": "kill(worker=1)"}, ("faults (--fault)", "a list of texts")),
        ({"resume": "yes"}, ("resume = 'yes'", 'True, False and "auto"')),
        ({"observers": print}, ("observers is", "a list of observers")),
        ({"launcher": "rocket"}, ("launcher 'rocket'", "allowed are auto, in_process")),
        ({"collate": 5}, ("collate is int", "a function")),
        ({"sampler": 5}, ("sampler is int", "unisono.weighted")),
        ({"evaluate": 5}, ("'evaluate' = 5",)),
        ({"epoch": 5}, ("'train.epoch': no such key", "'train.epochs'")),
        ({"validation": 5}, ("int is no data that can be read",)),
        ({"data": None}, ("a task needs data",)),
        ({"data": "data.csv"}, ("data is 'data.csv', a text", "pandas.read_csv", "--task")),
        ({"data": Path("data.csv")}, ("a text", "pandas.read_csv")),
        ({"data": torch.ones(8, 4)}, ("one Tensor of shape (8, 4)", "columns by name")),
        ({"data": np.ones(8)}, ("one ndarray of shape (8,)", "columns by name")),
        ({"data": (torch.ones(8, 4), torch.ones(8))}, ("a tuple of 2 arrays", '"target": data[1]')),
        ({"data": {}}, ("no columns",)),
    ],
)
def test_arguments_of_train(arguments: dict[str, Any], signs: tuple[str, ...], tmp_path: Path) -> None:
    refuse(lambda: train(**arguments), *signs)
    assert not (tmp_path / "run").exists()


def test_a_list_of_tensors_is_a_dataset_where_collate_takes_them() -> None:
    def collate(items: list[Tensor]) -> dict[str, Tensor]:
        return {"x": torch.stack(items), "y": torch.zeros(len(items), dtype=torch.int64)}

    assert train(data=[torch.ones(4)] * 8, collate=collate).summary["steps"] == 2


def test_a_recipe_object_takes_settings_and_no_overrides(tmp_path: Path) -> None:
    from unisono.config import recipe as recipes

    recipe = recipes.load(make_toy(tmp_path))
    for call in (unisono.train, unisono.prepare):
        refuse(lambda call=call: call(recipe, overrides=["train.epochs=1"]), "a Recipe was given")  # type: ignore[misc]
    refuse(lambda: unisono.prepare(Own()), "unisono.prepare(Own, …): allowed are a Recipe")  # type: ignore[arg-type]
    refuse(lambda: unisono.prepare(recipe, 5), "frames is int", "a mapping of splits")  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [2, "1,2", [], [2, 2]])
def test_numbers_to_compare(workers: Any) -> None:
    refuse(lambda: unisono.verify(Own(), DATA, workers=workers), "verify, workers = ")


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_file_of_a_run_has_the_mode_that_umask_says(mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = train(workers=1, checkpoint={"every_steps": 1}).folder
    finally:
        os.umask(before)
    written = [*(folder / "model").iterdir(), *folder.glob("checkpoints/*/*"), folder / "summary.json"]
    assert {path.suffix for path in written} >= {".safetensors", ".json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~mask}


@pytest.fixture(scope="module")
def trained(warm: None, tmp_path_factory: pytest.TempPathFactory) -> unisono.Trained:
    return train(run=tmp_path_factory.mktemp("trained") / "run")


def test_a_run_and_its_task(trained: unisono.Trained) -> None:
    run = trained.folder
    for call in (unisono.load, unisono.evaluate, lambda run, **more: unisono.predict(run, DATA, **more)):
        for given in (5, None):
            refuse(lambda call=call, given=given: call(given), "allowed is a path")  # type: ignore[misc]
        refuse(lambda call=call: call(trained), "run is Trained", "Give its .folder")  # type: ignore[misc]
        refuse(lambda call=call: call("nowhere"), "'nowhere' has no finished model")  # type: ignore[misc]
        for task, sign in ((Own(), "Give the class: task=Own"), (5, "is 5"), ("", "is ''"), (nn.Linear, "Linear")):
            refuse(lambda call=call, task=task: call(run, task=task), "task (--task) is", sign)  # type: ignore[misc]
    refuse(lambda: unisono.predict(run, DATA, 5, task=Own), "target is int", "allowed is a path")  # type: ignore[call-overload]
    assert unisono.load(run, task=Own) is not None


def test_an_empty_name_of_a_task_is_refused_on_the_command_line(
    command: Command, trained: unisono.Trained, tmp_path: Path
) -> None:
    """Else the name in the run folder would decide which code is imported."""
    recipe = make_toy(tmp_path)
    for arguments in (["train", recipe, "--task", ""], ["evaluate", trained.folder, recipe, "--task", ""]):
        code, _, err = command(*arguments)
        assert code == 2 and "--task" in err + "--task" and "''" in err
