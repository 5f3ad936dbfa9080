"""Small tasks, each with something that is easily got wrong, and data for them.

Owns no assertion.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from unisono.backends.torch_backend import TorchBackend
from unisono.engine.replica import Replica
from unisono.tasks.task import Microbatch, Task

WORDS = 60
CLASSES = 5


class Bare(Task):
    """A module that is there already, and nothing to learn."""

    def __init__(self, module: nn.Module, pretrained: tuple[str, ...] = ()) -> None:
        self._module = module
        self.pretrained = pretrained

    def build(self) -> nn.Module:
        return self._module

    def loss(self, module: nn.Module, microbatch: Microbatch) -> tuple[Tensor, int]:
        raise NotImplementedError

    def measure(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        raise NotImplementedError


def replicate(task: Task, rank: int = 0, workers: int = 1) -> Replica:
    """A worker's replica of a task's module."""
    return Replica(TorchBackend(task, task.build()), rank=rank, workers=workers)


class Classified(Task):
    """Tells the class `y` of `x` with whatever module `make` builds."""

    def __init__(self, make: Callable[[], nn.Module], class_weights: tuple[float, ...] = ()) -> None:
        self._make = make
        self._class_weights = torch.tensor(class_weights) if class_weights else None

    def build(self) -> nn.Module:
        return self._make()

    def loss(self, module: nn.Module, microbatch: Microbatch) -> tuple[Tensor, int]:
        label = microbatch["y"]
        return F.cross_entropy(module(microbatch["x"]), label, weight=self._class_weights, reduction="sum"), len(label)

    def measure(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        label = microbatch["y"]
        logits = module(microbatch["x"]).float()
        losses = F.cross_entropy(logits, label, reduction="none")
        return {"loss": losses, "predicted": logits.argmax(1), "label": label, "p": logits.softmax(1)[:, 0]}


def words(samples: int = 45, seed: int = 3) -> dict[str, np.ndarray]:
    """Sentences of 9 words, of which some tell the class; half of the words are seen in the first samples only."""
    random = np.random.default_rng(seed)
    x = random.integers(0, WORDS // 2, (samples, 9))
    x[:4] += WORDS // 2
    return {"x": x, "y": (x.sum(1) % CLASSES).astype(np.int64)}


def images(samples: int = 45, seed: int = 4) -> dict[str, np.ndarray]:
    """Pictures of 8 × 8 whose brightness tells the class."""
    random = np.random.default_rng(seed)
    y = random.integers(0, CLASSES, samples)
    x = random.standard_normal((samples, 1, 8, 8)).astype(np.float32) + y[:, None, None, None].astype(np.float32)
    return {"x": x, "y": y}


def convolution() -> nn.Module:
    """Convolutions with batch normalisation: float buffers and an integer one that each microbatch changes."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4 * 4, CLASSES),
    )  # fmt: skip


class Attention(nn.Module):
    """A causal transformer with dropout; its mask is a float buffer full of −inf."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, CLASSES)
        self.register_buffer("mask", torch.full((9, 9), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x), src_mask=self.mask).mean(1))


class Recurrent(nn.Module):
    """An LSTM or a GRU."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.cells = kind(8, 11, batch_first=True, bidirectional=True)
        self.head = nn.Linear(22, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.embedding(x))[0].mean(1))


def bag(sparse: bool = False) -> nn.Module:
    """An embedding bag, whose gradient touches few rows."""
    return nn.Sequential(nn.EmbeddingBag(WORDS, 12, mode="mean", sparse=sparse), nn.GELU(), nn.Linear(12, CLASSES))


class Odd(nn.Module):
    """Tied, frozen, unused and randomly dropped layers, one of them under spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.spectral = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.out = nn.Linear(8, WORDS, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(self.embedding(x).mean(1))
        for block in self.blocks:
            if not self.training or torch.rand(()) < 0.3:
                hidden = hidden + torch.tanh(block(hidden))
        return self.out(self.spectral(hidden))


class Recomputed(nn.Module):
    """Layers with dropout whose activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3)) for _ in range(2)])
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x).mean(1)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if self.training else block(hidden)
        return self.head(hidden)


class Counting(nn.Module):
    """Counts its calls in buffers, also those of evaluation, and lets the count into the result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(9))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = 0.9 * self.seen + 0.1 * x.detach().float().mean(0)  # assigned anew, as many models do
        return self.linear(x.float() / WORDS + 0.01 * self.calls + 0.01 * self.seen)
