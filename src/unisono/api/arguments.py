"""The kinds of arguments that a Python user passes: each is checked before anything is done with it.

Owns the messages: what was given, what is allowed, what to do. What a value means is checked where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.errors import RecipeError, RunFolderError
from unisono.runtime.launchers.launcher import AUTO, read_workers


def as_path(name: str, given: object) -> Path:
    """A path, from text or any os.PathLike.

    Raises:
        RunFolderError: it is of another kind.
    """
    if isinstance(given, str | os.PathLike):
        return Path(given)
    hint = " Give its .folder." if hasattr(given, "folder") else ""
    raise RunFolderError(f"{name} is {_kind(given)}; allowed is a path, as a text or a pathlib.Path.{hint}")


def as_texts(name: str, option: str, given: object, example: str) -> tuple[str, ...]:
    """Texts, from a list or a tuple of them.

    Raises:
        RecipeError: it is of another kind; one text is not a list of texts.
    """
    if isinstance(given, list | tuple) and all(isinstance(one, str) for one in given):
        return tuple(given)
    raise RecipeError(f"{name} ({option}) is {given!r}; allowed is a list of texts, such as [{example!r}].")


def as_recipe(what: object, overrides: object, caller: str) -> Recipe:
    """A recipe, from itself or its path; overrides are for a path only.

    Raises:
        RecipeError: it is of another kind, or has overrides that would have no effect.
    """
    texts = as_texts("overrides", "--set", overrides, "train.epochs=3")
    if isinstance(what, str | os.PathLike):
        return recipes.load(Path(what), texts)
    if not isinstance(what, Recipe):
        raise RecipeError(f"{caller}({_kind(what)}, …): allowed are a Recipe, or the path of one.")
    refuse_overrides(texts, "a Recipe")
    return what


def refuse_overrides(overrides: Sequence[str], what: str) -> None:
    """Refuse overrides of what is read from no file: they would have no effect.

    Raises:
        RecipeError: there are some.
    """
    if overrides:
        raise RecipeError(
            f"overrides = {list(overrides)}: they are for the path of a recipe, and {what} was given. Give settings as "
            "keywords, such as epochs=3, or tables, such as evaluate={…}."
        )


def as_counts(given: object) -> list[int]:
    """Numbers of workers to compare, at least two different ones.

    Raises:
        RecipeError: there are fewer, or one is no number.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise RecipeError(f"verify, workers = {given!r}: allowed is a list of numbers, such as [1, 2, 3].")
    counts = [read_workers(one) for one in given]
    if len(set(counts)) < 2:
        raise RecipeError(f"verify, workers = {counts}: there is nothing to compare. Give two numbers at least.")
    return counts


def count_or_auto(workers: object) -> int | None:
    """A number of workers; None for "auto"."""
    return None if workers == AUTO else read_workers(workers)


def _kind(given: Any) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
