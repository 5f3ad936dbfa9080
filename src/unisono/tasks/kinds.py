"""Kinds of tasks: how the name in a recipe becomes a task with its samples, and a run folder a trained model.

`[task] kind` names a preset, a task of an installed package (entry point `unisono.tasks`), or `module:Class`. Owns the
look-up and the check of a task's own keys. A run folder never decides which code is imported: a name in it finds only
presets and tasks of installed packages.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from unisono.config.offers import load_offer
from unisono.config.recipe import Recipe, check_uses, unused_tables
from unisono.config.sections import TEXT
from unisono.errors import ModelError, RecipeError
from unisono.tasks import table_model
from unisono.tasks.own_inputs import open_own, open_tables
from unisono.tasks.run_inputs import RunInputs
from unisono.tasks.task import Task, arguments_of
from unisono.tasks.trained_model import MeasureModel, TrainedModel

GROUP = "unisono.tasks"
PRESETS = {TEXT: "unisono.tasks.text.text_inputs:KIND"}

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskKind:
    """A kind of task that prepares its own data.

    task: its class, for messages.
    open: (recipe, workers, notify, frames by split) → the run's inputs.
    load: (model folder, recipe, facts of unisono.json, measure_model) → the trained model.
    warm: imports what every worker needs, before workers are forked.
    uses: tables of the recipe ("screen"), and keys ("train.label_smoothing"), that only some tasks use, and this one
        does.
    check: refuses keys of [task] that the task does not have, without its data.
    """

    task: type[Task]
    open: Callable[[Recipe, int, Notify, Mapping[str, object]], RunInputs]
    load: Callable[[Path, Recipe, Mapping[str, Any], MeasureModel], TrainedModel]
    warm: Callable[[], None]
    uses: frozenset[str]
    check: Callable[[Recipe], object] = lambda recipe: None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenKind:
    """Opens a recipe's inputs in a worker: a function that can be sent. frames: instead of its files."""

    recipe: Recipe
    frames: Mapping[str, object]

    def __call__(self, workers: int, notify: Notify) -> RunInputs:
        return find_kind(self.recipe.task.kind).open(self.recipe, workers, notify, self.frames)


def find_kind(name: str, *, trusted: bool = True) -> TaskKind:
    """Find a kind of task by its name.

    Args:
        trusted: the name comes from the user, who may name any class; false: it comes from a file of a run.

    Raises:
        RecipeError, ModelError: there is no class of this name, it is no task, or it cannot be imported.
    """
    found = _installed()
    if name in PRESETS:
        return _as_kind(_import(PRESETS[name]), name)
    if name in found:
        return _as_kind(load_offer(entry_points(group=GROUP), name, "'task.kind'", RecipeError), name)
    if not trusted:
        raise ModelError(
            f"the model was trained with the task {name!r}, which is no preset and of no installed package. "
            f"A run folder does not decide which code is imported: name the class: --task {name}, or load(run, task=…)."
        )
    if ":" in name:
        return _as_kind(_import(name), name)
    known = [*PRESETS, *found]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"'task.kind' = {name!r}: allowed are {', '.join(known)}, or module:Class.{guess}")


def named_kind(task: object) -> TaskKind:
    """The kind that a user names: the class of a task, or its name.

    Raises:
        RecipeError: it is neither; or as `find_kind`.
    """
    if isinstance(task, type) and issubclass(task, Task):
        return kind_of(task)
    if isinstance(task, str) and task:
        return find_kind(task)
    given, hint = repr(task), ""
    if isinstance(task, Task):
        given, hint = f"an object of {type(task).__name__}", f" Give the class: task={type(task).__name__}."
    raise RecipeError(f"task (--task) is {given}; allowed is a subclass of unisono.Task, or its module:Class.{hint}")


def name_of(task: Task) -> str:
    """The name by which a task's class is found again."""
    kind = type(task)
    for name, point in _installed().items():
        if point.value == f"{kind.__module__}:{kind.__qualname__}":
            return name
    return f"{kind.__module__}:{kind.__qualname__}"


def kind_of(task: type[Task]) -> TaskKind:
    """The kind of a class that has no data preparation of its own: samples come from tables, or from Python."""

    def open_(recipe: Recipe, workers: int, notify: Notify, frames: Mapping[str, object]) -> RunInputs:
        made = make_task(task, recipe)
        given: dict[str, Any] = dict(frames)
        return open_own(recipe, made, **given, notify=notify) if given else open_tables(recipe, made, notify)

    def load(folder: Path, recipe: Recipe, facts: Mapping[str, Any], measure_model: MeasureModel) -> TrainedModel:
        return table_model.load(folder, recipe, make_task(task, recipe), measure_model)

    return TaskKind(
        task=task, open=open_, load=load, warm=lambda: None, uses=frozenset(), check=partial(settings_of, task)
    )


def check_task(recipe: Recipe) -> list[str]:
    """Check a recipe's tables, and its keys in [task], against the task; return the tables that have no effect on it.

    Raises:
        RecipeError: there is no such task, or it does not have one of them.
    """
    kind = find_kind(recipe.task.kind)
    check_uses(recipe, kind.uses, recipe.task.kind)
    kind.check(recipe)
    return unused_tables(kind.uses)


def make_task(task: type[Task], recipe: Recipe) -> Task:
    """A task from its own keys in a recipe. Raises RecipeError, as `settings_of`."""
    return task(**settings_of(task, recipe))


def settings_of(task: type[Task], recipe: Recipe) -> dict[str, Any]:
    """The arguments of a task's constructor, from its own keys in a recipe.

    Raises:
        RecipeError: a key is unknown, missing, or of a wrong type.
    """
    parameters = arguments_of(task)
    fields: dict[str, Any] = {
        name: (
            Any if isinstance(parameter.annotation, str) or parameter.annotation is parameter.empty
            else parameter.annotation,
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for name, parameter in parameters.items()
    }  # fmt: skip
    settings = recipe.task.settings
    if unknown := [name for name in settings if name not in fields]:
        near = difflib.get_close_matches(unknown[0], list(fields), n=1, cutoff=0.5)
        known = ", ".join(f"task.{name}" for name in fields) or "none"
        guess = f"Did you mean 'task.{near[0]}'?" if near else f"The task {task.__name__} has: {known}."
        raise RecipeError(f"'task.{unknown[0]}': no such key. {guess}")
    checked = create_model("Settings", __config__=ConfigDict(arbitrary_types_allowed=True), **fields)
    try:
        values = checked(**settings)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(["task", *map(str, fault["loc"])])
        raise RecipeError(f"{key!r}: {fault['msg'][:1].lower()}{fault['msg'][1:]} (task {task.__name__}).") from None
    return {name: getattr(values, name) for name in fields}


def _as_kind(found: object, name: str) -> TaskKind:
    if isinstance(found, TaskKind):
        return found
    if isinstance(found, type) and issubclass(found, Task):
        return kind_of(found)
    raise RecipeError(
        f"'task.kind' = {name!r} is {type(found).__name__} {getattr(found, '__name__', '')!r}; allowed is a subclass "
        "of unisono.Task."
    )


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _import(name: str) -> object:
    """The class that `module:Class` or `file.py:Class` names. Modules in the current folder are found as well."""
    module_name, _, path = name.rpartition(":")
    if not module_name or not path:
        raise RecipeError(f"'task.kind' = {name!r}: allowed is module:Class, or path/to/file.py:Class.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found: object = (
            _run_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
        )
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise RecipeError(
                f"'task.kind' = {name!r}: there is no module {module_name!r}. Start where it can be imported, or give "
                "the file: --task path/to/file.py:Class."
            ) from None
        raise
    for part in path.split("."):
        if not hasattr(found, part):
            raise RecipeError(f"'task.kind' = {name!r}: {module_name!r} has no {path!r}. Name a class in it.")
        found = getattr(found, part)
    return found


def _run_file(path: Path) -> ModuleType:
    """Import a file under the name of its stem, once."""
    if not path.is_file():
        raise RecipeError(f"--task {path} (task.kind): no such file. Give path/to/file.py:Class.")
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
