"""Tasks of a user's own, from a recipe: trained, resumed, scored, used on new data; and metrics of their own."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisono
from toy import Command
from unisono.tasks import kinds
from unisono.tasks.metrics import Perplexity, TorchMetric, WeightedMean, directions, summarise
from unisono.tracking.ledger import read_ledger

pytestmark = pytest.mark.usefixtures("warm")

GUIDE = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
MODULE, METRIC, *_ = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
RECIPE = re.findall(r"```toml\n(.*?)```", GUIDE, re.S)[0].replace("width = 16 ", "width = 6 ").replace("0.2", "0.3")
RECIPE += "samples_per_step = 16\nmicrobatches = 4\nlearning_rate = 0.05\n"


def write_flowers(path: Path, rows: int = 90, *, labels: bool = True) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", *(["kind"] if labels else [])])
        for number in range(rows):
            kind = number % 2
            writer.writerow([math.sin(number) + 2 * kind, math.cos(3 * number), *([kind] if labels else [])])
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "flowers.py").write_text(MODULE)
    (tmp_path / "flowers.toml").write_text(RECIPE)
    write_flowers(tmp_path / "flowers.csv")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.modules.pop("flowers", None)
    sys.path[:] = before


def test_a_recipe_trains_a_task_of_one_s_own_and_its_model_works(place: Path, command: Command) -> None:
    runs = []
    for workers in ("1", "3"):
        code, _, err = command("train", "flowers.toml", "-w", workers, "--run-folder", f"run-{workers}", "--quiet")
        assert code == 0, err
        runs.append(json.loads((place / f"run-{workers}" / "summary.json").read_text()))
    assert runs[0]["weights_sha256"] == runs[1]["weights_sha256"]
    recorded = (place / "run-1" / "recipe.toml").read_text()
    assert 'kind = "flowers:Flowers"' in recorded and "width = 6" in recorded and "[model]" not in recorded

    code, out, _ = command("evaluate", "run-1", "flowers.csv", "--task", "flowers:Flowers", "-w", "2", "--json")
    scores = json.loads(out)
    assert (code, scores["samples"]) == (0, 90) and scores["accuracy"] > 0.8

    write_flowers(place / "new.csv", 7, labels=False)
    code, _, err = command("predict", "run-1", "new.csv", "out.csv", "--task", "flowers.py:Flowers")
    assert code == 0, err
    with (place / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["a", "b", "predicted", "p 0", "p 1", "unusable"]
    assert [int(row["predicted"]) for row in rows] == [int(float(row["p 1"]) > 0.5) for row in rows]

    module = unisono.load(place / "run-1", task="flowers:Flowers").module
    assert module[0].out_features == 6, "built with the settings of the run"


def test_prediction_needs_no_target_and_spares_its_input(place: Path, command: Command) -> None:
    """A column of labels may be there, empty in part; and the file that is read is not the one that is written."""
    assert command("train", "flowers.toml", "-w", "1", "--run-folder", "run", "--quiet")[0] == 0
    (place / "some.csv").write_text("a,b,kind\n0.5,0.5,1\n2,0.1,\n,3,0\n")
    named = ("--task", "flowers:Flowers", "-w", "1")
    assert command("predict", "run", "some.csv", "out.csv", *named)[0] == 0
    with (place / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["predicted"]) for row in rows] == [True, True, False]
    assert rows[2]["unusable"] == "no value in 'a'"
    code, _, err = command("predict", "run", "some.csv", "some.csv", *named)
    assert code == 2 and "is the input as well" in err
    code, out, _ = command("evaluate", "run", *named, "--json")
    assert code == 0 and 0 < json.loads(out)["samples"] < 90, "the rows that test_fraction cuts off"


def test_settings_decide_whether_a_run_may_be_resumed(place: Path, command: Command) -> None:
    settings = ("--set", "checkpoint.every_steps=2", "--run-folder", "run", "--quiet", "-w", "1")
    assert command("train", "flowers.toml", "--set", "train.max_steps=4", *settings)[0] == 0
    again = ("train", "flowers.toml", "--set", "train.max_steps=4", *settings, "--resume")
    code, _, err = command(*again, "--set", "task.width=7")
    assert code == 2 and "task.width = 7 (was 6)" in err
    assert command(*again)[0] == 0


def test_verify_compares_a_task_of_one_s_own(place: Path, command: Command) -> None:
    code, out, _ = command("verify", "flowers.toml", "--workers", "1,2", "--steps", "2")
    assert code == 0 and "equal, bit for bit" in out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("task.widht=3", "'task.widht': no such key. Did you mean 'task.width'?"),
        ("task.width=wide", "'task.width': input should be a valid integer"),
        ("task.kind=flowers:Nothing", "'flowers' has no 'Nothing'"),
        ("task.kind=no_such_module:Flowers", "there is no module 'no_such_module'"),
        ("task.kind=text_clasification", "Did you mean 'text_classification'?"),
        ("task.kind=:Flowers", "allowed is module:Class"),
        ("task.kind=json:JSONDecoder", "allowed is a subclass of unisono.Task"),
        ("model.kind=bag", "'model' is for text recipes"),
        ("train.label_smoothing=0.1", "'train.label_smoothing' is for text recipes"),
        ("evaluate.keep_best=true", "there are no validation samples"),
        ("data.train=absent.csv", "absent.csv"),
        ("data.train=", "'data.train' is empty"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused(place: Path, command: Command, change: str, expected: str) -> None:
    code, _, err = command("train", "flowers.toml", "-w", "1", "--set", change)
    assert code == 2 and expected in err and "Traceback" not in err
    assert not list(place.glob("runs/flowers-*"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("task.widht=3", "'task.widht': no such key. Did you mean 'task.width'?"),
        ("task.width=wide", "'task.width': input should be a valid integer"),
        ("task.kind=flowers:Nothing", "'flowers' has no 'Nothing'"),
        ("task.kind=text_classification", "'task.width': no such key. Text classification has none"),
        ("screen.min_characters=3", "'screen' is for text recipes"),
    ],
)
def test_recipe_checks_the_keys_of_a_task(place: Path, command: Command, change: str, expected: str) -> None:
    code, out, err = command("recipe", "flowers.toml", "--set", change)
    assert code == 2 and expected in err and not out


def test_the_recipe_that_is_shown_for_a_task_can_be_trained(place: Path, command: Command) -> None:
    """It has no tables that the task would refuse; nor has the model folder."""
    code, out, _ = command("recipe", "flowers.toml")
    assert code == 0 and "width = 6" in out
    (place / "shown.toml").write_text(out)
    code, _, err = command("train", "shown.toml", "-w", "1", "--run-folder", "run", "--quiet")
    assert code == 0, err
    facts = json.loads((place / "run" / "model" / "unisono.json").read_text())
    assert "data" in facts["recipe"] and not {"model", "encode", "screen"} & set(facts["recipe"])
    assert unisono.load(place / "run", task="flowers:Flowers").recipe.task.settings["width"] == 6


def test_prepare_is_for_texts(place: Path, command: Command) -> None:
    code, _, err = command("prepare", "flowers.toml")
    assert code == 2 and "prepare is for text recipes" in err


def test_rows_without_a_number_as_prediction_are_said(
    place: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    """The largest of several NaN would be class 0: such a row has no prediction, in a file and in a frame."""
    assert command("train", "flowers.toml", "-w", "1", "--run-folder", "run", "--quiet")[0] == 0
    (place / "new.csv").write_text("a,b\n0.5,0.5\n,1\nnan,0.1\n1,nan\n2,0.1\n")
    capfd.readouterr()
    found = command("predict", "run", "new.csv", "out.csv", "--task", "flowers:Flowers", "-w", "2")
    rest = capfd.readouterr()
    assert found[0] == 0 and "3 of them without a prediction" in found[1] + rest.out
    assert "'x' holds NaN or infinity in 2 of 4 rows, the first is row 3." in found[2] + rest.err
    with (place / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["predicted"]) for row in rows] == [bool(row["p 0"]) for row in rows]
    told = "the model gives NaN as 'p'"
    assert [row["unusable"] for row in rows] == ["", "no value in 'a'", told, told, ""]
    frame = pa.table({"a": [0.5, math.nan], "b": [0.5, 0.5]})
    for new in (
        unisono.load(place / "run", task="flowers:Flowers").predict(frame),
        unisono.predict(place / "run", frame, task="flowers:Flowers", workers=1),
    ):
        assert new["unusable"].to_pylist() == [None, told] and new["predicted"].null_count == 1


def test_a_run_folder_does_not_decide_which_code_is_imported(place: Path, command: Command) -> None:
    assert command("train", "flowers.toml", "-w", "1", "--run-folder", "run", "--quiet")[0] == 0
    facts = json.loads((place / "run" / "model" / "unisono.json").read_text())
    facts["recipe"]["task"]["kind"] = "evil:Evil"
    (place / "run" / "model" / "unisono.json").write_text(json.dumps(facts))
    (place / "evil.py").write_text("raise SystemExit('imported')")
    with pytest.raises(unisono.UserError, match="does not decide which code is imported"):
        unisono.load(place / "run")
    assert "evil" not in sys.modules


def test_an_installed_package_brings_a_task(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its entry point, as pip writes it down: the recipe, and later `load`, need its short name alone."""
    info = place / "flowers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flowers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[unisono.tasks]\nflowers = flowers:Flowers\n")
    monkeypatch.syspath_prepend(place)
    run = ("--run-folder", "run", "--quiet", "-w", "1")
    assert command("train", "flowers.toml", "--set", "task.kind=flowers", *run)[0] == 0
    model = unisono.load(place / "run")
    assert isinstance(model, unisono.TableModel)
    assert kinds.name_of(model.task) == "flowers"
    frame = pa.table({"a": [0.0, 2.0], "b": [0.5, 0.5]})
    assert model.predict(frame).column_names == ["a", "b", "predicted", "p 0", "p 1", "unusable"]


@dataclass
class Language(unisono.Task):
    """Next symbols by a table; the loss of a sample is a sum over its symbols, which differ in number."""

    symbols: int = 5

    def build(self) -> nn.Module:
        return nn.Embedding(self.symbols, self.symbols)

    def _losses(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids, there = microbatch["ids"], microbatch["there"]
        losses = F.cross_entropy(module(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * there).sum(1), there.sum(1).long()

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        sums, counts = self._losses(module, microbatch)
        return sums.sum(), int(counts.sum())

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums, counts = self._losses(module, microbatch)
        return {"loss": sums, "tokens": counts}

    def metrics(self) -> Sequence[unisono.Metric]:
        return (Perplexity(),)


def sentences(count: int = 40) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    ids = np.cumsum(np.ones((count, 9), np.int64), axis=1) + random.integers(0, 5, (count, 1))
    there = (np.arange(8) < random.integers(2, 9, (count, 1))).astype(np.float32)
    return {"ids": ids % 5, "there": there}


def test_a_metric_of_one_s_own_is_the_same_on_any_number_of_workers(tmp_path: Path) -> None:
    found = []
    for workers in (1, 3):
        trained = unisono.train(
            Language(), sentences(), validation=sentences(23), test=sentences(17), workers=workers, quiet=True,
            run=tmp_path / str(workers), epochs=3, samples_per_step=8, microbatches=4, learning_rate=0.3,
            evaluate={"metric": "perplexity", "keep_best": True},
        )  # fmt: skip
        found.append((trained.weights_sha256, trained.summary["test"]))
    assert found[0] == found[1]
    assert 1 < found[0][1]["perplexity"] < 5 and "tokens" not in found[0][1]
    model = unisono.load(tmp_path / "1", task=Language)
    assert model.measure(sentences(17))["perplexity"] == found[0][1]["perplexity"]
    with pytest.raises(unisono.ContractError, match=r"Define Language\.predict"):
        model.predict(sentences(3))


def test_the_guide_s_metric_is_one() -> None:
    found: dict[str, Any] = {}
    exec(METRIC, found)
    results = {"loss": np.zeros(4), "predicted": np.array([0, 1, 2, 3]), "label": np.array([0, 2, 0, 3])}
    summary = summarise(results, (found["WithinOne"](),))
    assert (summary["within_one"], summary["accuracy"]) == (0.75, 0.5)


def test_perplexity_is_weighted_by_tokens() -> None:
    results = {"loss": np.array([6.0, 1.0]), "tokens": np.array([3, 1])}
    assert summarise(results, (Perplexity(),))["perplexity"] == math.exp(7 / 4)
    mean = WeightedMean(name="m", higher_is_better=False, inputs=("loss", "tokens"))
    assert summarise(results, (mean,)) == {"loss": 3.5, "m": 7 / 4, "samples": 2}
    assert math.isnan(mean.compute({"loss": np.zeros(1), "tokens": np.zeros(1)}))
    assert Perplexity().compute({"loss": np.array([1e6]), "tokens": np.array([1])}) == math.inf


def test_a_metric_that_needs_what_is_not_measured_says_so() -> None:
    with pytest.raises(unisono.ContractError, match="'perplexity' needs 'tokens'"):
        summarise({"loss": np.zeros(2)}, (Perplexity(),))


def test_a_metric_of_torchmetrics_sees_all_results_at_once() -> None:
    class Spread:
        """As torchmetrics' have it: update, compute."""

        def update(self, values: Tensor) -> None:
            self.values = values

        def compute(self) -> Tensor:
            return self.values.max() - self.values.min()

    metric = TorchMetric(name="spread", higher_is_better=False, inputs=("score",), make=Spread)
    assert summarise({"loss": np.ones(3), "score": np.array([1.0, 4.0, 2.0])}, (metric,))["spread"] == 3.0
    assert directions((metric,))["spread"] is False


class Odd(Language):
    """Its metric starts as NaN."""

    def metrics(self) -> Sequence[unisono.Metric]:
        return ()

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums, _ = self._losses(module, microbatch)
        early = sums.mean() > 4.4
        return {"loss": sums, "error": torch.full_like(sums, math.nan) if early else sums}


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    trained = unisono.train(
        Odd(), sentences(), validation=sentences(23), workers=1, quiet=True, run=tmp_path / "run", epochs=6,
        samples_per_step=8, microbatches=4, learning_rate=0.1,
        evaluate={"metric": "error", "mode": "min", "keep_best": True},
    )  # fmt: skip
    lines = read_ledger(tmp_path / "run" / "metrics.jsonl")
    scores = [(line["step"], line["scores"]["error"], line["best"]) for line in lines if line["event"] == "Evaluated"]
    values = [value for _, value, _ in scores]
    assert any(value != value for value in values) and not all(value != value for value in values)
    assert not any(best for _, value, best in scores if value != value)
    best = min((value, step) for step, value, _ in scores if value == value)
    assert trained.summary["best_step"] == best[1]


def test_an_unknown_direction_is_refused_before_the_first_step(tmp_path: Path) -> None:
    given: dict[str, Any] = {"workers": 1, "quiet": True, "run": tmp_path / "run", "validation": sentences(9)}
    with pytest.raises(unisono.RecipeError, match=r"evaluate\.mode"):
        unisono.train(Odd(), sentences(), evaluate={"metric": "error", "patience": 2}, **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("what", "expected"), [(nn.Linear(2, 2), "Write a Task"), (Language, "Make an instance"), (3, "allowed are")])  # fmt: skip
def test_what_is_no_task_is_explained(what: Any, expected: str) -> None:
    with pytest.raises(unisono.RecipeError, match=expected):
        unisono.train(what, sentences())
