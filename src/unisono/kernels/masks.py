"""Which numbers dropout keeps on a CPU: a function of a key and a number's place.

A mask is never kept: the backward pass draws it again. Sixteen random bits decide on a
number, so the rate is rounded to a multiple of 2⁻¹⁶; the bits are SplitMix64's (Steele, Lea, Flood: Fast Splittable
Pseudorandom Number Generators, OOPSLA 2014), whose n-th word needs none of the words before it.

Drawing, dropping and adding are one compiled loop (`_elementwise.c`). The reference here gives the same bits; it is
used where there was no C compiler, and for dtypes other than float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unisono.kernels.kernel import Kernel, declare

try:
    from unisono.kernels import _elementwise as _compiled
except ImportError:  # no C compiler where unisono was installed
    _compiled = None  # type: ignore[assignment]

_LEVELS = 2**16
_NUMBERS = 4  # in a word


@dataclass(frozen=True, slots=True)
class Mask:
    """Factors of numbers: 0 for about `rate` (0 < rate < 1) of them; for the others, the factor that keeps the mean.

    key: int64, begins the sequence. first: the word that decides on a tensor's first numbers.
    """

    rate: float
    key: int
    first: int = 0

    @classmethod
    def draw(cls, rate: float) -> Mask:
        """Make a mask with a key from torch's generator, which is seeded for the microbatch."""
        return cls(rate, int(torch.empty((), dtype=torch.int64).random_(-(2**63), None)))

    def after(self, elements: int) -> Mask:
        """The mask for the elements after these: it uses none of their bits."""
        return Mask(self.rate, self.key, self.first - (-elements // _NUMBERS))

    def drop(self, values: Tensor, *, added: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Return values · factors + `added`.

        Takes CPU floats of one shape and dtype. `out`, contiguous, may be either of them.

        Raises:
            ValueError: shapes or dtypes differ.
        """
        for other in (added, out):
            if other is not None and (other.shape, other.dtype) != (values.shape, values.dtype):
                raise ValueError(f"{other.dtype} {list(other.shape)} beside {values.dtype} {list(values.shape)}")
        target = torch.empty_like(values, memory_format=torch.contiguous_format) if out is None else out
        values = values.contiguous()
        added = None if added is None else added.contiguous()
        if _compiled is not None and values.dtype == torch.float32:
            return _drop(self, values, added, target)
        return _drop_by_operations(self, values, added, target)

    def factors(self, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """All factors of a tensor."""
        elements = shape.numel()
        with np.errstate(over="ignore"):
            words = np.arange(1, 1 - (-elements // _NUMBERS), dtype="<u8") + np.uint64(self.first)
            words = words * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self.key % 2**64)
            words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            words ^= words >> np.uint64(31)
        kept = torch.from_numpy(words.view("<u2")[:elements] >= self.dropped)
        return kept.view(shape).to(dtype).mul_(self.factor)

    @property
    def dropped(self) -> int:
        """How many of 2^16 levels become 0: the lowest ones."""
        return min(round(self.rate * _LEVELS), _LEVELS - 1)

    @property
    def factor(self) -> float:
        """The factor of the other elements."""
        return _LEVELS / (_LEVELS - self.dropped)


def _drop(mask: Mask, values: Tensor, added: Tensor | None, target: Tensor) -> Tensor:
    place = 0 if added is None else added.data_ptr()
    ends = (values.data_ptr(), place, target.data_ptr())
    _compiled.drop(values.numel(), mask.key % 2**64, mask.first, mask.dropped, mask.factor, *ends)
    return target


def _drop_by_operations(mask: Mask, values: Tensor, added: Tensor | None, target: Tensor) -> Tensor:
    torch.mul(values, mask.factors(values.shape, values.dtype), out=target)
    return target if added is None else target.add_(added)


declare(
    Kernel(name="dropout", compiled=None if _compiled is None else _drop, reference=_drop_by_operations, same_bits=True)
)
