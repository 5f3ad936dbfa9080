"""What keeps state between calls is refused by name; what is random by key is not."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from unisono.engine.contribution import Contributor
from unisono.engine.purity import probe
from unisono.errors import ImpureError

pytestmark = pytest.mark.usefixtures("settled")


class Wrapped(nn.Module):
    """A linear layer, and something before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(9, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.before(x.float() / zoo.WORDS))

    def before(self, x: Tensor) -> Tensor:
        return x


class OwnGenerator(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.generator = random.Random(1)

    def before(self, x: Tensor) -> Tensor:
        return x * self.generator.random()


class OwnTorchGenerator(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def before(self, x: Tensor) -> Tensor:
        return x * torch.rand((), generator=self.generator)


class RemembersLongest(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.longest = 0

    def before(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, len(x))
        return x / self.longest


class RemembersTensor(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(9)  # an ordinary attribute, no registered buffer

    def before(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class RemembersInList(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []

    def before(self, x: Tensor) -> Tensor:
        self.history.append(len(x))
        return x * len(self.history)


class CountsIntoInteger(Wrapped):
    """Only an integer buffer shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def before(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count.fill_(self.calls)
        return x


class WritesOnWeights(Wrapped):
    """What it writes is the same at every call, so contributions alone do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(zoo.WORDS, 2, max_norm=0.1)

    def before(self, x: Tensor) -> Tensor:
        return x + self.table((x * zoo.WORDS).round().long().clamp(0, zoo.WORDS - 1)).sum(-1)


class GlobalGenerators(Wrapped):
    def before(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:
            x = x * float(np.random.random())
        return nn.functional.dropout(x, 0.3) + torch.rand(())


def check(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    task = zoo.Classified(make)
    contributor = Contributor(replica=zoo.replicate(task), seed=0)
    columns = {name: torch.from_numpy(column) for name, column in zoo.words(12).items()}
    probe(
        contributor, *({name: column[part] for name, column in columns.items()} for part in (slice(0, 4), slice(4, 11)))
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (OwnGenerator, "in module 'linear'"),
        (OwnTorchGenerator, "in module 'linear'"),
        (RemembersLongest, "attribute 'longest' changes between calls"),
        (RemembersTensor, "attribute 'mean' changes between calls"),
        (RemembersInList, "attribute 'history' changes between calls"),
        (CountsIntoInteger, "attribute 'calls' changes between calls"),
        (WritesOnWeights, "changes the weight 'table.weight'"),
        (lambda: nn.Sequential(RemembersLongest(), nn.Tanh()), "attribute '0.longest' changes between calls"),
    ],
    ids=["random.Random", "torch.Generator", "longest", "tensor", "list", "integer", "weights", "nested"],
)
def test_an_impure_model_is_refused_and_named(make: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(ImpureError) as refused:
        check(make)
    assert named in str(refused.value) and "--allow-impure" in str(refused.value)


@pytest.mark.parametrize(
    "make",
    [GlobalGenerators, zoo.Attention, zoo.Odd, zoo.Recomputed, zoo.Counting, lambda: zoo.Recurrent(nn.GRU), zoo.bag],
    ids=["global generators", "attention", "odd", "recomputed", "counting", "gru", "bag"],
)
def test_a_pure_model_passes(make: Callable[[], nn.Module]) -> None:
    check(make)
