"""Linear layers: several as one product, and in bfloat16 fast where the processor is not.

Owns how products of bfloat16 numbers are computed on a CPU without instructions for them: torch takes ten to forty
times as long for them as in float32, so numbers are rounded and multiplied in float32. A product of two bfloat16
numbers is exact in float32, and sums are float32 as in the native kernels; results and gradients stay float32, so
they are not less precise than those.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bfloat16 numbers."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Linear(nn.Linear):
    """As nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """Return float [m, outputs] of float [m, inputs]; under autocast to bfloat16 that, or float32 where numbers are
        rounded."""
        return _multiply(input, self.weight, self.bias)


def project(input: Tensor, *layers: nn.Module) -> Tensor:
    """What several linear layers make of `input`, side by side, as one product."""
    weights = torch.cat([layer.get_parameter("weight") for layer in layers])
    return _multiply(input, weights, torch.cat([layer.get_parameter("bias") for layer in layers]))


def _multiply(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if (
        input.device.type != "cpu"
        or not torch.is_autocast_enabled("cpu")
        or torch.get_autocast_dtype("cpu") != torch.bfloat16
        or multiplies_bf16()
    ):
        return F.linear(input, weight, bias)
    product: Tensor = _Rounded.apply(input, weight, bias)
    return product


class _Rounded(torch.autograd.Function):
    """The product of numbers rounded to bfloat16, which are what is kept for backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rounded = [value.bfloat16() for value in (input, weight, bias)]
        ctx.save_for_backward(*rounded[:2])
        ctx.dtype = input.dtype
        with torch.autocast("cpu", enabled=False):
            return F.linear(*(value.float() for value in rounded))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rounded, weight = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        back = (gradient @ weight.float()).to(ctx.dtype) if wants_input else None
        outer = gradient.t() @ rounded.float() if wants_weight else None
        return back, outer, gradient.sum(0) if wants_bias else None
