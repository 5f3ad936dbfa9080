"""Attention of packed samples on a CPU, compiled: one head of one sample at a time, all of it in the cache.

Queries, keys and values are read in place, so nothing is padded or copied to rectangles; of the scores two numbers a
row are kept, and the backward pass computes the rest again. The products and sums of `_attention.c` are fused as the
processor allows: `attention.py` has the same in torch's operations, which differ from it in rounding. The fingerprint
says which of the two is used.

Shapes: n samples, m tokens of all samples, h heads, w = h · d numbers per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from unisono.kernels.kernel import Numbers
from unisono.kernels.masks import Mask
from unisono.kernels.packing import LANES

try:
    from unisono.kernels import _attention
except ImportError:  # no C compiler where unisono was installed
    _attention = None  # type: ignore[assignment]


def is_compiled() -> bool:
    """Whether there is a compiled attention."""
    return _attention is not None


def takes(projected: Tensor, heads: int) -> bool:
    """Whether it computes attention for such a tensor [m, 3 · w]: it runs in one thread, in float32."""
    return (
        is_compiled()
        and projected.device.type == "cpu"
        and torch.promote_types(projected.dtype, torch.float32) == torch.float32
        and projected.shape[-1] % (3 * heads * LANES) == 0
        and torch.get_num_threads() == 1
    )


def attend(projected: Tensor, lengths: Tensor, heads: int, dropout: float) -> Tensor:
    """As `attention.attend`, for samples of so many tokens (int64 [n]): returns a float32 [m, w]."""
    key = Mask.draw(dropout).key if dropout else 0
    mixed: Tensor = _Fused.apply(projected.float(), lengths, heads, dropout, key)
    return mixed


def try_out(numbers: Numbers, device: torch.device) -> list[Tensor]:
    """Its part of the battery; empty where it would not be used."""
    packed = numbers(21, 48)
    return [attend(packed, torch.tensor([9, 12]), heads=2, dropout=0.0)] if takes(packed, heads=2) else []


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor, lengths: Tensor, heads: int, dropout: float, key: int) -> Tensor:
        projected = projected.contiguous()
        mixed, kept = ATTEND(projected, lengths, heads, dropout, key)
        ctx.save_for_backward(projected, lengths, kept)
        ctx.rest = heads, dropout, key
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        projected, lengths, kept = ctx.saved_tensors
        back = ATTEND_BACKWARD(gradient.contiguous(), projected, lengths, kept, *ctx.rest)
        return back, None, None, None, None


# As operations of torch, they are visible to torch's counters and profilers.
_OPERATIONS = torch.library.Library("unisono", "DEF")
_OPERATIONS.define(
    "attend(Tensor projected, Tensor lengths, int heads, float dropout, int key) -> (Tensor mixed, Tensor kept)"
)
_OPERATIONS.define(
    "attend_backward(Tensor gradient, Tensor projected, Tensor lengths, Tensor kept, int heads, float dropout, int key)"
    " -> Tensor"
)


def _forward(projected: Tensor, lengths: Tensor, heads: int, dropout: float, key: int) -> tuple[Tensor, Tensor]:
    tokens, width = len(projected), projected.shape[1] // 3
    if lengths.dtype != torch.int64 or int(lengths.sum()) != tokens:  # else it would leave its arrays
        raise ValueError(f"lengths: {lengths.dtype}, {lengths.sum()} in all, for {tokens} tokens")
    mixed, kept = projected.new_empty(tokens, width), projected.new_empty(tokens * heads, 2)
    places = (each.data_ptr() for each in (projected, mixed, kept))
    _attention.attend(*_arguments(width, lengths, heads, dropout, key), *places)
    return mixed, kept


def _backward(
    gradient: Tensor, projected: Tensor, lengths: Tensor, kept: Tensor, heads: int, dropout: float, key: int
) -> Tensor:
    back = torch.empty_like(projected)
    places = (each.data_ptr() for each in (projected, kept, gradient, back))
    _attention.attend_backward(*_arguments(gradient.shape[1], lengths, heads, dropout, key), *places)
    return back


def _arguments(width: int, lengths: Tensor, heads: int, dropout: float, key: int) -> tuple[Any, ...]:
    d = width // heads
    mask = Mask(dropout, key)
    return len(lengths), lengths.data_ptr(), heads, d, 1 / math.sqrt(d), key % 2**64, mask.dropped, mask.factor


_OPERATIONS.impl("attend", _forward, "CPU")
_OPERATIONS.impl("attend_backward", _backward, "CPU")
ATTEND, ATTEND_BACKWARD = torch.ops.unisono.attend, torch.ops.unisono.attend_backward
