"""What other installed packages offer under a name: their entry points.

Owns the look-up, and the message about a package that is broken. Each group is owned by the module that asks.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint

from unisono.errors import UserError


def load_offer(points: Iterable[EntryPoint], name: str, kind: str, fault: type[UserError]) -> object:
    """Import what the entry point `name` of these names. kind: in words, "logger".

    Raises:
        fault: two packages offer that name, or the package cannot be imported, whatever it raises.
    """
    point = choose_offer(points, name, kind, fault)
    try:
        return point.load()
    except Exception as error:
        raise fault(
            f"{kind} {name!r}: {_describe(point)} cannot be used: {type(error).__name__}: {error}. Repair or uninstall "
            "the package, or install it again."
        ) from error


def choose_offer(points: Iterable[EntryPoint], name: str, kind: str, fault: type[UserError]) -> EntryPoint:
    """The entry point of this name.

    Raises:
        fault: two packages offer it.
    """
    found = {point.value: point for point in points if point.name == name}  # a package may be found in two places
    if len(found) > 1:
        told = " and ".join(map(_describe, found.values()))
        raise fault(f"{kind} {name!r}: offered by {told}; allowed is one. Uninstall the others.")
    return next(iter(found.values()))


def _describe(point: EntryPoint) -> str:
    package = f"the installed package {point.dist.name!r}" if point.dist is not None else "an installed package"
    return f"{package} ({point.value})"
