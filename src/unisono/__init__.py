"""unisono: train on any number of workers, get the same bits.

The public names, each imported when it is first used, so that `import unisono` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unisono import parallel
    from unisono.api.application import evaluate, load, predict
    from unisono.api.preparation import prepare
    from unisono.api.training import Trained, train
    from unisono.api.verification import verify
    from unisono.config.recipe import Recipe
    from unisono.data.samplers import weighted
    from unisono.errors import (
        ContractError,
        DataError,
        DivergedError,
        Interrupted,
        ObserverError,
        Preempted,
        RecipeError,
        UnisonoError,
        UserError,
        WorkerError,
    )
    from unisono.tasks.metrics import Metric, Perplexity, TorchMetric, WeightedMean
    from unisono.tasks.table_model import TableModel
    from unisono.tasks.task import Task
    from unisono.tasks.text.classifier import Classifier
    from unisono.tracking import events
    from unisono.tracking.events import STOP, Observer

    __version__: str

_HOMES = {
    "train": "api.training",
    "Trained": "api.training",
    "evaluate": "api.application",
    "predict": "api.application",
    "load": "api.application",
    "Classifier": "tasks.text.classifier",
    "TableModel": "tasks.table_model",
    **dict.fromkeys(("Metric", "Perplexity", "TorchMetric", "WeightedMean"), "tasks.metrics"),
    "prepare": "api.preparation",
    "verify": "api.verification",
    "Task": "tasks.task",
    "Recipe": "config.recipe",
    "Observer": "tracking.events",
    "STOP": "tracking.events",
    "weighted": "data.samplers",
    **dict.fromkeys(
        (
            "ContractError",
            "DataError",
            "DivergedError",
            "Interrupted",
            "ObserverError",
            "Preempted",
            "RecipeError",
            "UnisonoError",
            "UserError",
            "WorkerError",
        ),
        "errors",
    ),
}

_MODULES = {"events": "tracking.events", "parallel": "parallel"}

__all__ = [
    "STOP",
    "Classifier",
    "ContractError",
    "DataError",
    "DivergedError",
    "Interrupted",
    "Metric",
    "Observer",
    "ObserverError",
    "Perplexity",
    "Preempted",
    "Recipe",
    "RecipeError",
    "TableModel",
    "Task",
    "TorchMetric",
    "Trained",
    "UnisonoError",
    "UserError",
    "WeightedMean",
    "WorkerError",
    "evaluate",
    "events",
    "load",
    "parallel",
    "predict",
    "prepare",
    "train",
    "verify",
    "weighted",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # 30 ms

        return version("unisono")
    if name in _MODULES:
        return import_module(f"unisono.{_MODULES[name]}")
    if name not in _HOMES:
        raise AttributeError(f"module 'unisono' has no attribute {name!r}")
    return getattr(import_module(f"unisono.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
