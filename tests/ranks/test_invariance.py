"""The promise itself: weights, optimiser state, scores and checkpoints are the same bits for any number of workers.

Simulated workers go through the broad matrix, forked ones through a part of it; both run the whole of `run.execute`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from worlds import Forked, Heard, train_alone

import zoo
from bert import write_bert
from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.config.sections import Bag, Pretrained, Transformer
from unisono.data.samples import EncodedSamples
from unisono.determinism import keys
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.runtime.setup import Job
from unisono.storage.files import load_tensors
from unisono.tasks.own_inputs import open_own
from unisono.tasks.run_inputs import RunInputs
from unisono.tasks.task import Task
from unisono.tasks.text.classification import TextClassification

SHORT_LAST_STEP = {"samples_per_step": 20, "microbatches": 8, "epochs": 2.0}  # 45 samples: steps of 20, 20 and 5


@dataclass(frozen=True)
class Case:
    """A task with its data and settings."""

    task: Callable[[], Task]
    data: Callable[..., Any]
    train: dict[str, Any] = field(default_factory=dict)
    still: tuple[str, ...] = ()
    """Beginnings of the names of tensors that training leaves alone."""


def encoded(samples: int = 45, seed: int = 5) -> EncodedSamples:
    """Texts of very different lengths."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 24, samples).astype(np.int32)
    return EncodedSamples(
        ids=random.integers(1, zoo.WORDS, lengths.sum()).astype(np.int32),
        starts=np.cumsum(lengths, dtype=np.int64) - lengths,
        lengths=lengths,
        labels=random.integers(0, zoo.CLASSES, samples),
        sha256=f"{samples} {seed}",
    )


def preset(model: Bag | Transformer | Pretrained, **options: Any) -> Task:
    return TextClassification(
        model=model, classes=zoo.CLASSES, vocabulary_size=zoo.WORDS, padding=0, max_tokens=24, **options
    )


SMALL = Transformer(layers=2, width=16, heads=2, feedforward=24, dropout=0.1)


BERT: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    BERT["folder"] = write_bert(tmp_path_factory.mktemp("bert") / "folder")


def bert() -> Task:
    """A pretrained encoder, with dropout everywhere."""
    return preset(
        Pretrained(folder=str(BERT["folder"]), pooling="pooler", dropout=0.1, attention_dropout=0.2, freeze=False)
    )


def classified(make: Callable[[], nn.Module], data: Callable[..., Any] = zoo.words, **train: Any) -> Case:
    return Case(lambda: zoo.Classified(make), data, train)


CASES: dict[str, Case] = {
    "convolution": classified(zoo.convolution, zoo.images, optimizer="sgd", nesterov=True),
    "convolution, clipped, averaged": classified(zoo.convolution, zoo.images, clip_norm=0.5, ema_decay=0.9),
    "convolution, lion": classified(zoo.convolution, zoo.images, optimizer="lion", learning_rate=1e-3),
    "attention": Case(lambda: zoo.Classified(zoo.Attention), zoo.words, {"ema_decay": 0.5}, still=("mask",)),
    "lstm": classified(lambda: zoo.Recurrent(nn.LSTM), optimizer="adam"),
    "gru": classified(lambda: zoo.Recurrent(nn.GRU), clip_norm=1.0),
    "bag, unseen rows": classified(zoo.bag, epochs=6.0),
    "bag, sparse gradients": classified(lambda: zoo.bag(sparse=True), optimizer="sgd", momentum=0.9),
    "bag, lazy rows": classified(lambda: zoo.bag(sparse=True), lazy_rows=True, weight_decay=0.1),
    "bag, lazy rows, clipped": classified(lambda: zoo.bag(sparse=True), lazy_rows=True, clip_norm=0.1),
    "bag, rows, averaged": classified(lambda: zoo.bag(sparse=True), ema_decay=0.9),
    "tied, frozen, unused, dropped": Case(lambda: zoo.Classified(zoo.Odd), zoo.words, {}, still=("frozen", "unused")),
    "recomputed": classified(zoo.Recomputed),
    "counting": classified(zoo.Counting),
    "bf16": Case(lambda: zoo.Classified(zoo.Attention), zoo.words, {"precision": "bf16"}, still=("mask",)),
    "float64": Case(
        lambda: zoo.Classified(lambda: zoo.bag().double()), zoo.words, {"optimizer": "adam", "ema_decay": 0.9}
    ),
    "class weights": Case(lambda: zoo.Classified(zoo.bag, (0.1, 0.5, 1.0, 2.0, 7.0)), zoo.words),
    "one sample a step": classified(zoo.bag, samples_per_step=1, epochs=0.2),
    "thirteen microbatches": classified(zoo.bag, microbatches=13, samples_per_step=31),
    "preset transformer": Case(
        lambda: preset(SMALL, gradient_checkpointing=True, label_smoothing=0.1), encoded, {"pretrained_rate": 0.5}
    ),
    "preset BERT, clipped": Case(bert, encoded, {"clip_norm": 0.5, "learning_rate": 1e-3}),
    "preset BERT, bf16": Case(bert, encoded, {"precision": "bf16", "learning_rate": 1e-3}),
    "preset bag": Case(
        lambda: preset(Bag(width=8, hidden=7, dropout=0.3), class_weights=(1.0, 2.0, 3.0, 4.0, 5.0)), encoded
    ),
}


def recipe_of(case: Case) -> Recipe:
    train = {"learning_rate": 0.02, **SHORT_LAST_STEP, **case.train}
    evaluate = {"every_steps": 2, "samples_per_microbatch": 4, "keep_best": True}
    return recipes.check({"train": train, "evaluate": evaluate, "checkpoint": {"every_steps": 2, "keep": 9}})


def material_of(case: Case, recipe: Recipe) -> RunInputs:
    return open_own(recipe, case.task(), case.data(), validation=case.data(11, seed=8), test=case.data(9, seed=9))


def perform(case: Case, exchange: Exchange, folder: Path) -> dict[str, Any]:
    """Train, evaluate, test and save; return everything that must not depend on the number of workers."""
    recipe = recipe_of(case)
    heard = Heard(folder)
    train_alone(Job(recipe=recipe, folder=folder), material_of(case, recipe), exchange, [heard])
    exchange.wait_for_all()
    summary = json.loads((folder / "summary.json").read_text())
    kept = {
        name: summary[name] for name in ("weights_sha256", "optimizer_sha256", "test", "best_step", "steps", "train")
    }
    checkpoints = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "checkpoints").rglob("*"))
        if path.is_file()
    }
    return kept | {"checkpoints": checkpoints} | ({"losses": heard.losses} if exchange.rank == 0 else {})


QUICK = (
    "convolution, clipped, averaged", "attention", "bag, sparse gradients", "bag, lazy rows, clipped",
    "tied, frozen, unused, dropped", "recomputed", "counting", "bf16", "class weights", "one sample a step",
    "thirteen microbatches", "preset transformer", "preset BERT, clipped",
)  # fmt: skip
"""One of each promise; the others are slow."""


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        *((name, (1, 2, 3)) for name in QUICK),
        *(pytest.param(name, (1, 2, 3, 5, 8), marks=pytest.mark.slow) for name in CASES),
    ],
)
def test_any_number_of_played_workers(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    case = CASES[name]
    found = {}
    for workers in counts:

        def act(exchange: Exchange, folder: Path = tmp_path / str(workers)) -> dict[str, Any]:
            return perform(case, exchange, folder)

        found[workers] = play(workers, act)[0]
    for workers in counts[1:]:
        assert found[workers] == found[1], f"{workers} workers"
    assert len(found[1]["losses"]) == found[1]["steps"] >= 3
    assert len(found[1]["checkpoints"]) >= 3
    _assert_trained(case, tmp_path / "1")


def _assert_trained(case: Case, folder: Path) -> None:
    """Equal weights prove nothing if training changes none."""
    keys.seed_all(keys.key(recipe_of(case).train.seed, "build"))
    before = {name: value.detach() for name, value in case.task().build().state_dict().items()}
    after = load_tensors(folder / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.isfinite(after[name]).all() or name in case.still, name
        if name.startswith(case.still):
            assert torch.equal(value, after[name]), f"{name} has changed"
        else:
            assert not torch.equal(value, after[name]), f"{name} has not changed"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("convolution, clipped, averaged", (1, 2, 3)),
        ("tied, frozen, unused, dropped", (2,)),
        ("preset transformer", (3,)),
        ("preset bag", (2,)),
        ("bag, lazy rows", (3,)),
        ("float64", (2,)),
        ("bf16", (3,)),
        pytest.param("convolution, clipped, averaged", (8,), marks=pytest.mark.slow),
        pytest.param("tied, frozen, unused, dropped", (5,), marks=pytest.mark.slow),
        pytest.param("bag, lazy rows", (2,), marks=pytest.mark.slow),
        pytest.param("lstm", (3,), marks=pytest.mark.slow),
    ],
)
def test_real_workers_as_played_ones(name: str, counts: tuple[int, ...], tmp_path: Path, forked: Forked) -> None:
    case = CASES[name]
    expected = json.loads(json.dumps(play(1, lambda exchange: perform(case, exchange, tmp_path / "played"))[0]))
    for workers in counts:
        found = forked(workers, lambda exchange, folder=tmp_path / f"{workers}": perform(case, exchange, folder))
        assert found[0] == expected, f"{workers} workers"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"microbatches": 7},
        pytest.param({"samples_per_step": 19}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "adam"}, marks=pytest.mark.slow),
    ],
)
def test_what_decides_bits_does(change: dict[str, Any], tmp_path: Path) -> None:
    """Else the comparisons above would pass whatever was trained."""
    case = CASES["recomputed"]
    other = Case(case.task, case.data, {**case.train, **change})
    one, two = (play(1, lambda e, c=c: perform(c, e, tmp_path / str(id(c))))[0] for c in (case, other))
    assert one["weights_sha256"] != two["weights_sha256"]
