"""Streams of samples: the same bits on any number of workers, and nothing read again where the stream has a state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unisono
from test_own_data import Sums, bits
from unisono.config import recipe as recipes
from unisono.data.streams import SampleStream
from unisono.errors import DataError, RecipeError
from unisono.tasks.own_inputs import open_own
from unisono.tracking import ledger

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "draw_curves", lambda lines, path: None)


class Plain:
    """Samples that are shaken at random; notes the number of each that is read."""

    def __init__(self, read: Path | None = None, samples: int = 200) -> None:
        self.read = read
        self.samples = samples
        self.begin = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.begin, self.samples):
            if self.read is not None:
                with self.read.open("a") as file:
                    file.write(f"{number}\n")
            self.begin = number + 1 if isinstance(self, Stateful) else 0
            yield {"input": torch.randn(6) + number % 3, "target": number % 3, "name": str(number)}
        self.begin = 0


class Stateful(Plain):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return Plain.__iter__(self)

    def state_dict(self) -> dict[str, Any]:
        return {"begin": self.begin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["begin"]


class Restarting(Stateful):
    """Begins anew in each `__iter__`, unless a state was loaded just before, as Hugging Face's do."""

    loaded = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.begin = self.begin if self.loaded else 0
        self.loaded = False
        return Plain.__iter__(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin, self.loaded = state["begin"], True


def train(run: Path, data: object, **settings: Any) -> unisono.Trained:
    options = {"workers": 1, "max_steps": 7, "samples_per_step": 8, "microbatches": 4, "quiet": True} | settings
    return unisono.train(Sums(), data, run=run, **options)


@pytest.fixture(scope="module")
def plain(warm: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return bits(train(tmp_path_factory.mktemp("stream") / "run", Plain()))


def test_same_bits_on_any_number_of_workers_with_and_without_a_state(plain: dict[str, Any], tmp_path: Path) -> None:
    assert plain["steps"] == 7
    assert bits(train(tmp_path / "2", Plain(), workers=2)) == plain
    assert bits(train(tmp_path / "3", Restarting(), workers=3, audit_every=2)) == plain
    assert bits(train(tmp_path / "seed", Plain(), seed=1)) != plain


@pytest.mark.slow
def test_lost_workers_cost_no_bit(plain: dict[str, Any], tmp_path: Path) -> None:
    faults = ["kill(worker=1, step=3, phase=contribute)", "kill(worker=0, step=6, phase=commit)"]
    for data in (Plain(), Restarting()):
        found = train(tmp_path / type(data).__name__, data, workers=2, faults=faults)
        assert found.summary["recoveries"] == 2
        assert bits(found) == plain


class Forgetful(Restarting):
    """A state that does not say all, such as that of a shuffle buffer."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin, self.loaded = state["begin"] + 1, True


@pytest.mark.parametrize("kind", [Plain, Restarting, Forgetful])
def test_resumed_run_reads_again_only_without_a_state(kind: type[Plain], plain: dict[str, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"checkpoint": {"every_steps": 2}, "recovery": {"restarts": 0}}
    with pytest.raises(unisono.WorkerError):
        train(tmp_path / "run", kind(), faults=["kill(worker=0, step=6, phase=reduce)"], **options)
    read = tmp_path / "read"
    found = train(tmp_path / "run", kind(read), resume=True, workers=2, **options)
    assert bits(found) == plain
    begun = int(re.findall(r'"start_step": ?(\d+)', (tmp_path / "run" / "metrics.jsonl").read_text())[-1])
    assert begun in (4, 5)  # the checkpoint of step 4, or what the supervisor saved of step 5
    between = {int(line) for line in read.read_text().split()} & set(range(16, begun * 8))
    assert between == (
        set() if kind is Restarting else set(range(16, begun * 8))
    )  # 16 are read beforehand, to be compared


def open_it(data: Any, **options: Any) -> tuple[SampleStream, list[str]]:
    told: list[str] = []
    given = {name: options.pop(name) for name in ("validation", "sampler") if name in options}
    recipe = recipes.check({"train": {"max_steps": 3, "samples_per_step": 8} | options})
    inputs = open_own(recipe, Sums(), data, notify=told.append, **given)
    assert isinstance(inputs.train, SampleStream)
    return inputs.train, told


def test_what_cannot_be_resumed_is_told() -> None:
    stream, told = open_it(Plain())
    assert not stream.has_state and stream.state_at(1) is None and not stream.go_to(1, None)
    assert "no state_dict()" in told[0] and "'name' of the items is text" in told[1]
    stream, told = open_it(Restarting())
    assert stream.has_state and stream.state_at(1)["state"] == {"begin": 8} and len(told) == 1
    assert stream.go_to(1, stream.state_at(1))


def test_state_that_does_not_lead_to_the_same_samples_is_not_used() -> None:
    stream, _ = open_it(Forgetful())
    expected = stream.take(np.array([9]))["input"]
    assert not stream.go_to(1, stream.state_at(1))
    assert torch.equal(stream.take(np.array([9]))["input"], expected)


def test_what_was_read_before_can_be_had_again() -> None:
    for data in (Plain(), Restarting()):
        stream, _ = open_it(data)
        first = stream.take(np.array([3, 5]))["input"]
        stream.take(np.array([22]))
        assert torch.equal(stream.take(np.array([3, 5]))["input"], first)


class Impure(Plain):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.begin += 1
        yield from ({"input": torch.zeros(6) + self.begin, "target": 0} for _ in range(9))


class Odd(Restarting):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def state_dict(self) -> Any:
        return self.state


class Raises(Plain):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        raise OSError("the bucket is closed")
        yield


@pytest.mark.parametrize(
    ("data", "options", "error", "told"),
    [
        (Plain(), {"max_steps": 0}, RecipeError, r"Plain is a stream.*Set train\.max_steps"),
        (Plain(), {"loader_workers": 1}, RecipeError, "a stream is read in order"),
        (Plain(), {"sampler": lambda seed, epoch: [0]}, DataError, "sampler chooses samples by their numbers"),
        ({"input": [0.0]}, {"validation": Plain()}, DataError, "evaluation visits every sample once"),
        ((number for number in range(5)), {}, DataError, "generator can be read once only"),
        (Plain(samples=0), {}, DataError, "the stream has no samples"),
        (Impure(), {}, DataError, "other samples when it was read a second time"),
        (Raises(), {}, DataError, "the stream raised OSError: the bucket is closed"),
        (Odd({"position": (1, 2)}), {}, DataError, "not plain JSON: it holds tuples"),
        (Odd({"position": torch.ones(1)}), {}, DataError, "not plain JSON: Object of type Tensor"),
    ],
)
def test_wrong_stream_is_refused(data: Any, options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        open_it(data, **options)


def test_stream_that_ends_early_says_how_many_steps_there_are() -> None:
    stream, _ = open_it(Plain(samples=20))
    with pytest.raises(DataError, match=r"ended after 20 samples; max_steps × samples_per_step are 24.*= 2 at most"):
        stream.take(np.array([21]))


def test_hugging_face_stream_goes_on_from_its_state_or_from_its_beginning() -> None:
    """The state of its shuffle buffer leads to other samples."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"x": [[float(number)] for number in range(400)]})
    for data, exact in (
        (table.to_iterable_dataset(num_shards=3), True),
        (table.to_iterable_dataset(num_shards=3).shuffle(0, buffer_size=50), False),
    ):
        stream, _ = open_it(data, max_steps=30)
        expected = stream.take(np.arange(160, 168))["x"]
        state = json.loads(json.dumps(stream.state_at(20)))
        assert stream.go_to(20, state) == exact
        assert torch.equal(stream.take(np.arange(160, 168))["x"], expected)
