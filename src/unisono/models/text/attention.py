"""How text encoders look from token to token.

Owns the one choice of an attention kernel per type of device, which decides bits; the mean over a sample's
tokens; and how blocks run one after another. Holds no weights.

Shapes: n samples, t tokens, w numbers per token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# Left to itself, torch picks a kernel by shapes and by what it was compiled with. Neither of these two keeps
# t × t scores. Attention weights get no dropout: with it, there is no fused kernel on CPUs.
_KERNELS = {"cpu": SDPBackend.FLASH_ATTENTION, "cuda": SDPBackend.EFFICIENT_ATTENTION}


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Let every token attend to its sample's tokens, by scaled dot products.

    Takes three floats [n, t, w] and the bool mask [n, t], true where there is a token; each sample has one.
    Returns a float [n, t, w]; on CPUs in float32 at least.
    """
    device = query.device.type
    parts = [query, key, value]
    if device == "cpu":  # the CPU kernel's forward and backward pass take 2.2 times as long in bfloat16
        parts = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    with torch.autocast(device, enabled=False), sdpa_kernel(_KERNELS.get(device, SDPBackend.MATH)):
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
    return mixed.transpose(1, 2).flatten(2)


def run_blocks(blocks: Iterable[nn.Module], states: Tensor, mask: Tensor, *, recompute: bool) -> Tensor:
    """Send the states [n, t, w] through the blocks; with `recompute`, keep only their inputs for backward.

    A block that is computed again draws the same dropout, so the gradient has the same bits either way.
    """
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            states = checkpoint(block, states, mask, use_reentrant=False, preserve_rng_state=True)
        else:
            states = block(states, mask)
    return states


def mean_over_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Average the states [n, t, w] where the mask [n, t] is true, in float32 at least; returns [n, w]."""
    chosen = mask.unsqueeze(-1)
    precise = states.to(torch.promote_types(states.dtype, torch.float32))
    return torch.where(chosen, precise, 0).sum(1) / chosen.sum(1)
