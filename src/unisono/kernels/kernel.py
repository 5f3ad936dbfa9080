"""The definition of a kernel: a compiled routine beside its reference, declared once.

Owns the declarations, and how they are found: those of this package's modules, and those that other installed packages
name under the entry point group `unisono.kernels`. The numerics fingerprint and its battery iterate over them, so a
kernel with bits of its own is in both because it is declared.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from unisono.config.offers import load_offer
from unisono.errors import NumericsError

GROUP = "unisono.kernels"
"""Entry points of this group name modules that declare kernels when they are imported, or a Kernel in one."""


class Numbers(Protocol):
    """Makes float32 inputs from integer arithmetic, on the tested device: the same bits everywhere."""

    def __call__(self, *shape: int, seed: int = 1) -> Tensor: ...


def compute_nothing(numbers: Numbers, device: torch.device) -> list[Tensor]:
    """The battery of a kernel whose bits other kernels in the battery already show."""
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A compiled routine and its reference in operations of torch or NumPy.

    name: a name in the fingerprint, if it has bits of its own. compiled: None where there was no compiler. same_bits:
    whether both give the same bits; then which one runs is in neither fingerprint nor battery. state: what decides its
    bits here, for the fingerprint; None: "compiled" or "operations". battery: results on fixed inputs, whichever of
    both would be used on the device, in well under a tenth of a second.
    """

    name: str
    reference: Callable[..., Any]
    compiled: Callable[..., Any] | None
    same_bits: bool
    state: Callable[[], str] | None = None
    battery: Callable[[Numbers, torch.device], list[Tensor]] = compute_nothing

    def describe(self) -> str:
        """The fingerprint's entry for a kernel with bits of its own."""
        if self.state is not None:
            return self.state()
        return "operations" if self.compiled is None else "compiled"


_DECLARED: dict[str, Kernel] = {}


def declare(kernel: Kernel) -> Kernel:
    """Declare a kernel; returns it.

    Raises:
        ValueError: another kernel has this name.
    """
    if _DECLARED.get(kernel.name, kernel) != kernel:
        raise ValueError(f"kernel {kernel.name!r} is declared already. Give this one another name.")
    _DECLARED[kernel.name] = kernel
    return kernel


def declared_kernels() -> tuple[Kernel, ...]:
    """All kernels, those of other packages included, in the order of their names."""
    _import_all()
    return tuple(_DECLARED[name] for name in sorted(_DECLARED))


@cache
def _import_all() -> None:
    """Import all modules that declare kernels: so the fingerprint does not depend on other imports."""
    package = import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            import_module(f"{__package__}.{module.name}")
    points = metadata.entry_points(group=GROUP)
    for name in sorted({point.name for point in points}):
        found = load_offer(points, name, "kernel", NumericsError)
        if not isinstance(found, Kernel | ModuleType):
            raise NumericsError(
                f"kernel {name!r}: the entry point of an installed package names {type(found).__name__} {found!r}; "
                "allowed are a Kernel, or a module that declares some. Repair or uninstall the package."
            )
        if isinstance(found, Kernel):
            try:
                declare(found)
            except ValueError as error:
                raise NumericsError(f"an installed package offers {name!r}: {error}") from error
