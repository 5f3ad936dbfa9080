"""What both sides of a measurement train: a model and its samples, by name.

Owns their sizes. The task and the samples are the very same objects for unisono and for its peer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.data.encoding.encode import choose_encoder
from unisono.data.samples import EncodedSamples, encode_samples
from unisono.tasks.text.classification import TextClassification

DATA = Path(__file__).resolve().parent.parent / "data"
CLASSES = 20
REAL_SAMPLES = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`steps` are timed, after `warm_up` that are not."""

    name: str
    recipe: Recipe
    task: TextClassification
    samples: EncodedSamples
    steps: int
    warm_up: int


def minilm(precision: str, microbatches: int) -> Workload:
    """MiniLM, 22.7 million weights; 32 samples of exactly 128 tokens a step."""
    model = {"kind": "pretrained", "folder": str(DATA / "minilm")}
    recipe = _recipe(model, precision=precision, microbatches=microbatches, samples_per_step=32)
    vocabulary = json.loads((DATA / "minilm" / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    name = f"MiniLM, 128 tokens, {precision}"
    return _made(name, recipe, _random_tokens(tokens=128, vocabulary=vocabulary), vocabulary, 128, steps=4, warm_up=1)


def minilm_real(precision: str, microbatches: int) -> Workload:
    """The same on news articles of up to 256 tokens, each side padding as it does."""
    model = {"kind": "pretrained", "folder": str(DATA / "minilm")}
    recipe = _recipe(model, precision=precision, microbatches=microbatches, samples_per_step=32)
    samples, vocabulary = _news(recipe)
    name = f"MiniLM, news up to 256 tokens, {precision}"
    return _made(name, recipe, samples, vocabulary, 256, steps=4, warm_up=1)


def minilm_news(precision: str, microbatches: int) -> Workload:
    """The same on news articles of up to 128 tokens, with dropout on attention weights as config.json has it."""
    model = {"kind": "pretrained", "folder": str(DATA / "minilm"), "attention_dropout": 0.1}
    recipe = _recipe(model, precision=precision, microbatches=microbatches, samples_per_step=32)
    recipe = recipe.model_copy(update={"encode": recipe.encode.model_copy(update={"max_tokens": 128})})
    samples, vocabulary = _news(recipe)
    name = f"MiniLM, news up to 128 tokens, {precision}"
    return _made(name, recipe, samples, vocabulary, 128, steps=8, warm_up=2)


def transformer(precision: str, microbatches: int) -> Workload:
    """A small transformer on short samples: a step is made of overheads."""
    model = {"kind": "transformer", "layers": 2, "width": 64, "heads": 4, "feedforward": 256}
    recipe = _recipe(model, precision=precision, microbatches=microbatches, samples_per_step=32)
    samples = _random_tokens(tokens=32, vocabulary=2000)
    return _made(f"small transformer, 32 tokens, {precision}", recipe, samples, 2000, 32, steps=200, warm_up=20)


def bag(precision: str, microbatches: int) -> Workload:
    """The bag of n-grams on news articles: most of its weights are untouched by a step."""
    recipe = _recipe({"kind": "bag"}, precision=precision, microbatches=microbatches, samples_per_step=256)
    samples, vocabulary = _news(recipe)
    return _made(f"bag, news, {precision}", recipe, samples, vocabulary, 256, steps=30, warm_up=5)


WORKLOADS: dict[str, Callable[[str, int], Workload]] = {
    "minilm": minilm,
    "minilm-real": minilm_real,
    "minilm-news": minilm_news,
    "transformer": transformer,
    "bag": bag,
}


def _recipe(model: dict[str, Any], **train: Any) -> Recipe:
    return recipes.check({"model": model, "train": {"schedule": "constant", "warmup": 0, "device": "cpu", **train}})


def _made(
    name: str, recipe: Recipe, samples: EncodedSamples, vocabulary: int, tokens: int, *, steps: int, warm_up: int
) -> Workload:
    task = TextClassification(
        model=recipe.model, classes=CLASSES, vocabulary_size=vocabulary, padding=0, max_tokens=tokens
    )
    return Workload(name=name, recipe=recipe, task=task, samples=samples, steps=steps, warm_up=warm_up)


def _random_tokens(*, tokens: int, vocabulary: int) -> EncodedSamples:
    """Samples of one length, so that no padding rule can gain anything."""
    random = np.random.default_rng(0)
    number = 1024
    return EncodedSamples(
        ids=random.integers(1, vocabulary, number * tokens, dtype=np.int32),
        starts=np.arange(number, dtype=np.int64) * tokens,
        lengths=np.full(number, tokens, np.int32),
        labels=random.integers(0, CLASSES, number),
        sha256="",
    )


def _news(recipe: Recipe) -> tuple[EncodedSamples, int]:
    """Some of the 20 Newsgroups' training articles, evenly chosen, and the encoder's vocabulary size."""
    content = (DATA / "newsgroups" / "20newsgroups-train.tab").read_text(encoding="utf-8")
    lines = [line for line in content.split("\n")[3:] if line]
    lines = lines[:: len(lines) // REAL_SAMPLES][:REAL_SAMPLES]
    labels, texts = zip(*(line.split("\t", 1) for line in lines), strict=True)
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    encoder = choose_encoder(recipe, [texts])
    return encode_samples(encoder, texts, [numbers[label] for label in labels]), encoder.vocabulary_size
