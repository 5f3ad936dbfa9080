"""A second backend: NumPy, with gradients written by hand, and a task for it with everything that is easily got wrong.

It copies what it adopts, as a framework with memory of its own has to; its random numbers come from the key alone; one
weight is frozen, one gets no gradient, one is a table whose gradients come as rows; a float and an integer buffer change.

Owns no assertion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from unisono.backends.backend import Group, Measure, Measurement, MicrobatchSums, ModelParameter, check_sum
from unisono.backends.backend_registry import register_backend
from unisono.config.sections import Train
from unisono.exchange.protocol import Offload
from unisono.tasks.task import Microbatch, Task

WORDS, WIDTH, INPUTS, CLASSES = 40, 8, 6, 3
FROZEN = "scale"
TABLE = "words"
SAVED = {"out": ("head/kernel", "tied/kernel"), "words": ("embeddings",)}
"""Names in this backend's saved format, where they are others."""


@dataclass(slots=True, kw_only=True)
class NumpyModel:
    """What tasks of this backend are shown: arrays by name, to be read; buffers, to be changed in training."""

    parameters: Mapping[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    random: np.random.Generator
    training: bool
    memory: dict[str, Any] = field(default_factory=dict)


class NumpyBackend:
    """A `Backend` whose tasks' `build` returns (parameters, buffers), and whose `loss` returns (loss, terms, gradients
    by name: arrays, or (row numbers, rows))."""

    name: ClassVar[str] = "numpy"
    min_samples = 1

    def __init__(self, task: Task, key: int) -> None:
        self._task: Any = task
        parameters, buffers = self._task.build(np.random.default_rng(key))
        self._values = {name: torch.from_numpy(value) for name, value in parameters.items()}
        self._buffers: Mapping[str, Tensor] = {name: torch.from_numpy(value) for name, value in buffers.items()}
        self._trained: list[str] = []
        self._copies: dict[str, np.ndarray] = {}
        self._memory: dict[str, Any] = {}

    @classmethod
    def build(cls, task: Task, train: Train, *, key: int, device: torch.device, on_built: Any = None) -> NumpyBackend:
        return cls(task, key)

    def fingerprint(self) -> dict[str, str]:
        return {"backend": f"numpy {np.__version__}"}

    def parameters(self) -> list[ModelParameter]:
        group = Group(pretrained=False, decays=True)
        return [
            ModelParameter(name=name, value=value, group=None if name == FROZEN else group, table=name == TABLE)
            for name, value in self._values.items()
        ]

    def buffers(self) -> Mapping[str, Tensor]:
        return self._buffers

    def adopt(self, parameters: Mapping[str, Tensor]) -> None:
        self._trained = list(parameters)
        self._values |= parameters
        self._copies = {name: value.numpy().copy() for name, value in self._values.items()}

    def adopt_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = buffers

    def contribute(
        self,
        microbatch: Microbatch,
        key: int,
        *,
        offload: Offload | None = None,
        halfway: Callable[[], None] | None = None,
    ) -> MicrobatchSums:
        model = self._model(key, training=True)
        loss, terms, gradients = self._task.loss(model, {name: column.numpy() for name, column in microbatch.items()})
        total = torch.tensor(loss)
        check_sum(total, terms)
        for name, buffer in self._buffers.items():
            buffer.copy_(torch.from_numpy(np.asarray(model.buffers[name])))
        return MicrobatchSums(loss=total, terms=terms, gradients=[self._gradient(gradients, n) for n in self._trained])

    def _gradient(self, gradients: Mapping[str, Any], name: str) -> Tensor | None:
        found = gradients.get(name)
        if name != TABLE or found is None:
            return None if found is None else torch.from_numpy(found)
        numbers, rows = (torch.from_numpy(part) for part in found)
        return torch.sparse_coo_tensor(
            numbers[None], rows + 0.0, self._values[name].shape, check_invariants=True
        ).coalesce()

    def _model(self, key: int, *, training: bool) -> NumpyModel:
        buffers = {name: value.numpy().copy() for name, value in self._buffers.items()}
        random = np.random.default_rng(key)
        return NumpyModel(
            parameters=self._copies, buffers=buffers, random=random, training=training, memory=self._memory
        )

    @contextmanager
    def measuring(self, measure: Measurement) -> Iterator[Measure]:
        def compute(microbatch: Microbatch, key: int) -> Mapping[str, Tensor]:
            model = self._model(key, training=False)
            found: Mapping[str, Any] = measure(model, {name: column.numpy() for name, column in microbatch.items()})  # type: ignore[arg-type]
            return {name: torch.from_numpy(values) for name, values in found.items()}

        yield compute

    def tensors(self) -> dict[str, Tensor]:
        names = {name: SAVED.get(name, (name,)) for name in self._values}
        return {saved: self._values[name] for name, others in names.items() for saved in others} | {
            "mean": self._buffers["mean"]
        }

    def remembered(self) -> dict[str, Any]:
        return {f"memory.{name}": repr(value) for name, value in self._memory.items()}

    def count_flop(self, compute: Callable[[], object]) -> None:
        return None

    def measure_saved(self, compute: Callable[[], object], constants: Sequence[Tensor]) -> None:
        return None


register_backend(NumpyBackend)


class NumpyClasses(Task):
    """Tells the class `label` of numbers `x` and a `word`: one hidden layer, with dropout, over centred inputs."""

    backend = "numpy"

    def build(self, random: np.random.Generator) -> Any:  # type: ignore[override]
        def draw(*shape: int) -> np.ndarray:
            return (0.3 * random.standard_normal(shape)).astype(np.float32)

        parameters = {
            "scale": np.full(INPUTS, 0.5, np.float32),
            "hidden": draw(INPUTS, WIDTH),
            "spare": draw(4),
            "words": draw(WORDS, WIDTH),
            "bias": draw(WIDTH),
            "out": draw(WIDTH, CLASSES),
        }
        return parameters, {"mean": np.zeros(INPUTS, np.float32), "calls": np.zeros((), np.int64)}

    def loss(self, model: Any, microbatch: Any) -> Any:
        x, word, label = (microbatch[name] for name in ("x", "word", "label"))
        model.buffers["mean"] += np.float32(0.1) * (x.mean(0) - model.buffers["mean"])
        model.buffers["calls"] += 1
        values = model.parameters
        inputs, active, kept, chances = self._forward(model, x, word)
        slope = chances.copy()
        slope[np.arange(len(label)), label] -= 1
        back = (slope @ values["out"].T) * kept * (1 - active * active)
        numbers, places = np.unique(word, return_inverse=True)
        rows = np.zeros((len(numbers), WIDTH), np.float32)
        np.add.at(rows, places.reshape(-1), back)
        gradients = {
            "hidden": inputs.T @ back,
            "words": (numbers, rows),
            "bias": back.sum(0),
            "out": (active * kept).T @ slope,
        }
        loss = -np.log(chances[np.arange(len(label)), label].astype(np.float64)).sum()
        return loss, len(label), gradients

    def measure(self, model: Any, microbatch: Any) -> Any:
        chances = self._forward(model, microbatch["x"], microbatch["word"])[3]
        label = microbatch["label"]
        losses = -np.log(chances[np.arange(len(label)), label])
        return {"loss": losses, "predicted": chances.argmax(1), "label": label}

    def _forward(self, model: Any, x: np.ndarray, word: np.ndarray) -> tuple[np.ndarray, ...]:
        values = model.parameters
        inputs = (x - model.buffers["mean"]) * values["scale"]
        active = np.tanh(inputs @ values["hidden"] + values["bias"] + values["words"][word])
        kept = np.ones_like(active)
        if model.training:
            kept = (model.random.random(active.shape) < 0.8).astype(np.float32) / np.float32(0.8)
        scores = (active * kept) @ values["out"]
        scores = np.exp(scores - scores.max(1, keepdims=True))
        return inputs, active, kept, scores / scores.sum(1, keepdims=True)


class Remembers(NumpyClasses):
    """Keeps a number between calls, in no buffer."""

    def loss(self, model: Any, microbatch: Any) -> Any:
        model.memory["calls"] = model.memory.get("calls", 0) + 1
        loss, terms, gradients = super().loss(model, microbatch)
        return loss, terms, gradients | {"bias": gradients["bias"] * np.float32(model.memory["calls"])}


def make_columns(samples: int = 90, seed: int = 5) -> dict[str, np.ndarray]:
    """Columns that the task can learn."""
    random = np.random.default_rng(seed)
    label = np.arange(samples) % CLASSES
    x = (random.standard_normal((samples, INPUTS)) + 3 * np.eye(INPUTS)[label] + 1).astype(np.float32)
    return {"x": x, "word": random.integers(0, WORDS // 4, samples) * 4 + label, "label": label}
