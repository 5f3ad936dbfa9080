"""Models of a user's own: convolutions, a plain module, torch datasets; and models that break the promise."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import unisono
from toy import Command, make_toy, run_python
from unisono.tasks.text.classification import TextClassification

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples" / "own").glob("*.py"))

pytestmark = pytest.mark.usefixtures("warm")


class Classes(unisono.Task):
    """Classifies `input` by a module that subclasses build."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        scores = module(microbatch["input"])
        return F.cross_entropy(scores, microbatch["target"], reduction="sum"), len(scores)

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores, label = module(microbatch["input"]), microbatch["target"]
        return {"loss": F.cross_entropy(scores, label, reduction="none"), "predicted": scores.argmax(1), "label": label}


class Convolutions(Classes):
    def build(self) -> nn.Module:
        layers = [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(48, 3))


class Augmented(Dataset[tuple[Tensor, int]]):
    """Items that are shaken at random each time they are loaded."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["target"])

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        return self.columns["input"][sample] + 0.1 * torch.randn(6), int(self.columns["target"][sample])


def make_columns(count: int = 90) -> dict[str, Tensor]:
    target = torch.arange(count) % 3
    wave = torch.arange(float(count * 6)).view(count, 6).mul(1.7).sin()
    return {"input": wave + 2 * F.one_hot(target, 6), "target": target}


SETTINGS = {"epochs": 3, "samples_per_step": 16, "microbatches": 4, "learning_rate": 0.03, "quiet": True}


def train(folder: Path, task: unisono.Task, data: object, workers: int, **settings: object) -> unisono.Trained:
    run = folder / f"run-{workers}"
    return unisono.train(task, data, test=make_columns(31), workers=workers, run=run, **(SETTINGS | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "data"),
    [
        pytest.param(Classes(), make_columns(), id="dropout-columns"),
        pytest.param(Convolutions(), Augmented(make_columns()), id="batchnorm-augmented"),
        pytest.param(Classes(), Augmented(make_columns()), id="dropout-augmented", marks=pytest.mark.slow),
        pytest.param(Convolutions(), make_columns(), id="batchnorm-columns", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path, task: unisono.Task, data: object) -> None:
    runs = [train(tmp_path, task, data, workers) for workers in (1, 2, 3)]
    for name in ("weights_sha256", "optimizer_sha256", "test"):
        assert runs[0].summary[name] == runs[1].summary[name] == runs[2].summary[name], name
    assert runs[0].summary["test"]["accuracy"] > 0.8


@pytest.mark.slow
def test_augmentation_is_really_random(tmp_path: Path) -> None:
    """Or the test above would prove nothing: other epochs, and other seeds, shake a sample otherwise."""
    plain, shaken = (
        train(tmp_path / name, Classes(), data, 1)
        for name, data in (("a", make_columns()), ("b", Augmented(make_columns())))
    )
    other = train(tmp_path / "c", Classes(), Augmented(make_columns()), 1, seed=1)
    assert len({run.weights_sha256 for run in (plain, shaken, other)}) == 3


def test_trained_module_is_handed_back(tmp_path: Path) -> None:
    trained = train(tmp_path, Convolutions(), make_columns(), 2)
    module, test = trained.module(), make_columns(31)
    assert not module.training
    accuracy = (module(test["input"]).argmax(1) == test["target"]).float().mean().item()
    assert accuracy == pytest.approx(trained.summary["test"]["accuracy"])


def test_frame_gives_the_same_bits_as_its_columns(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    x = torch.arange(40.0)

    class Line(Classes):
        def build(self) -> nn.Module:
            return nn.Linear(1, 3)

        def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
            return super().loss(module, {**microbatch, "input": microbatch["input"][:, None]})

        def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return super().measure(module, {**microbatch, "input": microbatch["input"][:, None]})

    columns = {"input": x.sin(), "target": x.long() % 3}
    frame = polars.DataFrame({name: column.numpy() for name, column in columns.items()})
    runs = [
        unisono.train(Line(), data, workers=1, run=tmp_path / name, quiet=True, samples_per_step=16)
        for name, data in (("columns", columns), ("frame", frame))
    ]
    assert runs[0].weights_sha256 == runs[1].weights_sha256


class Remembers(nn.Linear):
    """Keeps the longest batch that it has seen, and scales by it."""

    longest = 0

    def forward(self, input: Tensor) -> Tensor:
        self.longest = max(self.longest, len(input))
        return super().forward(input) / self.longest


class Impure(Classes):
    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), Remembers(4, 3))


@pytest.mark.parametrize("workers", [1, 2])
def test_impure_model_is_refused(tmp_path: Path, workers: int) -> None:
    with pytest.raises(
        unisono.ContractError, match=r"not pure.*attribute '1\.longest' changes between calls.*--allow-impure"
    ) as found:
        train(tmp_path, Impure(), make_columns(), workers)
    assert found.value.exit_code == 2
    assert type(found.value).__name__ == "ImpureError"
    assert list(tmp_path.iterdir()) == []


def test_impure_model_trains_without_the_promise(tmp_path: Path) -> None:
    assert train(tmp_path, Impure(), make_columns(), 2, allow_impure=True).summary["pure"] is False
    assert train(tmp_path / "pure", Classes(), make_columns(), 1).summary["pure"] is True


def test_task_that_fails_is_named_with_its_traceback(tmp_path: Path) -> None:
    class Fails(Classes):
        def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
            raise KeyError("targets")

    with pytest.raises(
        unisono.WorkerError,
        match=r"worker [01] failed \(KeyError: 'targets'\).* before anything was done\..*\nTraceback",
    ) as found:
        train(tmp_path, Fails(), make_columns(), 2)
    assert str(found.value).count("Traceback") == 1
    assert str(found.value).count("KeyError: 'targets'") == 2  # the message, and the traceback
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"input": torch.ones(4, 6), "target": torch.ones(3)}, "columns of different lengths"),
        ({"input": torch.ones(0, 6)}, "no samples"),
        ({"input": ["a", "b"]}, "allowed are numbers"),
        (5, "int is no data that can be read"),
        (None, "a task needs data"),
    ],
)
def test_wrong_data_is_refused(tmp_path: Path, data: object, told: str) -> None:
    with pytest.raises(unisono.UserError, match=told):
        train(tmp_path, Classes(), data, 2)
    assert list(tmp_path.iterdir()) == []


def test_wrong_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(unisono.RecipeError, match=r"'train.epoch': no such key. Did you mean 'train.epochs'\?"):
        train(tmp_path, Classes(), make_columns(), 2, epoch=3)


def find_hash(out: str) -> str:
    (found,) = re.findall(r"weights   sha256 ([0-9a-f]{64})", out)
    return str(found)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_gives_the_same_bits_under_every_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], example: Path
) -> None:
    assert len(example.read_text().splitlines()) <= 50
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), "--workers", "3"])
    runpy.run_path(str(example), run_name="__main__")
    local = capfd.readouterr().out
    joined = run_python(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, example], tmp_path)
    assert joined.returncode == 0, joined.stderr
    assert find_hash(local) == find_hash(joined.stdout)
    assert float(re.findall(r"accuracy ([\d.]+)%", local)[-1]) > 90


def test_impure_model_ends_the_command_with_2(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = TextClassification.loss
    seen: list[int] = []

    def loss(self: TextClassification, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        seen.append(1)
        total, weight = honest(self, module, microbatch)  # type: ignore[arg-type]
        return total * len(seen), weight

    monkeypatch.setattr(TextClassification, "loss", loss)
    make_toy(tmp_path)
    code, _, err = command("train", "toy.toml", "-w", 2, "--run-folder", "run")
    assert (code, err.count("the model is not pure"), "Traceback" in err) == (2, 1, False)
    assert not (tmp_path / "run").exists()
