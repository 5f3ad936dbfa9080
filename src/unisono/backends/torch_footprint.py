"""What a contribution costs in torch: its floating-point operations, and the memory that autograd keeps.

Owns the formulas that torch's own counter lacks. `engine/footprint.py` decides what is measured.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    FlopCounterMode,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from unisono.kernels import packed_attention as fused


def _count_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _count_attention_backward(
    gradient: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *rest: Any,
    **named: Any,
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _count_addmm(_: Any, left: Sequence[int], right: Sequence[int], *rest: Any, **named: Any) -> int:
    return 2 * math.prod(left) * right[-1]


@register_flop_formula(fused.ATTEND, get_raw=True)
def _count_fused(projected: Tensor, lengths: Tensor, *rest: Any, **named: Any) -> int:
    return 2 * _count_scores(projected.shape[1] // 3, lengths)


@register_flop_formula(fused.ATTEND_BACKWARD, get_raw=True)
def _count_fused_backward(gradient: Tensor, projected: Tensor, lengths: Tensor, *rest: Any, **named: Any) -> int:
    return 5 * _count_scores(gradient.shape[1], lengths)


def _count_scores(width: int, lengths: Tensor) -> int:
    return 2 * width * int((lengths * lengths).sum())


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
    torch.ops.aten.addmm_: _count_addmm,
    torch.ops.aten.baddbmm_: _count_addmm,
}
"""Operations that torch's own counter lacks: attention's kernel on CPUs, and products that are added in place."""


def count_flop(compute: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention that `compute` runs, forward and
    backward, a multiplication and an addition being two.

    Counted below autograd, so custom functions count as the operations that they call; recomputation to save memory
    counts, too. Not counted: elementwise operations, and torch's fused recurrent layers.
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        compute()
    return int(counter.get_total_flops())


class _Saved:
    """A tensor that autograd saved, until autograd releases it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure_saved(compute: Callable[[], object], constants: Sequence[Tensor]) -> int:
    """Bytes: the most that autograd saved at one time while `compute` ran, each storage counted once, except
    that of `constants` (parameters and buffers).

    Memory that a recomputed block saves while it is computed again is not measured.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in constants}
    held: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    most = 0

    def release(address: int) -> None:
        held[address] -= 1
        if not held[address]:
            del held[address], sizes[address]

    def pack(tensor: Tensor) -> _Saved:
        nonlocal most
        saved = _Saved(tensor)
        for part in [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]:
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                held[storage.data_ptr()] += 1
                sizes[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(saved, release, storage.data_ptr())
        most = max(most, sum(sizes.values()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        compute()
    return most
