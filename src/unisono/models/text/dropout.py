"""Dropout that costs little on a CPU.

Owns the drawing of masks there: 16 random bits decide whether a number stays, where torch's own dropout spends a
float64 on each. From torch's global generator, so a mask is a function of the microbatch's key.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """As nn.Dropout; on CPUs `p` is rounded to a multiple of 2^-16, and what stays is scaled by just that."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop numbers of `input`, while training."""
        if not self._draws(input):
            return super().forward(input)
        return input * draw_mask(input.shape, self.p, input.dtype)

    def add(self, input: Tensor, residual: Tensor) -> Tensor:
        """Return `residual` plus the dropped `input`, in the wider dtype of the two."""
        if not self._draws(input):
            return residual + super().forward(input)
        wide = torch.promote_types(input.dtype, residual.dtype)
        return torch.addcmul(residual.to(wide), input.to(wide), draw_mask(input.shape, self.p, wide))

    def _draws(self, input: Tensor) -> bool:
        return self.training and 0.0 < self.p < 1.0 and input.device.type == "cpu"


def draw_mask(shape: torch.Size, rate: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a CPU tensor: 0 with probability `rate` (0 < rate < 1), else the factor that keeps the mean."""
    dropped = min(round(rate * _LEVELS), _LEVELS - 1)
    elements = shape.numel()
    words = torch.empty(-(-elements // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = words.view(torch.int16)[:elements].view(shape)  # −2^15 … 2^15 − 1, all equally likely
    mask = mask.to(torch.promote_types(dtype, torch.float32))
    # the lowest `dropped` of the levels become 0, the others 1
    return mask.add_(_LEVELS // 2 + 1 - dropped).clamp_(0, 1).mul_(_LEVELS / (_LEVELS - dropped)).to(dtype)
