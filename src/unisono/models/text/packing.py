"""Where the tokens of a microbatch lie: packed one after another, and spread out in a rectangle.

Owns the way between the two. Whatever looks at single tokens (linear layers, norms, dropout) works on packed ones and
spends nothing on padding; attention spreads them out for itself.

Shapes: n samples, m tokens of all samples, t tokens of the longest, w numbers per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Of one microbatch; made by `pack`.

    starts: int64 [n], the first packed token of each sample. lengths: int64 [n], each at least 1. places: int64 [m],
    where each token lies in the flattened rectangle [n · t]; None: all are equally long, so it lies as it is packed.
    absent: bool [n, t], true where there is no token; None: there is one everywhere. positions: int64 [m], number of
    each token in its sample. longest: t.
    """

    starts: Tensor
    lengths: Tensor
    places: Tensor | None
    absent: Tensor | None
    positions: Tensor
    longest: int

    def spread(self, packed: Tensor) -> Tensor:
        """Return [n, t, w] of packed tokens [m, w], zeros where there is no token."""
        shape = (len(self.lengths), self.longest, packed.shape[-1])
        if self.places is None:
            return packed.view(shape)
        return _Spread.apply(packed, self.places, shape[0] * shape[1]).view(shape)

    def gather(self, rectangle: Tensor) -> Tensor:
        """Return the packed tokens [m, w] of a rectangle [n, t, w]."""
        flat = rectangle.reshape(-1, rectangle.shape[-1])
        return flat if self.places is None else _Gather.apply(flat, self.places)


def pack(tokens: int, starts: Tensor) -> Packing:
    """Describe samples that start at `starts` (int64 [n], rising, the first 0) among so many tokens."""
    ends = torch.cat([starts[1:], starts.new_tensor([tokens])])
    lengths = ends - starts
    longest = int(lengths.max())
    positions = torch.arange(tokens, device=starts.device) - torch.repeat_interleave(starts, lengths)
    places = absent = None
    if tokens != longest * len(starts):
        rows = torch.arange(len(starts), device=starts.device) * longest
        places = torch.repeat_interleave(rows, lengths) + positions
        absent = torch.arange(longest, device=starts.device) >= lengths.unsqueeze(-1)
    return Packing(starts=starts, lengths=lengths, places=places, absent=absent, positions=positions, longest=longest)


class _Spread(torch.autograd.Function):
    """Rows to places among zeros. Its gradient is a copy of rows; autograd's own for indexing would add."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, places: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(places)
        return packed.new_zeros(rows, packed.shape[-1]).index_copy_(0, places, packed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """The way back."""

    @staticmethod
    def forward(ctx: Any, rectangle: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(rectangle)
        return rectangle.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_zeros(ctx.rows, gradient.shape[-1]).index_copy_(0, ctx.saved_tensors[0], gradient), None
