"""unisono: train on any number of workers, get the same bits.

The public names, each imported when it is first used, so that `import unisono` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unisono import parallel
    from unisono.api.application import Classifier, evaluate, load, predict
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
        Preempted,
        RecipeError,
        UnisonoError,
        UserError,
        WorkerError,
    )
    from unisono.tasks.task import Task

_HOMES = {
    "train": "api.training",
    "Trained": "api.training",
    "evaluate": "api.application",
    "predict": "api.application",
    "load": "api.application",
    "Classifier": "api.application",
    "prepare": "api.preparation",
    "verify": "api.verification",
    "Task": "tasks.task",
    "Recipe": "config.recipe",
    "weighted": "data.samplers",
    **dict.fromkeys(
        (
            "ContractError",
            "DataError",
            "DivergedError",
            "Interrupted",
            "Preempted",
            "RecipeError",
            "UnisonoError",
            "UserError",
            "WorkerError",
        ),
        "errors",
    ),
}

_MODULES = ("parallel",)

__all__ = [
    "Classifier",
    "ContractError",
    "DataError",
    "DivergedError",
    "Interrupted",
    "Preempted",
    "Recipe",
    "RecipeError",
    "Task",
    "Trained",
    "UnisonoError",
    "UserError",
    "WorkerError",
    "evaluate",
    "load",
    "parallel",
    "predict",
    "prepare",
    "train",
    "verify",
    "weighted",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"unisono.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'unisono' has no attribute {name!r}")
    return getattr(import_module(f"unisono.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
