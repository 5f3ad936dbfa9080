"""The list of backends: those of this package, those of installed packages, those that a program registers.

Owns the names. A backend's module, and its framework, is imported when a task names it.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import cast

from unisono.backends.backend import Backend
from unisono.config.offers import load_offer
from unisono.errors import ContractError

ENTRY_POINTS = "unisono.backends"
"""Group of entry points in which a package names its backend: `name = "package.module:Class"`."""
COME_ALONG = {"torch": "unisono.backends.torch_backend:TorchBackend"}
"""Name → module and class."""
_registered: dict[str, type[Backend]] = {}


def register_backend(backend: type[Backend]) -> None:
    """Make this class available by its `name` to tasks of this process, and of those forked from it.

    Raises:
        ContractError: another backend has that name.
    """
    name = backend.name
    if name in COME_ALONG or _registered.get(name, backend) is not backend:
        raise ContractError(
            f"backend {name!r}: another one has this name; allowed is a new one. Change {backend.__name__}.name."
        )
    _registered[name] = backend


def find_backend(name: str) -> type[Backend]:
    """The class that `Task.backend` names.

    Raises:
        ContractError: there is none of that name.
    """
    if name in _registered:
        return _registered[name]
    if name in COME_ALONG:
        module, _, attribute = COME_ALONG[name].partition(":")
        built_in: type[Backend] = getattr(import_module(module), attribute)
        return built_in
    points = metadata.entry_points(group=ENTRY_POINTS)
    if name not in [point.name for point in points]:
        raise ContractError(
            f"the task's backend is {name!r}; there are {', '.join(map(repr, list_backends()))}. Choose one of them, "
            f"install a package that has an entry point of that name in the group {ENTRY_POINTS!r}, or call "
            "unisono.backends.backend_registry.register_backend first."
        )
    return cast("type[Backend]", load_offer(points, name, "backend", ContractError))


def list_backends() -> list[str]:
    """Every name that `find_backend` knows."""
    points = metadata.entry_points(group=ENTRY_POINTS)
    return sorted({*COME_ALONG, *_registered, *(point.name for point in points)})
