"""Attention in text encoders: operations across the tokens of a sample.

Owns the choice of an attention kernel per type of device, which decides bits; the mean over a sample's tokens; and how
blocks run one after another. Holds no weights.

Shapes: n samples, m tokens of all samples, w numbers per token; h heads; in a rectangle r rows (heads of samples), t
columns, d numbers per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from unisono.kernels import packed_attention as fused
from unisono.kernels.dropout import Dropout
from unisono.kernels.kernel import Kernel, declare
from unisono.kernels.masks import Mask
from unisono.kernels.packing import Packing, Rectangle

Rectangles = tuple[Rectangle, ...]

# Left to itself, torch picks a kernel by shapes and by its build. Neither of these two keeps
# t × t scores.
_KERNELS = {"cpu": SDPBackend.FLASH_ATTENTION, "cuda": SDPBackend.EFFICIENT_ATTENTION}


def attend(projected: Tensor, packing: Packing, heads: int, *, dropout: float = 0.0) -> Tensor:
    """Attention of every token to its sample's tokens, by scaled dot products (Vaswani et al., arXiv 1706.03762).

    Takes packed floats [m, 3 · w]: queries, keys and values side by side. `dropout` applies to the attention weights.
    Returns a float [m, w]; on CPUs in float32 at least.
    """
    if fused.takes(projected, heads):
        return _attend_packed(projected, packing, heads, dropout)
    return _attend_in_rectangles(projected, packing, heads, dropout)


def _attend_packed(projected: Tensor, packing: Packing, heads: int, dropout: float) -> Tensor:
    return fused.attend(projected, packing.lengths, heads, dropout)


def _attend_in_rectangles(projected: Tensor, packing: Packing, heads: int, dropout: float) -> Tensor:
    device = projected.device.type
    grid = packing.grid(heads)
    cells = grid.spread(projected, 3)
    if device == "cpu":  # the CPU kernel's forward and backward pass take 2.2 times as long in bfloat16
        cells = cells.to(torch.promote_types(cells.dtype, torch.float32))
    with torch.autocast(device, enabled=False):
        if device == "cpu" and dropout:
            mixed: Tensor = _DroppedScores.apply(cells, grid.rectangles, dropout)
        else:
            mixed = _by_torch(cells, grid.rectangles, heads, dropout)
    return grid.gather(mixed)


def attend_once(
    query: Tensor,
    states: Tensor,
    key: nn.Module,
    value: nn.Module,
    packing: Packing,
    heads: int,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """`attend` for one query a sample, [n, w], with the keys and values that two linear layers would make of states
    [m, w]; returns a float [n, w], float32 at least.

    No token's key or value is computed: q · (K x) = (Kᵀ q) · x, and the mean of V x is V times the mean of x. So the
    layers' weights are multiplied by one vector a head and sample, instead of every token.
    """
    grid = packing.grid(1)
    wide = torch.promote_types(query.dtype, torch.float32)
    by_head = grid.sort(query.to(wide)).unflatten(-1, (heads, -1)).transpose(0, 1)  # [h, n, d]
    offer, give = (layer.get_parameter("weight").unflatten(0, (heads, -1)) for layer in (key, value))  # [h, d, w]
    samples = [one.rows for one in grid.rectangles]
    drop = Dropout(dropout)
    sums, means = [], []
    with torch.autocast(query.device.type, enabled=False):
        asked = (by_head @ offer).transpose(0, 1).split(samples)  # [r, h, w] each
        added = (by_head @ key.get_parameter("bias").view(heads, -1, 1)).transpose(0, 1).split(samples)
        cells = _cut(grid.spread(states.to(wide)), grid.rectangles)
        for one, question, constant, rows in zip(grid.rectangles, asked, added, cells, strict=True):
            scores = (question @ rows.transpose(1, 2) + constant) / math.sqrt(by_head.shape[-1])
            if one.absent is not None:
                scores = scores.masked_fill(one.absent, -math.inf)
            weights = drop(scores.softmax(-1))
            sums.append(weights.sum(-1, keepdim=True))
            means.append(weights @ rows)
        mixed = (torch.cat(means).transpose(0, 1) @ give.transpose(1, 2)).transpose(0, 1)  # [n, h, d]
        mixed = mixed + torch.cat(sums) * value.get_parameter("bias").view(heads, -1)
    return grid.unsort(mixed.flatten(1))


def _cut(cells: Tensor, rectangles: Rectangles) -> list[Tensor]:
    """Cells [R, d] in rectangles, [r, t, d] each; those of several parts [parts · R, d] part after part."""
    sizes = [one.rows * one.columns for one in rectangles]
    parts = len(cells) // sum(sizes)
    return [
        part.view(one.rows, one.columns, -1)
        for part, one in zip(cells.split(parts * sizes), parts * rectangles, strict=True)
    ]


def _cut_three(cells: Tensor, rectangles: Rectangles) -> list[tuple[Tensor, ...]]:
    """Query, key and value of each rectangle, of cells [3 · R, d]."""
    parts = _cut(cells, rectangles)
    each = len(rectangles)
    return list(zip(parts[:each], parts[each : 2 * each], parts[2 * each :], strict=True))


def _by_torch(cells: Tensor, rectangles: Rectangles, heads: int, dropout: float) -> Tensor:
    """torch's own kernels, which keep no scores."""
    mixed = []
    with sdpa_kernel(_KERNELS.get(cells.device.type, SDPBackend.MATH)):
        for one, parts in zip(rectangles, _cut_three(cells, rectangles), strict=True):
            asked, offered, given = (part.unflatten(0, (-1, heads)) for part in parts)
            present = None if one.absent is None else ~one.absent.unflatten(0, (-1, heads))[:, :1]
            found = F.scaled_dot_product_attention(asked, offered, given, attn_mask=present, dropout_p=dropout)
            mixed.append(found.reshape(-1, cells.shape[-1]))
    return torch.cat(mixed)


class _DroppedScores(torch.autograd.Function):
    """Attention with dropout on a CPU by torch's operations. Torch has no fused kernel for it: its plain one takes 2.7
    times as long.

    Between two products, scores are worked on in place, and a rectangle's stay in the cache. Of their size, only the
    softmax is kept; masks are drawn again.
    """

    @staticmethod
    def forward(ctx: Any, cells: Tensor, rectangles: Rectangles, dropout: float) -> Tensor:
        mixed, kept = cells.new_empty(len(cells) // 3, cells.shape[-1]), []
        scale, mask = 1 / math.sqrt(cells.shape[-1]), Mask.draw(dropout)
        ctx.rectangles, ctx.scale, ctx.mask = rectangles, scale, mask
        parts = zip(rectangles, _cut_three(cells, rectangles), _cut(mixed, rectangles), strict=True)
        for one, (asked, offered, given), target in parts:
            scores = cells.new_empty(one.rows, one.columns, one.columns)
            if one.absent is None:
                torch.baddbmm(scores, asked, offered.transpose(1, 2), beta=0, alpha=scale, out=scores)
            else:
                absent = cells.new_zeros(one.absent.shape).masked_fill_(one.absent, -math.inf)
                torch.baddbmm(absent, asked, offered.transpose(1, 2), alpha=scale, out=scores)
            weights = torch.softmax(scores, -1)
            torch.bmm(mask.drop(weights, out=scores), given, out=target)
            mask = mask.after(weights.numel())
            kept.append(weights)
        ctx.save_for_backward(cells, *kept)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cells, *kept = ctx.saved_tensors
        back, mask = torch.empty_like(cells), ctx.mask
        parts = [_cut_three(each, ctx.rectangles) for each in (cells, back)]
        dues = _cut(gradient.contiguous(), ctx.rectangles)
        for weights, due, (asked, offered, given), (to_query, to_key, to_value) in zip(kept, dues, *parts, strict=True):
            dropped = mask.drop(weights)
            torch.bmm(dropped.transpose(1, 2), due, out=to_value)
            scores = torch.bmm(due, given.transpose(1, 2), out=dropped)
            mask.drop(scores, out=scores)
            mask = mask.after(weights.numel())
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            torch.baddbmm(to_query, scores, offered, beta=0, alpha=ctx.scale, out=to_query)
            torch.baddbmm(to_key, scores.transpose(1, 2), asked, beta=0, alpha=ctx.scale, out=to_key)
        return back, None, None


def run_blocks(blocks: Iterable[Callable[..., Tensor]], states: Tensor, packing: Packing, *, recompute: bool) -> Tensor:
    """Send the packed states [m, w] through the blocks; with `recompute`, keep only their inputs for backward.

    A block that is computed again draws the same dropout, so the gradient has the same bits either way.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            states = checkpoint(block, states, packing, use_reentrant=False, preserve_rng_state=True)
        else:
            states = block(states, packing)
    return states


def mean_over_tokens(states: Tensor, packing: Packing) -> Tensor:
    """Average each sample's packed states [m, w], in float32 at least; returns [n, w]."""
    precise = states.to(torch.promote_types(states.dtype, torch.float32))
    return torch.segment_reduce(precise, "mean", lengths=packing.lengths, axis=0, unsafe=True)


declare(
    Kernel(
        name="packed_attention",
        compiled=_attend_packed if fused.is_compiled() else None,
        reference=_attend_in_rectangles,
        same_bits=False,
        battery=fused.try_out,
    )
)
