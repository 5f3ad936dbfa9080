"""The seam between engine and backends: a second one, in NumPy, goes through everything that torch goes through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds import Heard, train_alone

import numpy_backend
import unisono
from numpy_backend import NumpyBackend, NumpyClasses, Remembers, make_columns
from unisono.api.training import resolve
from unisono.backends import backend_registry
from unisono.backends.backend import Backend
from unisono.backends.torch_backend import TorchBackend
from unisono.engine.replica import Replica
from unisono.errors import ContractError, ImpureError, RecipeError
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.runtime.setup import Job
from unisono.storage.files import load_tensors
from unisono.tasks.own_inputs import open_own

Trainer = Callable[..., unisono.Trained]
SETTINGS: dict[str, Any] = {
    "epochs": 4,
    "samples_per_step": 18,
    "microbatches": 4,
    "learning_rate": 0.05,
    "ema_decay": 0.5,
    "evaluate": {"every_steps": 4, "keep_best": True, "samples_per_microbatch": 7},
    "checkpoint": {"every_steps": 6, "keep": 9},
}
SAME = ("weights_sha256", "optimizer_sha256", "test", "best_step", "train")


@pytest.fixture(scope="module")
def learn(warm: None) -> Trainer:
    def train(folder: Path, workers: int, task: unisono.Task | None = None, **options: Any) -> unisono.Trained:
        validation, test = make_columns(24, seed=6), make_columns(25, seed=7)
        given = {"workers": workers, "run": folder, "quiet": True, **SETTINGS, **options}
        return unisono.train(task or NumpyClasses(), make_columns(), validation=validation, test=test, **given)

    return train


@pytest.fixture(scope="module")
def alone(learn: Trainer, tmp_path_factory: pytest.TempPathFactory) -> unisono.Trained:
    return learn(tmp_path_factory.mktemp("numpy") / "1", 1)


def facts(run: unisono.Trained) -> dict[str, Any]:
    return {name: run.summary[name] for name in SAME}


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bits(
    workers: int, learn: Trainer, alone: unisono.Trained, tmp_path: Path
) -> None:
    run = learn(tmp_path / "run", workers)
    assert facts(run) == facts(alone)
    for path in sorted((alone.folder / "checkpoints").rglob("*")):
        if path.is_file():
            assert (run.folder / path.relative_to(alone.folder)).read_bytes() == path.read_bytes(), path


def test_it_learns(alone: unisono.Trained) -> None:
    """Equal bits prove nothing if there is nothing in them."""
    assert alone.summary["test"]["accuracy"] > 0.8
    saved = load_tensors(alone.folder / "model" / "model.safetensors")
    assert saved.keys() == {"scale", "hidden", "spare", "embeddings", "bias", "head/kernel", "tied/kernel", "mean"}
    assert torch.equal(saved["head/kernel"], saved["tied/kernel"])
    assert saved["scale"].tolist() == [0.5] * 6 and saved["mean"].min() > 0.5
    with pytest.raises(RecipeError, match=r"for the backend 'torch'.*is 'numpy'.*model\.safetensors"):
        alone.module()
    assert "numpy" in json.loads((alone.folder / "fingerprint.json").read_text())["backend"]


@pytest.mark.parametrize("workers", [1, 3])
def test_weights_that_are_updated_in_place_are_seen(workers: int, alone: unisono.Trained, tmp_path: Path) -> None:
    """Without a supervisor there is no snapshot: one worker's weights stay where they are, and change."""
    recipe = resolve(NumpyClasses(), None, (), SETTINGS)

    def act(exchange: Exchange) -> None:
        inputs = open_own(recipe, NumpyClasses(), make_columns(), make_columns(24, seed=6), make_columns(25, seed=7))
        train_alone(Job(recipe=recipe, folder=tmp_path), inputs, exchange, [Heard(tmp_path)])

    play(workers, act)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: summary[name] for name in SAME} == facts(alone)


@pytest.mark.parametrize("fault", ["kill(worker=1, step=7, phase=update)", "kill(worker=0, step=10, phase=contribute)"])
def test_a_lost_worker_costs_no_bit(fault: str, learn: Trainer, alone: unisono.Trained, tmp_path: Path) -> None:
    run = learn(tmp_path / "run", 2, faults=(fault,))
    assert facts(run) == facts(alone)
    assert '"event": "Recovered"' in (run.folder / "metrics.jsonl").read_text()


def test_a_resumed_run_gives_the_same_bits(learn: Trainer, alone: unisono.Trained, tmp_path: Path) -> None:
    shutil.copytree(alone.folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)
    run = learn(tmp_path / "run", 3, resume=True)
    assert facts(run) == facts(alone)
    assert {line["step"] for line in map(json.loads, (run.folder / "metrics.jsonl").open()) if "loss" in line} >= {7}


def test_it_is_verified_audited_and_profiled(learn: Trainer, alone: unisono.Trained, tmp_path: Path) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name in ("samples_per_step", "microbatches")}
    assert unisono.verify(
        NumpyClasses(), make_columns(), workers=(1, 2), steps=3, say=lambda line: None, evaluate={}, **settings
    )
    run = learn(tmp_path / "run", 2, audit_every=3, profile=True)
    assert facts(run) == facts(alone)
    assert "backend 'numpy' does not count them" in (run.folder / "profile.md").read_text()


def test_what_it_remembers_is_refused_by_name(learn: Trainer, tmp_path: Path) -> None:
    with pytest.raises(ImpureError, match=r"gradient of 'bias'.*attribute 'memory.calls' changes between calls"):
        learn(tmp_path / "run", 1, task=Remembers())


def test_a_backend_that_copies_sees_every_change() -> None:
    """New values in the same memory are adopted again, and so are those of a checkpoint."""
    replica = Replica(NumpyBackend(NumpyClasses(), key=1), rank=0, workers=1)
    backend = replica.backend
    assert isinstance(backend, NumpyBackend)
    replica.flat.fill_(2.0)
    replica.show(replica.flat)
    assert (backend._copies["hidden"] == 2).all() and (backend._copies["scale"] == 0.5).all()
    replica.load({name: torch.full_like(value, 3) for name, value in replica.all_tensors().items()})
    assert all((value == 3).all() for value in backend._copies.values())
    assert replica.integer_values().tolist() == [3] and replica.flat.max() == 3


def test_backends_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend_registry.find_backend("torch") is TorchBackend
    assert backend_registry.find_backend("numpy") is NumpyBackend
    with pytest.raises(ContractError, match=r"backend is 'numpi'; there are 'numpy', 'torch'.*'unisono.backends'"):
        backend_registry.find_backend("numpi")
    point = EntryPoint("theirs", f"{numpy_backend.__name__}:NumpyBackend", backend_registry.ENTRY_POINTS)
    asked: list[dict[str, str]] = []

    def entry_points(**query: str) -> list[EntryPoint]:
        asked.append(query)
        return [point]

    monkeypatch.setattr(backend_registry.metadata, "entry_points", entry_points)
    assert backend_registry.find_backend("theirs") is NumpyBackend
    assert asked == [{"group": "unisono.backends"}]
    assert backend_registry.list_backends() == ["numpy", "theirs", "torch"]


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_a_name_is_taken_once(name: str) -> None:
    other: type[Backend] = type("Other", (NumpyBackend,), {"name": name})
    with pytest.raises(ContractError, match=f"backend '{name}': another one has this name.*Change Other.name"):
        backend_registry.register_backend(other)
    assert np.array_equal(backend_registry.find_backend("numpy"), NumpyBackend)
