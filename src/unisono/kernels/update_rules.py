"""The update rules: elementwise ones, each in one fixed variant.

torch's own fused kernels for SGD, Adam and AdamW, called without the wrappers of torch.optim, which take longer than a
small update; foreach operations for Lion. Rules that look at whole tensors are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.config.sections import Train

SLOTS = {
    "sgd": ("momentum",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
}
"""The state of each rule for every parameter element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSlice:
    """Parts of one group's tensors, for one update. Lists run parallel."""

    weights: list[Tensor]
    gradients: list[Tensor]
    slots: tuple[list[Tensor], ...]
    counts: list[Tensor]
    """float32 scalars: updates that each parameter has had, this one included."""


def update_sgd(train: Train, pieces: UpdateSlice, rate: float, decay: float) -> None:
    """SGD with momentum, as torch.optim.SGD; the first momentum is the first gradient."""
    torch._fused_sgd_(
        pieces.weights,
        pieces.gradients,
        pieces.slots[0] if train.momentum else [],
        weight_decay=decay,
        momentum=train.momentum,
        lr=rate,
        dampening=0.0,
        nesterov=train.nesterov,
        maximize=False,
        is_first_step=False,
    )


def update_adam(train: Train, pieces: UpdateSlice, rate: float, decay: float) -> None:
    """Adam (Kingma and Ba, arXiv 1412.6980) or AdamW (Loshchilov and Hutter, arXiv 1711.05101), as in torch.optim."""
    kernel = torch._fused_adamw_ if train.optimizer == "adamw" else torch._fused_adam_
    kernel(
        pieces.weights,
        pieces.gradients,
        pieces.slots[0],
        pieces.slots[1],
        [],
        pieces.counts,
        lr=rate,
        beta1=train.beta1,
        beta2=train.beta2,
        weight_decay=decay,
        eps=train.epsilon,
        amsgrad=False,
        maximize=False,
    )


def update_lion(train: Train, pieces: UpdateSlice, rate: float, decay: float) -> None:
    """Lion (Chen et al., arXiv 2302.06675, Program 1), with decoupled weight decay."""
    weights, gradients, averages = pieces.weights, pieces.gradients, pieces.slots[0]
    directions = torch._foreach_mul(averages, train.beta1)
    torch._foreach_add_(directions, gradients, alpha=1 - train.beta1)
    torch._foreach_sign_(directions)
    torch._foreach_mul_(weights, 1 - rate * decay)
    torch._foreach_add_(weights, directions, alpha=-rate)
    torch._foreach_mul_(averages, train.beta2)
    torch._foreach_add_(averages, gradients, alpha=1 - train.beta2)


RULES: dict[str, Callable[[Train, UpdateSlice, float, float], None]] = {
    "sgd": update_sgd,
    "adam": update_adam,
    "adamw": update_adam,
    "lion": update_lion,
}
