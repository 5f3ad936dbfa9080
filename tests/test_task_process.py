"""What the code of a task or of a dataset does to its process has no effect on the weights: settings of torch, forks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisono
from unisono.tracking import ledger

pytestmark = pytest.mark.usefixtures("warm", "no_curves")

WIDE = 256  # many enough numbers for two threads, and for a gradient near the smallest float
SETTINGS = {"epochs": 1, "samples_per_step": 8, "microbatches": 4, "quiet": True}


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "draw_curves", lambda lines, path: None)


def leave_alone() -> None:
    """Change nothing."""


class Own(unisono.Task):
    """Classifies; `disturb` is called in build, loss and measure where a test wants it."""

    def __init__(self, disturb: Callable[[], Any] = leave_alone, where: str = "loss") -> None:
        self.disturb, self.where = disturb, where

    def build(self) -> nn.Module:
        module = nn.Sequential(nn.Linear(16, WIDE), nn.Tanh(), nn.Linear(WIDE, 3))
        self._reach("build")
        return module

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        scores = module(microbatch["x"])
        loss = F.cross_entropy(scores, microbatch["y"], reduction="sum")
        self._reach("loss")
        return loss, len(scores)

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._reach("measure")
        return {"loss": F.cross_entropy(module(microbatch["x"]), microbatch["y"], reduction="none")}

    def _reach(self, where: str) -> None:
        if where == self.where:
            self.disturb()


def columns(samples: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "x": torch.randn(samples, 16, generator=generator) * 1e-18,
        "y": torch.arange(samples) % 3,
    }


class Items:
    """The same samples one by one; `disturb` is called with each."""

    def __init__(self, disturb: Callable[[], Any]) -> None:
        self.columns, self.disturb = columns(), disturb

    def __len__(self) -> int:
        return len(self.columns["y"])

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        item = {name: column[sample] for name, column in self.columns.items()}
        self.disturb()
        return item


def weights(folder: Path, task: unisono.Task, workers: int, data: Any = None, **settings: Any) -> str:
    """The SHA-256 of the trained weights."""
    data = columns() if data is None else data
    run = folder / f"run-{len(list(folder.glob('run-*')))}"
    return unisono.train(
        task, data, validation=columns(9), workers=workers, run=run, **SETTINGS, **settings
    ).weights_sha256


DISTURBANCES: dict[str, Callable[[], Any]] = {
    "threads": lambda: torch.set_num_threads(2),
    "denormals": lambda: torch.set_flush_denormal(False),
    "nondeterministic": lambda: torch.use_deterministic_algorithms(False),
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "no gradients": lambda: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param(name, where, marks=[pytest.mark.slow] if where == "measure" and name != "threads" else [])
        for name in DISTURBANCES
        for where in ("loss", "measure")
    ],
)
def test_settings_that_a_task_leaves_changed_do_not_reach_the_next_contribution(
    name: str, where: str, tmp_path: Path
) -> None:
    """Without settings being kept, the update after a disturbed loss computes with them: other bits on 2 workers."""
    seen: list[tuple[Any, ...]] = []

    def look(then: Callable[[], Any]) -> Callable[[], None]:
        def disturb() -> None:
            tiny = torch.full((1,), 1e-38, dtype=torch.float32) * 1e-3
            seen.append(
                (
                    torch.get_num_threads(),
                    bool(tiny == 0),
                    torch.are_deterministic_algorithms_enabled(),
                    torch.get_default_dtype(),
                    torch.is_autocast_enabled("cpu"),
                    torch.is_grad_enabled(),
                )
            )
            then()

        return disturb

    quiet = weights(tmp_path, Own(look(leave_alone), where), 1)
    as_settled = set(seen)
    seen.clear()
    found = weights(tmp_path, Own(look(DISTURBANCES[name]), where), 1)
    assert set(seen) == as_settled and len(as_settled) == 1
    if where == "measure":
        assert found == quiet


@pytest.mark.parametrize(
    "name",
    ["threads", "autocast", *(pytest.param(one, marks=pytest.mark.slow) for one in ("denormals", "no gradients"))],
)
def test_the_weights_do_not_depend_on_the_workers_whatever_a_loss_sets(name: str, tmp_path: Path) -> None:
    task = Own(DISTURBANCES[name])
    assert weights(tmp_path, task, 1) == weights(tmp_path, task, 3)


@pytest.mark.parametrize("name", ["autocast", "no gradients"])
def test_modes_that_build_leaves_changed_do_not_reach_training(name: str, tmp_path: Path) -> None:
    assert weights(tmp_path, Own(DISTURBANCES[name], "build"), 1) == weights(tmp_path, Own(), 1)


def test_a_build_that_sets_threads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(unisono.ContractError, match=r"set torch to 2 threads; allowed is train.threads, which is 1"):
        weights(tmp_path, Own(DISTURBANCES["threads"], "build"), 1)


@pytest.mark.parametrize("name", ["threads", "dtype"])
def test_settings_that_a_dataset_changes_do_not_reach_training(name: str, tmp_path: Path) -> None:
    quiet = weights(tmp_path, Own(), 1, Items(leave_alone))
    assert weights(tmp_path, Own(), 1, Items(DISTURBANCES[name])) == quiet


class ForkOnce:
    """Forks once in a run, and returns in both processes. `mark` says that it has happened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __call__(self) -> None:
        if not self.mark.exists():
            self.mark.touch()
            if child := os.fork():
                self.mark.write_text(str(child), encoding="ascii")


@pytest.mark.parametrize(
    ("where", "workers"),
    [
        pytest.param(where, workers, marks=[pytest.mark.slow] if workers == 2 and where != "loss" else [])
        for where in ("build", "loss", "measure", "data")
        for workers in (1, 2)
    ],
)
def test_a_fork_that_returns_in_the_child_ends_there(
    where: str, workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fork = ForkOnce(tmp_path / "mark")
    quiet = weights(tmp_path, Own(), 1, Items(leave_alone) if where == "data" else None)
    caller = os.getpid()
    data = Items(fork) if where == "data" else None
    found = weights(tmp_path, Own() if where == "data" else Own(fork, where), workers, data)
    if os.getpid() != caller:
        os._exit(99)  # the child must not reach this line; the parent would see another exit code
    assert found == quiet
    assert "returned from that code" in capfd.readouterr().err
    if workers == 1:
        child = int(fork.mark.read_text(encoding="ascii"))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == os.EX_SOFTWARE


def test_a_child_of_its_own_process_is_the_task_s_own_matter(tmp_path: Path) -> None:
    """A child that ends where it should is no fault."""

    def compute() -> None:
        process = multiprocessing.get_context("fork").Process(target=leave_alone)
        process.start()
        process.join()

    assert weights(tmp_path, Own(compute), 1) == weights(tmp_path, Own(), 1)
