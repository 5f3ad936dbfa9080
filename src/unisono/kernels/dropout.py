"""Dropout that costs little on a CPU: masks are drawn with a few operations a number (`masks.py`), and again in the
backward pass instead of being kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unisono.kernels.masks import Mask


class Dropout(nn.Dropout):
    """As nn.Dropout; on CPUs `p` is rounded to a multiple of 2^-16, and the remaining numbers are scaled by exactly
    that."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop numbers of `input`, while training."""
        if not self._draws(input):
            return super().forward(input)
        dropped: Tensor = _Dropped.apply(input, None, self.p)
        return dropped

    def add(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return `residual` plus the dropped `input`, in the wider dtype of the two."""
        if not self._draws(input):
            return residual + super().forward(input)
        added: Tensor = _Dropped.apply(input, residual, self.p)
        return added

    def _draws(self, input: Tensor) -> bool:
        return self.training and 0.0 < self.p < 1.0 and input.device.type == "cpu"


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, rate: float) -> Tensor:
        ctx.mask, ctx.dtype = Mask.draw(rate), input.dtype
        if residual is None:
            return _as(ctx.mask.drop(_wide(input)), input.dtype)
        ctx.residual = residual.dtype
        wide = torch.promote_types(input.dtype, residual.dtype)
        return _as(ctx.mask.drop(_wide(_as(input, wide)), added=_wide(_as(residual, wide))), wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        wants_input, wants_residual, _ = ctx.needs_input_grad
        dropped = _as(ctx.mask.drop(_wide(gradient)), ctx.dtype) if wants_input else None
        return dropped, _as(gradient, ctx.residual) if wants_residual else None, None


def _wide(values: Tensor) -> Tensor:
    return _as(values, torch.promote_types(values.dtype, torch.float32))


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    """As values.to(dtype), which takes ten times as long when there is nothing to do."""
    return values if values.dtype == dtype else values.to(dtype)
