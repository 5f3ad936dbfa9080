"""A task that a module defines, so that a fresh interpreter can import it: dropout, and normalisation with running
statistics.

Owns the task and its data; and what makes a task that cannot be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisono.tasks.task import Task

SETTINGS: dict[str, Any] = {"samples_per_step": 12, "microbatches": 6, "epochs": 2, "learning_rate": 0.05}
STEPS = 8


def make_columns(samples: int = 48) -> dict[str, np.ndarray]:
    """x [samples, 6], y [samples] in 0 … 2."""
    generator = np.random.default_rng(5)
    x = generator.standard_normal((samples, 6)).astype(np.float32)
    return {"x": x, "y": (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0.5)}


class Dropped(Task):
    """A small network with BatchNorm and dropout. `on_loss` is called with each loss."""

    def __init__(self, on_loss: Callable[[], object] | None = None) -> None:
        self.on_loss = on_loss

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        if self.on_loss is not None:
            self.on_loss()
        return F.cross_entropy(module(microbatch["x"]), microbatch["y"], reduction="sum"), len(microbatch["y"])

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(module(microbatch["x"]), microbatch["y"], reduction="none")}


class Kept(Dropped):
    """Builds one module, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.module = Dropped.build(self)

    def build(self) -> nn.Module:
        return self.module
