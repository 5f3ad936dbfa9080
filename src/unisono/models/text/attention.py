"""How text encoders look from token to token.

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

from unisono.models.text.dropout import Dropout, draw_mask
from unisono.models.text.packing import Packing, Rectangle

Rectangles = tuple[Rectangle, ...]

# Left to itself, torch picks a kernel by shapes and by what it was compiled with. Neither of these two keeps
# t × t scores.
_KERNELS = {"cpu": SDPBackend.FLASH_ATTENTION, "cuda": SDPBackend.EFFICIENT_ATTENTION}


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, heads: int, *, dropout: float = 0.0) -> Tensor:
    """Let every token attend to its sample's tokens, by scaled dot products (Vaswani et al., arXiv 1706.03762).

    Takes packed floats [m, w]. `dropout` falls on the attention weights. Returns a float [m, w]; on CPUs in float32 at
    least.
    """
    device = query.device.type
    parts = [query, key, value]
    if device == "cpu":  # the CPU kernel's forward and backward pass take 2.2 times as long in bfloat16
        parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    grid = packing.grid(heads)
    query, key, value = map(grid.spread, parts)
    with torch.autocast(device, enabled=False):
        if device == "cpu" and dropout:
            mixed: Tensor = _Dropped.apply(query, key, value, grid.rectangles, dropout)
        else:
            mixed = _fused(query, key, value, grid.rectangles, heads, dropout)
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
    layers' weights meet one vector a head and sample, instead of every token.
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
    """Cells [R, d] in rectangles, [r, t, d] each."""
    parts = cells.split([one.rows * one.longest for one in rectangles])
    return [part.view(one.rows, one.longest, -1) for part, one in zip(parts, rectangles, strict=True)]


def _fused(query: Tensor, key: Tensor, value: Tensor, rectangles: Rectangles, heads: int, dropout: float) -> Tensor:
    """torch's own kernels, which keep no scores."""
    mixed = []
    with sdpa_kernel(_KERNELS.get(query.device.type, SDPBackend.MATH)):
        for one, *parts in zip(rectangles, *(_cut(cells, rectangles) for cells in (query, key, value)), strict=True):
            asked, offered, given = (part.unflatten(0, (-1, heads)) for part in parts)
            present = None if one.absent is None else ~one.absent.unflatten(0, (-1, heads))[:, :1]
            found = F.scaled_dot_product_attention(asked, offered, given, attn_mask=present, dropout_p=dropout)
            mixed.append(found.reshape(-1, query.shape[-1]))
    return torch.cat(mixed)


class _Dropped(torch.autograd.Function):
    """Attention with dropout on a CPU, for which torch has no fused kernel: its plain one takes 2.7 times as long.

    Between two products, scores are worked on in place, and a rectangle's stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rectangles: Rectangles, dropout: float) -> Tensor:
        mixed, kept = torch.empty_like(query), []
        scale = 1 / math.sqrt(query.shape[-1])
        parts = (_cut(cells, rectangles) for cells in (query, key, value, mixed))
        for one, asked, offered, given, target in zip(rectangles, *parts, strict=True):
            scores = query.new_empty(one.rows, one.longest, one.longest)
            if one.absent is None:
                torch.baddbmm(scores, asked, offered.transpose(1, 2), beta=0, alpha=scale, out=scores)
            else:
                absent = query.new_zeros(one.absent.shape).masked_fill_(one.absent, -math.inf)
                torch.baddbmm(absent, asked, offered.transpose(1, 2), alpha=scale, out=scores)
            weights = torch.softmax(scores, -1)
            mask = draw_mask(weights.shape, dropout, weights.dtype)
            torch.bmm(torch.mul(weights, mask, out=scores), given, out=target)
            kept += [weights, mask]
        ctx.rectangles, ctx.scale = rectangles, scale
        ctx.save_for_backward(query, key, value, *kept)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        back = [torch.empty_like(cells) for cells in (query, key, value)]
        cells = (gradient.contiguous(), query, key, value, *back)
        parts = (_cut(each, ctx.rectangles) for each in cells)
        for weights, mask, due, asked, offered, given, to_query, to_key, to_value in zip(
            kept[::2], kept[1::2], *parts, strict=True
        ):
            dropped = weights * mask
            torch.bmm(dropped.transpose(1, 2), due, out=to_value)
            scores = torch.bmm(due, given.transpose(1, 2), out=dropped).mul_(mask)
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            torch.baddbmm(to_query, scores, offered, beta=0, alpha=ctx.scale, out=to_query)
            torch.baddbmm(to_key, scores.transpose(1, 2), asked, beta=0, alpha=ctx.scale, out=to_key)
        return *back, None, None


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
