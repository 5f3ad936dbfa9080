"""How text encoders look from token to token.

Owns the choice of an attention kernel per type of device, which decides bits; the mean over a sample's tokens; and how
blocks run one after another. Holds no weights.

Shapes: n samples, m tokens of all samples, t tokens of the longest, w numbers per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from unisono.models.text.dropout import draw_mask
from unisono.models.text.packing import Packing

# Left to itself, torch picks a kernel by shapes and by what it was compiled with. Neither of these two keeps
# t × t scores.
_KERNELS = {"cpu": SDPBackend.FLASH_ATTENTION, "cuda": SDPBackend.EFFICIENT_ATTENTION}


def attend(query: Tensor, key: Tensor, value: Tensor, packing: Packing, heads: int, *, dropout: float = 0.0) -> Tensor:
    """Let every token attend to its sample's tokens, by scaled dot products (Vaswani et al., arXiv 1706.03762).

    Takes packed floats: key and value [m, w], query [m, w], or [n, w] for one query a sample. `dropout` falls on the
    attention weights. Returns a float of the query's shape; on CPUs in float32 at least.
    """
    device = query.device.type
    single = len(query) == len(packing.lengths) != len(key)
    parts = [query, key, value]
    if device == "cpu":  # the CPU kernel's forward and backward pass take 2.2 times as long in bfloat16
        parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    asked = parts[0].unsqueeze(1) if single else packing.spread(parts[0])
    spread = (asked, packing.spread(parts[1]), packing.spread(parts[2]))
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in spread)
    absent = packing.absent
    with torch.autocast(device, enabled=False):
        if device == "cpu" and dropout:
            mixed = _mix(query, key, value, absent, dropout)
        else:
            present = None if absent is None else ~absent[:, None, None, :]
            with sdpa_kernel(_KERNELS.get(device, SDPBackend.MATH)):
                mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=present, dropout_p=dropout)
    mixed = mixed.transpose(1, 2).flatten(2)
    return mixed.squeeze(1) if single else packing.gather(mixed)


def _mix(query: Tensor, key: Tensor, value: Tensor, absent: Tensor | None, dropout: float) -> Tensor:
    """Attention with dropout on a CPU, for which torch has no fused kernel: its plain one takes 2.7 times as long."""
    samples, heads, queries, width = query.shape
    flat = [part.reshape(samples * heads, -1, width) for part in (query / math.sqrt(width), key, value)]
    scores = torch.bmm(flat[0], flat[1].transpose(1, 2))
    if absent is not None:
        rows = scores.view(samples, heads, queries, -1)
        scores = rows.masked_fill(absent[:, None, None, :], -math.inf).view_as(scores)
    weights = torch.softmax(scores, -1)
    return torch.bmm(weights * draw_mask(weights.shape, dropout, weights.dtype), flat[2]).view(query.shape)


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
    return packing.spread(precise).sum(1) / packing.lengths.unsqueeze(-1)
