"""GELU (Hendrycks and Gimpel, arXiv 1606.08415) that costs little on a CPU.

The derivative is computed beside the value, from the same exponential, and is what is kept for the backward pass, which
then is one multiplication; torch computes the error function twice, and an exponential. Both walks are compiled in one
(`_kernels.c`), which has a twin here of torch's operations that gives the same bits: where there was no C compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    from unisono.models.text import _kernels
except ImportError:  # no C compiler where unisono was installed
    _kernels = None  # type: ignore[assignment]

_IN_CACHE = 2**16


class Gelu(nn.GELU):
    """As nn.GELU, exact; in float32 on CPUs to an absolute error of 1e-6."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        found: Tensor = _Gelu.apply(input)
        return found


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        found, slopes = gelu(input)
        ctx.save_for_backward(slopes)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (slopes,) = ctx.saved_tensors
        return gradient * slopes


def gelu(values: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of CPU float32 numbers, and its derivative there."""
    values = values.contiguous()
    found, slopes = torch.empty_like(values), torch.empty_like(values)
    if _kernels is None:
        parts = (each.view(-1).split(_IN_CACHE) for each in (values, found, slopes))
        for part, *targets in zip(*parts, strict=True):
            for target, made in zip(targets, _gelu_of_operations(part), strict=True):
                target.copy_(made)
        return found, slopes
    _kernels.gelu(values.numel(), values.data_ptr(), found.data_ptr(), slopes.data_ptr())
    return found, slopes


def _gelu_of_operations(x: Tensor) -> tuple[Tensor, Tensor]:
    """The compiled one, operation by operation."""
    power = (x * x).mul_(-0.5).clamp_(min=-87.0)
    twos = (power * 1.44269504).round_()
    rest = power.sub_(twos * 0.693359375).add_(twos * 2.12194440e-4)
    series = rest * 1.9875691500e-4
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1):
        series.add_(coefficient).mul_(rest)
    bell = series.add_(5.0000001201e-1).mul_(rest * rest).add_(rest).add_(1.0)
    bell.mul_(twos.int().add_(127).bitwise_left_shift_(23).view(torch.float32))

    t = x.abs().mul_(0.231641888).add_(1.0).reciprocal_()
    tail = t * 0.5307027145
    for coefficient in (-0.7265760135, 0.7107068705, -0.142248368):
        tail.add_(coefficient).mul_(t)
    tail.add_(0.127414796).mul_(t).mul_(bell)
    phi = torch.where(x < 0, tail, 1.0 - tail)
    return x * phi, bell.mul_(0.398942280).mul_(x).add_(phi)
