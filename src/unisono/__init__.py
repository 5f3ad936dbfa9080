"""unisono: train on any number of workers, get the same bits.

The public names, each imported when it is first used, so that `import unisono` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unisono import parallel
    from unisono.api import Trained, train
    from unisono.application import Classifier, evaluate, load, predict
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
    from unisono.models.task import Task
    from unisono.preparation import prepare
    from unisono.recipe import Recipe
    from unisono.verification import verify

_HOMES = {
    "train": "api",
    "Trained": "api",
    "evaluate": "application",
    "predict": "application",
    "load": "application",
    "Classifier": "application",
    "prepare": "preparation",
    "verify": "verification",
    "Task": "models.task",
    "Recipe": "recipe",
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
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"unisono.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'unisono' has no attribute {name!r}")
    return getattr(import_module(f"unisono.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
