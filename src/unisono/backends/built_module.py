"""A torch module as a task has built it, kept so that a caller's own module is returned unchanged.

Owns the list of what a backend changes in a module.
"""

from __future__ import annotations

from torch import Tensor, nn


class BuiltModule:
    """The tensors of a module as a task has built it. A replica moves a module into memory of its own, and trains it;
    after `restore`, a task that keeps the module has it as it was built."""

    @staticmethod
    def of(model: object) -> list[BuiltModule]:
        """What is restored of a model, for any backend."""
        return [BuiltModule(model)] if isinstance(model, nn.Module) else []

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [(parameter, parameter.data, parameter.grad) for parameter in module.parameters()]
        self._buffers: list[tuple[nn.Module, str, Tensor | None]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        for part in module.modules():
            self._buffers += [(part, name, value) for name, value in part._buffers.items()]
            self._modes.append((part, part.training))

    def restore(self) -> None:
        """Give the module its own tensors again, with their values."""
        for parameter, value, gradient in self._parameters:
            parameter.data, parameter.grad = value, gradient
        for part, name, buffer in self._buffers:
            part._buffers[name] = buffer
        for part, training in self._modes:
            part.training = training
