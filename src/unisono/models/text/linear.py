"""Linear layers that are fast in bfloat16 where the processor is not.

Owns how products of bfloat16 numbers are computed on a CPU without instructions for them: torch takes about ten times
as long for them as in float32, so rounded numbers are multiplied in float32. A product of two bfloat16 numbers is exact
in float32, and sums are float32 as in the native kernels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bfloat16 numbers."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Linear(nn.Linear):
    """As nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """Return float [m, outputs] of float [m, inputs]; bfloat16 under autocast to it."""
        if (
            input.device.type != "cpu"
            or not torch.is_autocast_enabled("cpu")
            or torch.get_autocast_dtype("cpu") != torch.bfloat16
            or multiplies_bf16()
        ):
            return super().forward(input)
        return _Rounded.apply(input, self.weight, self.bias)


class _Rounded(torch.autograd.Function):
    """The layer's product, of numbers rounded to bfloat16. What is kept for backward is bfloat16."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rounded = input.bfloat16()
        ctx.save_for_backward(rounded, weight)
        ctx.dtype = input.dtype
        with torch.autocast("cpu", enabled=False):
            return F.linear(rounded.float(), weight.bfloat16().float(), bias.bfloat16().float()).bfloat16()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rounded, weight = ctx.saved_tensors
        gradient = gradient.float()
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        back = (gradient @ weight.bfloat16().float()).bfloat16().to(ctx.dtype) if wants_input else None
        outer = gradient.t() @ rounded.float() if wants_weight else None
        return back, outer, gradient.sum(0) if wants_bias else None
