"""The public face: what is documented, no more and no less, and free to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing

import pytest

import unisono

PUBLIC = {
    "Classifier",
    "Metric",
    "Perplexity",
    "TableModel",
    "TorchMetric",
    "WeightedMean",
    "ContractError",
    "DataError",
    "DivergedError",
    "Interrupted",
    "Observer",
    "ObserverError",
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
    "predict",
    "prepare",
    "train",
    "verify",
    "weighted",
}


CONSTANTS = {"STOP"}
MODULES = {"events", "parallel"}


def test_public_names_are_the_documented_ones() -> None:
    assert set(unisono.__all__) == PUBLIC | CONSTANTS | MODULES
    assert dir(unisono) == sorted(unisono.__all__)
    assert set(unisono._HOMES) == PUBLIC | CONSTANTS
    assert set(unisono._MODULES) == MODULES


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_name_resolves_and_is_documented(name: str) -> None:
    found = getattr(unisono, name)
    assert found.__name__ == name
    assert found.__module__ == f"unisono.{unisono._HOMES[name]}"
    assert found.__doc__ and not found.__doc__.startswith(f"{name}(")  # its own, not the one that dataclasses make


def test_modules_resolve_without_being_imported_first() -> None:
    asked = "import unisono; print(unisono.parallel.map.__module__, unisono.events.STOP is unisono.STOP)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert done.stdout.strip() == "unisono.parallel.calls True", done.stderr


@pytest.mark.parametrize("name", ["evaluate", "load", "predict", "prepare", "train", "verify", "weighted"])
def test_functions_are_typed_and_name_their_errors(name: str) -> None:
    function = getattr(unisono, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    assert "Raises:" in function.__doc__


def test_errors_are_one_tree() -> None:
    errors = [
        getattr(unisono, name) for name in PUBLIC if name.endswith("Error") or name in ("Interrupted", "Preempted")
    ]
    assert all(issubclass(error, unisono.UnisonoError) for error in errors)
    codes = {error.__name__: error.exit_code for error in errors}
    expected = dict.fromkeys(("UserError", "RecipeError", "DataError", "ContractError"), 2)
    expected |= {
        "UnisonoError": 1,
        "WorkerError": 1,
        "ObserverError": 1,
        "DivergedError": 3,
        "Interrupted": 130,
        "Preempted": 75,
    }
    assert codes == expected


def test_drawn_tree_is_the_real_one() -> None:
    """Who is whose subclass, and which exit code is whose."""
    from unisono import errors

    above = ["UnisonoError"]  # the way from the root to the line before
    drawn: dict[str, str] = {}  # name → parent
    codes = {"UnisonoError": 1}
    for line in (errors.__doc__ or "").splitlines():
        branch = line.lstrip("│├└─ ")
        if "─ " not in line:
            continue
        name, depth = branch.split()[0], (len(line) - len(branch)) // 4
        above = [*above[:depth], name]
        drawn[name] = above[-2]
        told = re.search(r"\(exit code (\d+)", line)
        codes[name] = int(told[1]) if told else codes[above[-2]]
    real = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert drawn | {"UnisonoError": "Exception"} == {name: value.__base__.__name__ for name, value in real.items()}
    assert codes == {name: value.exit_code for name, value in real.items()}


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'trian'"):
        unisono.trian  # noqa: B018


def test_type_checkers_and_users_see_the_same_names() -> None:
    source = inspect.getsource(unisono).partition("if TYPE_CHECKING:")[2].partition("_HOMES")[0]
    assert all(name in source for name in PUBLIC | CONSTANTS | MODULES)
    assert typing.TYPE_CHECKING is False


def test_import_is_free() -> None:
    heavy = "torch", "pydantic", "numpy", "pyarrow", "typer"
    asked = f"import sys, unisono; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True).stdout.strip() == "[]"
