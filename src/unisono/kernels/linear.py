"""Linear layers: several as one product, and fast in bfloat16 on processors without bfloat16 instructions.

Owns how products of bfloat16 numbers are computed on a CPU without instructions for them: torch takes ten to forty
times as long for them as in float32, so numbers are rounded and multiplied in float32. A product of two bfloat16
numbers is exact in float32, and sums are float32 as in the native kernels; results and gradients stay float32, so
they are not less precise than those.

Also owns which weight gradients may be offloaded: no other gradient needs them, so a pass can go on without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unisono.determinism import instruction_sets
from unisono.kernels.kernel import Kernel, declare


@cache
def multiplies_bf16() -> bool:
    """Whether this process may use instructions for products of bfloat16 numbers, and the processor has them."""
    if instruction_sets.limited():
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


Ask = Callable[[Sequence[Tensor], Tensor, Tensor], bool]
"""Offers a gradient to other workers: (weights, gradient [m, outputs], input [m, inputs]) → whether one computes it."""
LARGE = 2**26
"""Number of multiplications from which a layer's weight gradient may be offloaded."""
_ask: Ask | None = None


@contextmanager
def assisted(ask: Ask) -> Iterator[None]:
    """Within, large layers offer their weights' gradients first, and compute themselves those that no worker takes: an
    offloaded gradient is not among those that autograd finds. A layer is used once in a pass, or twice: more than two
    gradients would not add up in autograd's order."""
    global _ask
    _ask = ask
    try:
        yield
    finally:
        _ask = None


class Linear(nn.Linear):
    """As nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        """Return float [m, outputs] of float [m, inputs]; under autocast bfloat16, or float32 where numbers are
        rounded."""
        return _multiply(input, self.weight, self.bias, (self.weight,))


def project(input: Tensor, *layers: nn.Module) -> Tensor:
    """The outputs of several linear layers for `input`, side by side, as one product."""
    weights = tuple(layer.get_parameter("weight") for layer in layers)
    biases = torch.cat([layer.get_parameter("bias") for layer in layers])
    return _multiply(input, torch.cat(weights), biases, weights)


def _multiply(input: Tensor, weight: Tensor, bias: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """weights: the parts of `weight`, one below the other."""
    on_cpu, autocast = input.device.type == "cpu", torch.is_autocast_enabled("cpu")
    rounds = on_cpu and autocast and torch.get_autocast_dtype("cpu") == torch.bfloat16 and not multiplies_bf16()
    # for one worker, too: so all workers use the same operation
    large = on_cpu and not autocast and input.dtype == torch.float32 and input.numel() * len(weight) >= LARGE
    if not rounds and not large:
        return F.linear(input, weight, bias)
    product: Tensor = _Product.apply(input, weight, bias, weights, rounds)
    return product


class _Product(torch.autograd.Function):
    """The product of float32 numbers, or of numbers rounded to bfloat16; the rounded ones are then kept for
    backward."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, weights: tuple[Tensor, ...], rounds: bool
    ) -> Tensor:
        ctx.dtype, ctx.weights = input.dtype, weights
        if not rounds:
            ctx.save_for_backward(input, weight)
            return F.linear(input, weight, bias)
        rounded = [value.bfloat16() for value in (input, weight, bias)]
        ctx.save_for_backward(*rounded[:2])
        with torch.autocast("cpu", enabled=False):
            return F.linear(*(value.float() for value in rounded))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        wants_input, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        outer = None
        if wants_weight:
            input = input.detach().float()  # it may be multiplied after the pass
            large = gradient.numel() * input.shape[1] >= LARGE
            if not large or _ask is None or not _ask(ctx.weights, gradient, input):
                outer = gradient.t() @ input
        back = (gradient @ weight.float()).to(ctx.dtype) if wants_input else None
        return back, outer, gradient.sum(0) if wants_bias else None, None, None


declare(  # both are in the battery without it: they are made of torch's products
    Kernel(
        name="bf16_products",
        compiled=F.linear,
        reference=_Product.apply,
        same_bits=False,
        state=lambda: "native" if multiplies_bf16() else "rounded, in float32",
    )
)
