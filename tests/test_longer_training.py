"""Training beyond a run's end, and from another run's weights: the bits, what is recorded, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import unisono
from learned import Dropped, make_columns
from toy import make_records, make_toy
from unisono import api
from unisono.config.sections import Bag, Transformer
from unisono.engine.warm_start import start_from
from unisono.errors import ModelError, NumericsError, RecipeError, RunFolderError
from unisono.tasks.text.classification import TextClassification

PLAIN: dict[str, Any] = {
    "samples_per_step": 12,
    "microbatches": 6,
    "learning_rate": 0.05,
    "schedule": "constant",
    "warmup": 2,
    "ema_decay": 0.9,
    "quiet": True,
}


def train(run: Path, **settings: Any) -> api.training.Trained:
    return unisono.train(Dropped(), make_columns(), run=run, **{"workers": 1, **PLAIN, **settings})


def hashes(run: api.training.Trained) -> tuple[str, str]:
    return run.weights_sha256, run.summary["optimizer_sha256"]


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run of one epoch, four steps, that has ended."""
    train(tmp_path / "run", epochs=1)
    return tmp_path / "run"


def test_a_run_made_longer_has_the_bits_of_one_planned_for_it(ended: Path, tmp_path: Path) -> None:
    first = json.loads((ended / "summary.json").read_text())
    longer = train(ended, epochs=3, resume=True, workers=3)
    assert hashes(longer) == hashes(train(tmp_path / "planned", epochs=3))
    assert longer.summary["steps"] == 12
    assert longer.summary["lineage"] == [{"ended_after": 4, "of": 4, "goes_on_to": 12}]
    assert json.loads((ended / "summary-step-00000004.json").read_text()) == first
    assert "epochs = 3.0" in (ended / "recipe.toml").read_text()


def test_a_longer_schedule_is_said(ended: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "linear", schedule="linear", epochs=1)
    capfd.readouterr()
    train(tmp_path / "linear", schedule="linear", epochs=2, resume=True)
    assert "the weights will not be those of a run that was planned" in " ".join(capfd.readouterr().err.split())
    train(ended, epochs=2, resume=True)
    assert "will not be those" not in capfd.readouterr().err


def test_a_run_that_an_observer_ended_goes_on(tmp_path: Path) -> None:
    class Stopper:
        def observe(self, event: object) -> str | None:
            return unisono.STOP if isinstance(event, unisono.tracking.events.StepDone) and event.step == 2 else None

        def close(self) -> None:
            pass

    stopped = train(tmp_path / "run", epochs=1, observers=[Stopper()])
    assert stopped.summary["stopped_by"] == "observer Stopper"
    assert train(tmp_path / "run", epochs=2, resume=True).summary["steps"] == 8


def test_a_run_that_has_not_ended_is_not_made_longer(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, epochs=1, checkpoint={"every_steps": 1})
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    with pytest.raises(RunFolderError, match="may be made longer once it has ended"):
        train(run, epochs=2, resume=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_steps": 2, "epochs": 1}, "no step follows"),
        ({"epochs": 2, "learning_rate": 0.1}, "new run, with train.start_from"),
    ],
    ids=["shorter", "another-rate"],
)
def test_other_changes_are_refused(ended: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RunFolderError, match=said):
        train(ended, resume=True, **changed)


class Level(Dropped):
    """No evaluation is better than the one before."""

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": torch.ones(len(microbatch["y"]))}


def test_patience_that_is_over_must_be_raised(tmp_path: Path) -> None:
    def go(patience: int, **more: Any) -> api.training.Trained:
        evaluate = {"every_steps": 1, "patience": patience}
        settings = {**PLAIN, "evaluate": evaluate, "validation": make_columns(), "run": tmp_path / "run", **more}
        return unisono.train(Level(), make_columns(), workers=1, **settings)

    assert go(1, epochs=2).summary["stopped_by"] == "evaluate.patience"
    with pytest.raises(RunFolderError, match=r"evaluate\.patience = 1 is over"):
        go(1, epochs=3, resume=True)
    assert go(0, epochs=3, resume=True).summary["steps"] == 12


def test_a_warm_start_begins_with_the_weights(ended: Path, tmp_path: Path) -> None:
    frozen = {"learning_rate": 1e-30, "weight_decay": 0.0, "epochs": 0.25, "ema_decay": 0.0}  # no weight changes
    new = train(tmp_path / "new", start_from=str(ended), seed=9, **frozen)
    assert new.summary["steps"] == 1
    before, after = (load_file(run / "model" / "model.safetensors") for run in (ended, tmp_path / "new"))
    for name in before:
        if "running" not in name and "tracked" not in name:
            assert torch.equal(before[name], after[name]), name
    facts = new.summary["lineage"][0]
    assert facts["weights_sha256"] == json.loads((ended / "summary.json").read_text())["weights_sha256"]
    assert facts["steps"] == 4


def test_the_first_weights_are_in_the_numerics(ended: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = train(tmp_path / "other", epochs=1, seed=5)
    train(tmp_path / "new", epochs=1, start_from=str(ended))
    moved = tmp_path / "moved"
    shutil.copytree(ended, moved)
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "new", epochs=1, start_from=Path("moved"), resume=True).summary["resumes"] == 1
    assert f'start_from = "{moved}"' in (tmp_path / "new" / "recipe.toml").read_text()
    with pytest.raises(NumericsError, match="start_from"):
        train(tmp_path / "new", epochs=1, start_from=str(other.folder), resume=True)


class Holder:
    """The tensors of a model, as a backend has them."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors


def write_model(run: Path, labels: list[str], **tensors: Tensor) -> str:
    (run / "model").mkdir(parents=True)
    save_file(tensors, run / "model" / "model.safetensors")
    (run / "model" / "unisono.json").write_text(json.dumps({"recipe": {}, "labels": labels}))
    return str(run)


def test_only_class_rows_follow_the_names_of_classes(tmp_path: Path) -> None:
    """A square weight has as many rows as there are classes, and is none of theirs."""
    task = Dropped()
    task.class_rows = ("head",)
    square, head = torch.arange(9.0).view(3, 3), torch.arange(6.0).view(3, 2)
    run = write_model(tmp_path, ["a", "b", "c"], square=square, head=head)
    new = Holder(square=torch.zeros(3, 3), head=torch.full((3, 2), -1.0), other=torch.zeros(1))
    started = start_from(run, new, task, ["c", "x", "a"])  # type: ignore[arg-type]
    assert torch.equal(new.tensors()["square"], square)
    assert new.tensors()["head"].tolist() == [[4.0, 5.0], [-1.0, -1.0], [0.0, 1.0]]
    assert "2 of 3 classes are in both" in started.notice
    assert "new: other" in started.notice


def test_a_start_without_any_weight_of_the_model_is_refused(tmp_path: Path) -> None:
    run = write_model(tmp_path, [], theirs=torch.zeros(2), shape=torch.zeros(3))
    with pytest.raises(ModelError, match=r"no weight in it has the name and shape.*shape, theirs.*mine, shape"):
        start_from(run, Holder(mine=torch.zeros(2), shape=torch.zeros(4)), Dropped(), [])  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [Bag(), Bag(hidden=6), Transformer(layers=1, width=8, heads=2)], ids=repr)
def test_class_rows_name_the_head(model: Bag | Transformer) -> None:
    task = TextClassification(model=model, classes=7, vocabulary_size=40, padding=0, max_tokens=8)
    found = task.build().state_dict()
    assert [len(found[name]) for name in task.class_rows] == [7, 7]
    assert {name for name, value in found.items() if len(value) == 7} == set(task.class_rows)


def test_texts_of_other_classes_from_a_run_of_texts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The vocabulary and the model come from the run; the number of workers decides nothing."""
    first = unisono.train(make_toy(tmp_path / "one"), run=tmp_path / "first", workers=1, quiet=True, epochs=1)
    records = [line.replace(",tech", ",new").replace("goal", "unheard") for line in make_records()]
    recipe = make_toy(tmp_path / "two", records, '[data]\ntrain = "toy.csv"\nstore = "{folder}/datasets"\n')
    settings: dict[str, Any] = {"start_from": str(first.folder), "quiet": True, "epochs": 1, "microbatches": 4}
    runs = [unisono.train(recipe, run=tmp_path / f"w{count}", workers=count, **settings) for count in (1, 2)]
    assert hashes(runs[0]) == hashes(runs[1])
    read = [(run.folder / "model" / "features.npy").read_bytes() for run in (first, *runs)]
    assert read[0] == read[1]
    assert "width = 8" in (runs[0].folder / "recipe.toml").read_text()
    capfd.readouterr()
    unisono.train(recipe, run=tmp_path / "loud", workers=1, **{**settings, "quiet": False})
    assert "2 of 3 classes are in both" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.kind=transformer", "'model.kind' = 'transformer': the run in 'train.start_from' has 'bag'"),
        ("encode.features=64", "'encode.features' = 64: the run in 'train.start_from' has 512"),
        ("train.start_from=nowhere", "has no finished model"),
    ],
)
def test_a_recipe_that_does_not_fit_the_run_is_refused(tmp_path: Path, override: str, said: str) -> None:
    recipe = make_toy(tmp_path / "one")
    run = unisono.train(recipe, run=tmp_path / "first", workers=1, quiet=True, max_steps=1)
    bare = make_toy(tmp_path / "two", recipe='[data]\ntrain = "toy.csv"\n')
    with pytest.raises((RecipeError, RunFolderError), match=said):
        unisono.train(bare, workers=1, overrides=[f"train.start_from={run.folder}", override])
