"""Data of a user's own: datasets with loaders, collation and samplers, to the same bits on any number of workers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unisono
from test_parallel_guide import read_blocks
from unisono.config import recipe as recipes
from unisono.data.items import Items
from unisono.errors import ContractError, DataError, RecipeError
from unisono.tasks.own_inputs import open_own
from unisono.tasks.run_inputs import RunInputs
from unisono.tracking import ledger

pytestmark = pytest.mark.usefixtures("warm")


class Sums(unisono.Task):
    """Classifies `input` through a BatchNorm, and takes columns out of its microbatch."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        assert isinstance(microbatch, dict)
        scores = module(microbatch.pop("input"))
        return F.cross_entropy(scores, microbatch["target"], reduction="sum"), len(scores)

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(microbatch, dict)
        scores = module(microbatch.pop("input"))
        return {"loss": F.cross_entropy(scores, microbatch.pop("target"), reduction="none")}


class Pictures:
    """Items of several lengths, shaken by all three generators; notes which processes load them."""

    def __init__(self, seen: Path | None = None, samples: int = 33) -> None:
        self.seen = seen
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, sample: int) -> dict[str, Any]:
        if self.seen is not None:
            (self.seen / str(os.getpid())).touch()
        shaken = torch.randn(1 + sample % 6) + np.random.rand() + random.random()
        return {"input": shaken + sample % 3, "target": sample % 3, "file": f"{sample}.png"}


def pad(items: list[Any]) -> dict[str, Tensor]:
    rows = [F.pad(item["input"], (0, 6 - len(item["input"]))) for item in items]
    return {"input": torch.stack(rows), "target": torch.tensor([item["target"] for item in items])}


SETTINGS: dict[str, Any] = {"epochs": 2, "samples_per_step": 8, "microbatches": 4, "quiet": True, "collate": pad}
SAMPLER = unisono.weighted(np.arange(1.0, 34.0), 25)  # steps of 8, 8 and 9


def train(run: Path, data: object = None, **settings: Any) -> unisono.Trained:
    given = Pictures() if data is None else data
    options = SETTINGS | {"sampler": SAMPLER, "workers": 1, "test": Pictures(samples=9)} | settings
    return unisono.train(Sums(), given, run=run, **options)


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer to draw than such a run takes."""
    monkeypatch.setattr(ledger, "draw_curves", lambda lines, path: None)


@pytest.fixture(scope="module")
def plain(warm: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one worker, which loads its own items, comes to."""
    return bits(train(tmp_path_factory.mktemp("plain") / "run"))


def bits(trained: unisono.Trained) -> dict[str, Any]:
    return {name: trained.summary[name] for name in ("weights_sha256", "optimizer_sha256", "test", "steps")}


@pytest.mark.parametrize(("workers", "loaders"), [(1, 2), (2, 0), (3, 2)])
def test_same_bits_on_any_number_of_workers_and_loaders(
    workers: int, loaders: int, plain: dict[str, Any], tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    found = train(tmp_path / "run", Pictures(seen), workers=workers, loader_workers=loaders)
    assert bits(found) == plain
    assert plain["steps"] == 6
    processes = [int(path.name) for path in seen.iterdir()]
    # each worker opens the data, and may ask its loaders only for what is its own
    assert workers + min(loaders, 1) <= len(processes) <= workers + workers * loaders
    for process in set(processes) - {os.getpid()}:  # one worker is this process
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_what_decides_bits_does(plain: dict[str, Any], tmp_path: Path) -> None:
    """Else the comparisons above would pass whatever is loaded."""
    others = [{"seed": 1}, {"sampler": None}, {"drop_last": True, "sampler": None}]
    found = [bits(train(tmp_path / str(number), **other)) for number, other in enumerate(others)]
    assert len({one["weights_sha256"] for one in (plain, *found)}) == 4
    assert [one["steps"] for one in found] == [
        6,
        8,
        8,
    ]  # 33 samples: the last one joins the step before, or is left out


def test_lost_worker_costs_no_bit(plain: dict[str, Any], tmp_path: Path) -> None:
    faults = ["kill(worker=1, step=2, phase=load)", "kill(worker=0, step=5, phase=update)"]
    found = train(tmp_path / "run", workers=2, loader_workers=1, faults=faults)
    assert found.summary["recoveries"] == 2
    assert bits(found) == plain


def test_run_that_failed_is_resumed_with_other_loaders_to_the_same_bits(plain: dict[str, Any], tmp_path: Path) -> None:
    options = {"checkpoint": {"every_steps": 2}, "recovery": {"restarts": 0}}
    with pytest.raises(unisono.WorkerError):
        train(tmp_path / "run", workers=2, loader_workers=1, faults=["kill(worker=1, step=5, phase=reduce)"], **options)
    other = unisono.weighted(np.ones(33), 25)
    with pytest.raises(ContractError, match=r"data\.sampler: '\w+' in the checkpoint"):
        train(tmp_path / "run", resume=True, sampler=other, **options)
    assert bits(train(tmp_path / "run", resume=True, loader_workers=2, **options)) == plain


def test_dataset_that_fails_in_a_loader_ends_the_run_with_its_sample(tmp_path: Path) -> None:
    class Broken(Pictures):
        def __getitem__(self, sample: int) -> dict[str, Any]:
            if sample == 19:
                raise ValueError("19.png is cut off")
            return super().__getitem__(sample)

    parent = Broken(samples=80)  # of 80, some are opened beforehand to be hashed; 19 is not among them
    assert 19 not in np.linspace(0, 79, 64).astype(int)
    with pytest.raises(unisono.WorkerError, match=r"(?s)ValueError: 19\.png is cut off.*asked for sample 19 in epoch"):
        train(tmp_path / "run", parent, loader_workers=1, sampler=None, recovery={"backoff_seconds": 0})


@pytest.mark.parametrize("samples", [65, 66, 79])
def test_batchnorm_trains_any_number_of_samples(samples: int, tmp_path: Path) -> None:
    """16 samples a step in 8 microbatches: the last step of an epoch would have had microbatches of one sample."""
    columns = {"input": torch.arange(samples * 6.0).view(samples, 6).sin(), "target": torch.arange(samples) % 3}
    found = unisono.train(
        Sums(), columns, run=tmp_path / "run", workers=1, quiet=True, epochs=1, samples_per_step=16, microbatches=8
    )
    assert found.summary["steps"] == (4 if samples == 65 else 5)


@pytest.mark.parametrize(("samples", "per_step"), [(1, 16), (8, 1)])
def test_batchnorm_over_one_sample_is_refused_before_the_first_step(
    samples: int, per_step: int, tmp_path: Path
) -> None:
    columns = {"input": torch.arange(samples * 6.0).view(samples, 6).sin(), "target": torch.arange(samples) % 3}
    with pytest.raises(unisono.UserError, match=r"batch normalisation compares the samples of a microbatch.*at least"):
        unisono.train(Sums(), columns, run=tmp_path / "run", workers=1, quiet=True, samples_per_step=per_step)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_batchnorm_over_places_trains_single_samples(tmp_path: Path) -> None:
    """A picture has several values per channel, so one sample is enough."""

    class Places(Sums):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(6, 3))

    columns = {"input": torch.arange(18.0).view(3, 6).sin(), "target": torch.arange(3)}
    found = unisono.train(Places(), columns, run=tmp_path / "run", workers=1, quiet=True, samples_per_step=1)
    assert found.summary["steps"] > 0


def test_loss_that_writes_into_its_microbatch_is_told_so(tmp_path: Path) -> None:
    class Writes(Sums):
        def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
            microbatch["input"].mul_(2)
            return super().loss(module, microbatch)

    with pytest.raises(ContractError, match=r"loss writes into column 'input' of its microbatch.*column\.clone\(\)"):
        unisono.train(Writes(), Pictures(), run=tmp_path / "run", **(SETTINGS | {"workers": 1}))


def test_dataset_with_a_generator_of_its_own_is_refused(tmp_path: Path) -> None:
    class Streamed(Pictures):
        generator = np.random.default_rng(0)

        def __getitem__(self, sample: int) -> dict[str, Any]:
            item = super().__getitem__(sample)
            return item | {"input": item["input"] + self.generator.random()}

    with pytest.raises(ContractError, match=r"dataset is not pure.*another 'input'.*in __getitem__"):
        train(tmp_path / "run", Streamed())
    assert train(tmp_path / "run", Streamed(), allow_impure=True, max_steps=1).summary["pure"] is False


def test_verify_takes_the_same_data() -> None:
    told: list[str] = []
    options = {name: value for name, value in SETTINGS.items() if name != "quiet"}
    assert unisono.verify(
        Sums(), Pictures(), sampler=SAMPLER, workers=(1, 2), steps=1, say=told.append, loader_workers=1, **options
    )
    assert told[-1] == "equal, bit for bit"


# What is taken, and what is refused


def open_it(
    data: Any, *, task: unisono.Task | None = None, train: Mapping[str, Any] | None = None, **options: Any
) -> RunInputs:
    recipe = recipes.check({"train": dict(train or {})})
    inputs = open_own(recipe, task or Sums(), data, **options)
    inputs.check(recipe)
    return inputs


def one_item(inputs: RunInputs) -> dict[str, Tensor]:
    return inputs.train.take(np.array([0, 1]))


def test_hugging_face_dataset_gives_its_numbers_and_lists_of_numbers() -> None:
    datasets = pytest.importorskip("datasets")
    table = {"x": [[1.5, 2.0], [3.0, 4.0]], "grid": [[[1, 2], [3, 4]]] * 2, "y": [0, 1], "text": ["a", "b"]}
    told: list[str] = []
    found = one_item(open_it(datasets.Dataset.from_dict(table), notify=told.append))
    assert {name: (column.dtype, tuple(column.shape)) for name, column in found.items()} == {
        "x": (torch.float32, (2, 2)),
        "grid": (torch.int64, (2, 2, 2)),
        "y": (torch.int64, (2,)),
    }
    assert found["x"].tolist() == table["x"]
    assert told == ["train: 'text' of the items is text, and left out; collate= would get it."]


def test_argument_goes_before_the_tasks_collate_and_that_before_stacking() -> None:
    class Collates(Sums):
        def collate(self, items: list[Any]) -> dict[str, Tensor]:
            return {"task": torch.zeros(len(items))}

    data = Pictures()
    assert list(one_item(open_it(data, task=Collates()))) == ["task"]
    assert list(one_item(open_it(data, task=Collates(), collate=pad))) == ["input", "target"]


def test_items_are_loaded_with_one_thread() -> None:
    class Threads(Pictures):
        def __getitem__(self, sample: int) -> dict[str, Any]:
            return {"threads": torch.get_num_threads()}

    torch.set_num_threads(3)
    try:
        assert one_item(open_it(Threads()))["threads"].tolist() == [1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_a_sample_given_twice_is_augmented_differently() -> None:
    source = Items(Pictures(), seed=3, collate=pad)
    samples = np.array([5, 5, 5])
    again = source.take(samples, epoch=1, repeats=np.array([0, 1, 0]))["input"]
    assert torch.equal(again[0], again[2]) and not torch.equal(again[0], again[1])
    assert torch.equal(again[:1], source.take(samples[:1], epoch=1)["input"])


@pytest.mark.parametrize(
    ("items", "collate", "told"),
    [
        ([torch.ones(2), torch.ones(3)], None, r"item is torch\.Tensor; allowed is a mapping .* pair.*collate="),
        (
            [{"x": [1, 2]}, {"x": [1]}],
            None,
            r"different shapes under 'x': \(1,\) and \(2,\).*Give train\(…, collate=…\)",
        ),
        ([{"x": [[1, 2], [3]]}], None, "under 'x' a list that is no array of numbers"),
        ([{"x": {"y": 1}}], None, "under 'x' a value of dict; allowed are numbers"),
        ([{"x": None}], None, "under 'x' a value of NoneType"),
        ([{"x": np.array(["a"])}], None, "under 'x' values of NumPy's <U1"),
        ([{"x": ["a", "b"]}], None, "under 'x' a list that is no array of numbers"),
        ([{"x": Path("a.png")}], None, "under 'x' a value of pathlib"),
        ([{"x": 1j}], None, "under 'x' a value of complex"),
        ([{"x": Decimal("1.5")}], None, r"under 'x' a value of decimal\.Decimal"),
        ([{"x": 2**70}], None, "under 'x' a value of int"),
        ([{"x": torch.ones(2).to_sparse()}], None, r"under 'x' a tensor in the layout torch\.sparse_coo"),
        ([{"x": "a", "y": "b"}], None, r"nothing but texts \('x', 'y'\)"),
        ([{"x": 1}, {"y": 1}], None, "different names: 'x' and 'y'"),
        ([], None, "no samples"),
        ([{"x": 1}], 5, "collate is int; allowed is a function"),
        ([{"x": 1}], lambda items: items, "collate returned list; allowed is a mapping"),
        ([{"x": 1}], lambda items: {"x": [1]}, "collate returned list under 'x'; allowed are tensors"),
        ([{"x": 1}], lambda items: {"x": torch.empty(1, device="meta")}, "tensor on meta under 'x'"),
        ({"x": [1, 2]}, pad, "collate is for datasets that give items one by one"),
        (torch.utils.data.DataLoader(Pictures()), None, r"DataLoader.*collate=loader\.collate_fn"),  # type: ignore[arg-type]
        (5, None, "int is no data that can be read; allowed are .* a stream"),
    ],
)
def test_wrong_items_are_refused(items: Any, collate: Callable[..., Any] | None, told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_it(items, collate=collate)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ({"loader_workers": 2}, r"'train\.loader_workers' = 2: the data lies in memory.*Allowed is 0"),
        ({"drop_last": True, "samples_per_step": 9}, r"'train\.drop_last' = true: an epoch has 5 samples, fewer than"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(train: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        open_it({"x": [1, 2, 3, 4, 5]}, train=train)


@pytest.mark.parametrize("given", [{"collate": pad}, {"sampler": SAMPLER}])
def test_recipes_for_text_take_neither(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(given))} is for a task of your own"):
        unisono.train(unisono.Recipe(), run=tmp_path / "run", **given)


def test_guide_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    guide = Path(__file__).parents[1] / "docs" / "data.md"
    monkeypatch.chdir(tmp_path)
    blocks = read_blocks(guide)
    assert len(blocks) == 5
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, str(guide), "exec"), names)
    assert capsys.readouterr().out.splitlines() == ["True"]
