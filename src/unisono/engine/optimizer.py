"""From my shard of the gradient to everybody's new weights: the update rules, and the second crossing.

Owns the optimiser's state, of which each worker keeps its shard. The rules are elementwise ones, each in one fixed
variant: torch's own fused kernels for SGD, Adam and AdamW, foreach operations for Lion. Those that look at whole
tensors are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from unisono.engine.arrays import AVERAGE, WEIGHTS, Arrays, PrivateArrays
from unisono.engine.reduction import Totals
from unisono.engine.replica import Replica
from unisono.engine.space import BLOCK
from unisono.errors import DivergedError
from unisono.exchange.protocol import Exchange
from unisono.recipe import Train

SLOTS = {
    "sgd": ("momentum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
}
"""What each rule remembers of every parameter element."""


def array_names(train: Train) -> list[str]:
    """The arrays that a run keeps: weights, what its rule remembers, and averaged weights where it wants them."""
    return [WEIGHTS, *SLOTS[train.optimizer], *([AVERAGE] if train.ema_decay else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """One group's tensors, cut to my shard, for one update. Lists run parallel."""

    weights: list[Tensor]
    gradients: list[Tensor]
    slots: tuple[list[Tensor], ...]
    counts: list[Tensor]
    """float32 scalars: updates that each parameter has had."""


def update_sgd(train: Train, pieces: Pieces, rate: float, decay: float) -> None:
    """SGD with momentum, as torch.optim.SGD; the first momentum is the first gradient."""
    sgd(
        pieces.weights,
        pieces.gradients,
        list(pieces.slots[0]),
        fused=True,
        weight_decay=decay,
        momentum=train.momentum,
        lr=rate,
        dampening=0.0,
        nesterov=train.nesterov,
        maximize=False,
    )


def update_adam(train: Train, pieces: Pieces, rate: float, decay: float) -> None:
    """Adam (Kingma and Ba, arXiv 1412.6980) or AdamW (Loshchilov and Hutter, arXiv 1711.05101), as torch.optim has
    them."""
    adam(
        pieces.weights,
        pieces.gradients,
        pieces.slots[0],
        pieces.slots[1],
        [],
        pieces.counts,
        fused=True,
        amsgrad=False,
        beta1=train.beta1,
        beta2=train.beta2,
        lr=rate,
        weight_decay=decay,
        eps=train.epsilon,
        maximize=False,
        decoupled_weight_decay=train.optimizer == "adamw",
    )


def update_lion(train: Train, pieces: Pieces, rate: float, decay: float) -> None:
    """Lion (Chen et al., arXiv 2302.06675, Program 1), with decoupled weight decay."""
    weights, gradients, averages = pieces.weights, pieces.gradients, pieces.slots[0]
    directions = torch._foreach_mul(averages, train.beta1)
    torch._foreach_add_(directions, gradients, alpha=1 - train.beta1)
    torch._foreach_sign_(directions)
    torch._foreach_mul_(weights, 1 - rate * decay)
    torch._foreach_add_(weights, directions, alpha=-rate)
    torch._foreach_mul_(averages, train.beta2)
    torch._foreach_add_(averages, gradients, alpha=1 - train.beta2)


RULES: dict[str, Callable[[Train, Pieces, float, float], None]] = {
    "sgd": update_sgd,
    "adam": update_adam,
    "adamw": update_adam,
    "lion": update_lion,
}


class Optimizer:
    """My shard of weights, optimiser state and averaged weights, and the rule that changes them.

    Attributes:
        arrays: where they live.
        weights: [shard size] my part of parameters and float buffers.
        slots: name → [shard size] state, zero at first.
        counts: int64 [parameters], updates that each parameter has had, the same on every worker.
        average: [shard size] averaged copy of `weights` where train.ema_decay is set.
    """

    def __init__(self, replica: Replica, exchange: Exchange, train: Train, arrays: Arrays | None = None) -> None:
        self._replica = replica
        self._exchange = exchange
        self._train = train
        self.arrays = arrays or PrivateArrays(array_names(train), replica, exchange)
        self.counts = torch.zeros(len(replica.parameters), dtype=torch.int64)
        self._places = [
            (index, segment.group, place)
            for index, segment in enumerate(replica.space.parameters)
            if (place := replica.shard.local(segment)) is not None
        ]
        self._parameter_elements = min(
            max(replica.space.parameter_blocks * BLOCK - replica.shard.start, 0), replica.shard.size
        )
        self._hold(self.arrays.mine())
        if not self.arrays.committed:  # the average begins as the weights, everything else at zero
            for target in (self.weights, self.average):
                if target is not None:
                    target.copy_(replica.shard.of(replica.flat))

    def _hold(self, arrays: dict[str, Tensor]) -> None:
        self.weights = arrays[WEIGHTS]
        self.slots = {name: arrays[name] for name in SLOTS[self._train.optimizer]}
        self.average = arrays.get(AVERAGE)

    def update(self, gradient: Tensor, totals: Totals, *, step: int, rate: float) -> float:
        """Work out one step, up to `publish`. Return the norm of the whole gradient.

        `gradient` is my shard of the sum of contributions, and is overwritten.

        Raises:
            DivergedError: the gradient is not finite; nothing has been changed.
        """
        train = self._train
        gradient.div_(totals.weight)
        norm = self._norm(gradient)
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient's norm is {norm} at step {step + 1}, though the loss is {totals.loss:.6g}. No "
                "update was made. Lower train.learning_rate, or set train.clip_norm = 1.0."
            )
        if train.clip_norm and norm > train.clip_norm:
            # as torch.nn.utils.clip_grad_norm_; what follows the parameters is the buffers' change, and no gradient
            gradient[: self._parameter_elements].mul_(train.clip_norm / (norm + 1e-6))
        self._hold(self.arrays.begin())
        self._apply(gradient, totals.used, rate)
        self.weights[self._parameter_elements :].add_(gradient[self._parameter_elements :])  # the buffers' mean change
        if self.average is not None:
            decay = min(train.ema_decay, (1 + step) / (10 + step))
            self.average[: self._parameter_elements].lerp_(self.weights[: self._parameter_elements], 1 - decay)
            old, new = self.average[self._parameter_elements :], self.weights[self._parameter_elements :]
            # an untouched −inf, as masks have it, has no mean with itself
            old.copy_(torch.where(old == new, old, old.lerp(new, 1 - decay)))
        self.counts += torch.tensor(totals.used, dtype=torch.int64)
        return norm

    def publish(self, integers: Tensor, facts: Mapping[str, Any] | None = None) -> None:
        """Commit the present arrays, with the step's integer buffers and what else is told of it; afterwards
        `replica.flat` holds everybody's new weights."""
        self.arrays.commit(facts or {}, self.counts, integers)
        self.arrays.read(WEIGHTS, self._replica.flat)
        self._replica.accept(integers)

    def _apply(self, gradient: Tensor, used: Sequence[bool], rate: float) -> None:
        """Run the rule on each group's parameters that got a gradient; skip the others, as torch skips None."""
        counts = self.counts.to(torch.float32).unbind(0)
        for number, group in enumerate(self._replica.groups):
            places = [(index, place) for index, owner, place in self._places if owner == number and used[index]]
            if not places:
                continue
            pieces = Pieces(
                weights=[self.weights[place] for _, place in places],
                gradients=[gradient[place] for _, place in places],
                slots=tuple([slot[place] for _, place in places] for slot in self.slots.values()),
                counts=[counts[index].to(gradient.device) for index, _ in places],
            )
            factor = self._train.pretrained_rate if group.pretrained else 1.0
            decay = self._train.weight_decay if group.decays else 0.0
            with torch.no_grad():
                RULES[self._train.optimizer](self._train, pieces, rate * factor, decay)

    def _norm(self, gradient: Tensor) -> float:
        """Euclidean norm of the whole gradient: squares of a block are added by halving, blocks in a tree, whoever owns
        them."""
        blocks = torch.zeros(self._replica.shard.size // BLOCK, dtype=torch.float64, device=gradient.device)
        own = self._parameter_elements // BLOCK
        blocks[:own] = block_squares(gradient[: self._parameter_elements])
        everyone = torch.zeros(len(blocks) * self._exchange.workers, dtype=torch.float64, device=gradient.device)
        self._exchange.gather_shards(blocks, everyone)
        return math.sqrt(fold_vector(everyone[: self._replica.space.parameter_blocks]))


def block_squares(values: Tensor) -> Tensor:
    """Sum of squares of each block of 1,024: products and sums of single elements only, so one result whatever the
    kernel."""
    sums = []
    for chunk in values.view(-1, BLOCK).split(256):  # a chunk stays in the cache
        squares = chunk * chunk
        width = BLOCK // 2
        while width:
            squares = squares[:, :width].add_(squares[:, width : 2 * width])
            width //= 2
        sums.append(squares[:, 0].to(torch.float64))
    return torch.cat(sums) if sums else values.new_zeros(0, dtype=torch.float64)


def fold_vector(values: Tensor) -> float:
    """Add a vector's elements in the fixed tree."""
    while len(values) > 1:
        pairs = len(values) // 2
        values = torch.cat([values[: 2 * pairs : 2] + values[1 : 2 * pairs : 2], values[2 * pairs :]])
    return float(values[0])
