"""GELU (Hendrycks and Gimpel, arXiv 1606.08415) that costs little on a CPU.

The derivative is computed beside the value, from the same exponential, and is kept for the backward pass, which then is
one multiplication; torch computes the error function twice, and an exponential. Both loops are compiled into one
(`_elementwise.c`). Its reference here, in NumPy's operations, gives the same bits: it is used without a C compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unisono.kernels.kernel import Kernel, declare

try:
    from unisono.kernels import _elementwise as _compiled
except ImportError:  # no C compiler where unisono was installed
    _compiled = None  # type: ignore[assignment]

Floats = NDArray[np.float32]
_IN_CACHE = 2**15


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
    (_gelu_by_operations if _compiled is None else _gelu)(values, found, slopes)
    return found, slopes


def _gelu(values: Tensor, found: Tensor, slopes: Tensor) -> None:
    _compiled.gelu(values.numel(), values.data_ptr(), found.data_ptr(), slopes.data_ptr())


def _gelu_by_operations(values: Tensor, found: Tensor, slopes: Tensor) -> None:
    given, *targets = (each.view(-1).numpy() for each in (values.detach(), found, slopes))
    for start in range(0, len(given), _IN_CACHE):
        part = slice(start, start + _IN_CACHE)
        _compute_part(given[part], *(target[part] for target in targets))


def _compute_part(x: Floats, found: Floats, slopes: Floats) -> None:
    """The reference of the compiled one, operation by operation."""
    with np.errstate(all="ignore"):
        power = np.maximum(x * x * -0.5, -87.0)
        twos = np.rint(power * 1.44269504)
        rest = power - twos * 0.693359375 + twos * 2.12194440e-4
        series = rest * 1.9875691500e-4
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1):
            series += coefficient
            series *= rest
        series += 5.0000001201e-1
        series *= rest * rest
        series += rest
        series += 1.0
        bell = series * ((twos.astype(np.int32) + 127) << 23).view(np.float32)

        t = 1.0 / (np.abs(x) * 0.231641888 + 1.0)
        tail = t * 0.5307027145
        for coefficient in (-0.7265760135, 0.7107068705, -0.142248368):
            tail += coefficient
            tail *= t
        tail += 0.127414796
        tail *= t
        tail *= bell
        phi = np.where(x < 0, tail, 1.0 - tail)
        np.multiply(x, phi, out=found)
        np.add(x * (bell * 0.398942280), phi, out=slopes)


declare(
    Kernel(name="gelu", compiled=None if _compiled is None else _gelu, reference=_gelu_by_operations, same_bits=True)
)
