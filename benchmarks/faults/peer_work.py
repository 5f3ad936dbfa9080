"""What the peers of the fault benchmark train, and the journal in which each of their processes notes finished steps.

Owns the sizes of a step, their way over a command line, and the journal's form. The model and its loss are the very
same task object that unisono trains; the samples are random tokens of one length, so that no padding rule gains.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from unisono.data.samples import EncodedSamples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for workloads.py, whichever script runs
from workloads import CLASSES, Workload, minilm

MICROBATCHES = 8
SAMPLES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one run is told: where it writes, and how large its steps are."""

    folder: Path
    """for checkpoints"""
    journal: Path
    steps: int
    samples_per_step: int
    """of all workers together"""
    tokens: int
    """of each sample"""
    checkpoint_every: int
    """in steps"""

    @classmethod
    def parse(cls) -> Self:
        """Read the command line that `arguments` wrote."""
        parser = argparse.ArgumentParser()
        for field in dataclasses.fields(cls):
            kind = Path if field.name in ("folder", "journal") else int
            parser.add_argument(_option(field.name), dest=field.name, type=kind, required=True)
        return cls(**vars(parser.parse_args()))

    def arguments(self) -> list[str]:
        """Return the command line for a training script."""
        names = [field.name for field in dataclasses.fields(self)]
        return [part for name in names for part in (_option(name), str(getattr(self, name)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A finished optimiser step, as one process saw it."""

    rank: int
    number: int
    """from 1; finishing the first step ever is number 1"""
    time: float
    """`time.time()` just after the optimiser's step"""
    pid: int
    team: str
    """changes when, and only when, the set of processes that train together does"""
    workers: int
    """how many contributed gradients"""


class Journal:
    """An append-only file that all processes share; a line is one write, so that a SIGKILL leaves no half of one."""

    def __init__(self, path: Path, rank: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._rank = rank

    def add(self, number: int, *, team: str, workers: int) -> None:
        """Note that step `number` is finished now."""
        line = f"{self._rank} {number} {time.time():.6f} {os.getpid()} {team} {workers}\n"
        os.write(self._file, line.encode())


def read_journal(path: Path) -> list[Step]:
    """Return all steps so far, in the order in which they were noted."""
    return list(_read(path.read_text(encoding="utf-8"))) if path.exists() else []


def workload(samples_per_step: int, tokens: int) -> Workload:
    """MiniLM in float32 with steps of this size: the recipe, task and samples for unisono and for its peers."""
    whole = minilm("float32", MICROBATCHES)
    train = whole.recipe.train.model_copy(update={"samples_per_step": samples_per_step})
    random = np.random.default_rng(0)
    samples = EncodedSamples(
        ids=random.integers(1, whole.task.vocabulary_size, SAMPLES * tokens, dtype=np.int32),
        starts=np.arange(SAMPLES, dtype=np.int64) * tokens,
        lengths=np.full(SAMPLES, tokens, np.int32),
        labels=random.integers(0, CLASSES, SAMPLES),
        padded=True,
        padding=0,
        sha256="",
    )
    name = f"MiniLM, {samples_per_step} samples of {tokens} tokens a step"
    return dataclasses.replace(
        whole, name=name, recipe=whole.recipe.model_copy(update={"train": train}), samples=samples
    )


def settle() -> None:
    """One thread and no denormals: what unisono's workers have."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def build(workload: Workload) -> nn.Module:
    """Make the module, the same in every process."""
    torch.manual_seed(workload.recipe.train.seed)
    module = workload.task.build()
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.sparse = False  # torch's AdamW takes no sparse gradients, and there is no fused one that does
    return module


def make_optimizer(workload: Workload, module: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW; biases and norms are spared weight decay, as unisono does."""
    recipe, parameters = workload.recipe.train, list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), fused=True)


def load(workload: Workload, done: int, rank: int, workers: int) -> dict[str, Tensor]:
    """Return this worker's share of the samples of the step after `done` steps."""
    size, number = workload.recipe.train.samples_per_step, len(workload.samples)
    first = done * size % (number - size + 1)
    return workload.samples.take(_order(workload.recipe.train.seed, number)[first : first + size][rank::workers])


def _order(seed: int, number: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(number)  # microseconds, so nothing is kept


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read(content: str) -> Iterator[Step]:
    for line in content[: content.rfind("\n") + 1].splitlines():  # the last line may not have arrived in full
        rank, number, when, pid, team, workers = line.split()
        yield Step(rank=int(rank), number=int(number), time=float(when), pid=int(pid), team=team, workers=int(workers))
