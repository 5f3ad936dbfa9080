"""The arithmetic of an update on every element, in as few passes over memory as possible.

Two loops are compiled (`_update.c`): the mean of a step's nodes with its squares, and Adam from one copy of the
trained arrays into another. Each has a reference here, made of torch's operations, which gives the same bits in more
passes: it is used without a C compiler, on other devices, and for other dtypes. Each process tries both once, to see
whether Adam's bits are those of torch's own kernel on this processor.

Owns the choice between loop and reference, and the definition of a block's squares.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from unisono.config.sections import Train
from unisono.determinism.space import BLOCK
from unisono.determinism.tree import fold_values
from unisono.kernels.kernel import Kernel, declare
from unisono.kernels.update_rules import SLOTS, UpdateSlice, update_adam

try:
    from unisono.kernels import _update as _compiled
except ImportError:  # no C compiler where unisono was installed
    _compiled = None  # type: ignore[assignment]

LARGE = 2**20
"""Size of a shard, in elements, from which new values are written past the caches, which could not hold them."""


def mean(
    values: Sequence[Tensor], additions: Sequence[int], terms: int, target: Tensor, squares: Tensor | None = None
) -> Tensor:
    """Write the sum of nodes, divided by `terms`, to `target`, which may be the first of them; they are overwritten.

    Args:
        values: one array each. additions: see `tree.additions`.
        squares: float64 [blocks], gets the sum of squares of each block of 1,024.
    """
    if _runs_compiled(target) and len(target) % BLOCK == 0:
        return _mean(values, additions, terms, target, squares)
    return _mean_by_operations(values, additions, terms, target, squares)


def _mean(
    values: Sequence[Tensor], additions: Sequence[int], terms: int, target: Tensor, squares: Tensor | None
) -> Tensor:
    asked = 0 if squares is None else squares.data_ptr()
    _compiled.mean(len(target), _addresses(values, additions), terms, target.data_ptr(), asked)
    return target


def _mean_by_operations(
    values: Sequence[Tensor], additions: Sequence[int], terms: int, target: Tensor, squares: Tensor | None
) -> Tensor:
    torch.div(fold_values(values, additions, target), terms, out=target)
    if squares is not None:
        squares.copy_(block_squares(target))
    return target


def block_squares(values: Tensor) -> Tensor:
    """Sum of squares of each block of 1,024, float64: products and sums of single elements, added by halving, so that
    no kernel can split a block depending on the number of blocks."""
    rows = values.view(-1, BLOCK)
    squares = rows * rows
    width = BLOCK // 2
    while width:
        squares = squares[:, :width].add_(squares[:, width : 2 * width])
        width //= 2
    return squares[:, 0].to(torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The inputs of a gradient: the sum of nodes, divided by `terms`, multiplied by `factor`.

    values, additions: as for `mean`. squares: as for `mean`, before the factor.
    """

    values: Sequence[Tensor]
    additions: Sequence[int] = (0,)
    terms: int = 1
    factor: float = 1.0
    squares: Tensor | None = None

    def resolve(self, scratch: Tensor) -> Tensor:
        """The gradient, in the beginning of `scratch`, or in the memory of a single node that already is the
        gradient."""
        (first, *more), found = self.values, self.values[0]
        if more or self.terms != 1 or self.squares is not None:
            found = mean(self.values, self.additions, self.terms, scratch[: len(first)], self.squares)
        return found.mul_(self.factor) if self.factor != 1.0 else found


class AdamWalk:
    """The rule of `update_rules.update_adam`, the same bits, from old arrays into new ones. Made by `find_adam`."""

    def __init__(self, train: Train) -> None:
        self._train = train

    def update(
        self,
        gradient: Gradient,
        pieces: Sequence[tuple[int, tuple[float, float, float] | None]],
        old: Sequence[Tensor],
        new: Sequence[Tensor],
        *,
        past_caches: bool,
    ) -> None:
        """Update a part of the weights and of the two averages.

        Args:
            pieces: end of the piece, on the grid of 64, and its settings: count of updates, this one included, learning
                rate, decay; None: it stays unchanged.
            old, new: [elements] weights, and both averages; other memory.
        """
        train = self._train
        settings: dict[tuple[float, float, float], int] = {}
        cut = array("q")
        for stop, setting in pieces:
            cut.append(stop)
            cut.append(-1 if setting is None else settings.setdefault(setting, len(settings)))
        _compiled.adam(
            len(old[0]),
            _addresses(gradient.values, gradient.additions),
            gradient.terms,
            gradient.factor,
            0 if gradient.squares is None else gradient.squares.data_ptr(),
            tuple(value.data_ptr() for value in old),
            tuple(value.data_ptr() for value in new),
            cut,
            tuple(settings),
            train.beta1,
            train.beta2,
            train.epsilon,
            train.optimizer == "adamw",
            past_caches,
        )


def find_adam(train: Train, like: Tensor) -> AdamWalk | None:
    """Return the rule for arrays like this one; None where the recipe has another rule, or its bits would not be those
    of torch."""
    if SLOTS[train.optimizer] != SLOTS["adam"] or not _runs_compiled(like) or not _is_torchs_adam():
        return None
    return AdamWalk(train)


def _addresses(values: Sequence[Tensor], additions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((value.data_ptr(), count) for value, count in zip(values, additions, strict=True))


def _runs_compiled(values: Tensor) -> bool:
    return _compiled is not None and values.dtype == torch.float32 and values.device.type == "cpu"


@cache
def _is_torchs_adam() -> bool:
    """Whether both variants give the same bits as torch's, on values of all sizes."""
    numbers = torch.arange(4 * 4096, dtype=torch.float64)
    signs = (numbers * 0.618034).frac() * 2 - 1
    gradient, weights, average, roots = (signs * torch.exp2((numbers * 7) % 23 - 17)).float().chunk(4)
    old = [weights, average, roots.square()]
    return all(
        all(map(torch.equal, _update(train, gradient, old), _update_with_torch(train, gradient, old)))
        for train in (Train(optimizer="adam"), Train(optimizer="adamw"))
    )


def _update(train: Train, gradient: Tensor, old: Sequence[Tensor]) -> list[Tensor]:
    new = [torch.empty_like(value) for value in old]
    pieces = [(len(gradient), (3.0, 0.01, 0.1))]
    AdamWalk(train).update(Gradient(values=[gradient]), pieces, old, new, past_caches=True)
    return new


def _update_with_torch(train: Train, gradient: Tensor, old: Sequence[Tensor]) -> list[Tensor]:
    values = [value.clone() for value in old]
    weights, *slots = ([value] for value in values)
    pieces = UpdateSlice(weights=weights, gradients=[gradient], slots=tuple(slots), counts=[torch.tensor(3.0)])
    update_adam(train, pieces, 0.01, 0.1)
    return values


declare(
    Kernel(name="mean", compiled=None if _compiled is None else _mean, reference=_mean_by_operations, same_bits=True)
)
declare(  # `find_adam` ensures that the bits are the same
    Kernel(name="adam", compiled=None if _compiled is None else AdamWalk.update, reference=update_adam, same_bits=True)
)
