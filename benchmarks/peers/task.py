"""What a peer trains, as its script reads it: start weights, samples, sizes; and what it leaves behind.

Owns the model, the samples, the padding, the groups of the optimiser, the journal of finished steps and the result.
The loop, and everything that a framework offers, stands in the script of each peer. Imports torch, numpy and
transformers alone, so that it runs in every peer's environment.

Shapes: n samples, t tokens of the longest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import BertForSequenceClassification
from transformers.trainer_pt_utils import get_length_grouped_indices

Item = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What one run is told. Paths are absolute."""

    start: str
    """folder with config.json and model.safetensors, the classification head included"""
    tokens: str
    """file of NumPy arrays: ids int64 [all tokens], lengths int64 [samples], labels int64 [samples]"""
    journal: str
    result: str
    scratch: str
    workers: int
    steps: int
    samples_per_step: int
    """of all workers together"""
    precision: str
    """float32, or bf16: autocast"""
    attention_dropout: float
    learning_rate: float
    weight_decay: float
    seed: int
    variant: str
    """what distinguishes two peers of one script; "" is the usual one"""

    @classmethod
    def read(cls) -> Self:
        """Read the file that the command line names."""
        return cls(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write it for a script."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @property
    def samples_per_worker(self) -> int:
        """Of one step."""
        return self.samples_per_step // self.workers

    def autocast(self) -> AbstractContextManager[None]:
        """What the forward pass runs in."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16")


class Samples(Dataset[Item]):
    """All samples, in memory: {"input_ids": int64 [its tokens], "labels": int64 []}."""

    def __init__(self, path: str) -> None:
        with np.load(path) as stored:
            self._ids = torch.from_numpy(stored["ids"])
            self.lengths: list[int] = stored["lengths"].tolist()
            self._labels = torch.from_numpy(stored["labels"])
        self._starts = (np.cumsum(self.lengths) - self.lengths).tolist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sample: int) -> Item:
        start = self._starts[sample]
        return {"input_ids": self._ids[start : start + self.lengths[sample]], "labels": self._labels[sample]}


def pad(items: Sequence[Item]) -> Item:
    """Pad to the longest: input_ids and attention_mask int64 [n, t], labels int64 [n]."""
    rows = [item["input_ids"] for item in items]
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence(rows, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.stack([item["labels"] for item in items])}


class LikeLengths:
    """For each step this worker's part of a global batch of samples of like length: transformers' own grouping."""

    def __init__(self, task: Task, samples: Samples, rank: int) -> None:
        self._task, self._lengths, self._rank = task, samples.lengths, rank
        self._random = torch.Generator().manual_seed(task.seed)

    def __iter__(self) -> Iterator[list[int]]:
        size = self._task.samples_per_step
        order = get_length_grouped_indices(self._lengths, size, generator=self._random)
        for first in range(0, len(order) - size + 1, size):
            yield order[first : first + size][self._rank :: self._task.workers]

    def __len__(self) -> int:
        return len(self._lengths) // self._task.samples_per_step


def settle() -> None:
    """One thread, and no denormals: what unisono's workers have."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def build(task: Task) -> BertForSequenceClassification:
    """Read the model, the same in every process."""
    return BertForSequenceClassification.from_pretrained(
        task.start, attention_probs_dropout_prob=task.attention_dropout
    ).train()


def group(task: Task, module: nn.Module) -> list[dict[str, object]]:
    """Parameters for an optimiser: biases and norms are spared weight decay."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": task.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Journal:
    """An append-only file that all workers share: `RANK STEP TIME`, a line for each finished step."""

    def __init__(self, task: Task, rank: int) -> None:
        self._file = os.open(task.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._rank = rank

    def add(self, step: int) -> None:
        """Note that `step`, counted from 1, is finished now."""
        os.write(self._file, f"{self._rank} {step} {time.time():.6f}\n".encode())


def finish(task: Task, module: nn.Module, loss: float) -> None:
    """Write what is reported of a run: the loss that its framework reports, and the hash of the weights."""
    content = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        content.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    Path(task.result).write_text(json.dumps({"loss": loss, "weights_sha256": content.hexdigest()}), encoding="utf-8")
