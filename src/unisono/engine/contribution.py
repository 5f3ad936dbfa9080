"""What one microbatch adds to a step: a pure function of (parameters and buffers at the step's start, microbatch, key).

Owns the forward and backward pass. Does not add contributions up, and knows neither worker nor shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from unisono.determinism import keys
from unisono.engine.replica import Replica
from unisono.errors import ContractError
from unisono.exchange.protocol import Offload
from unisono.kernels.linear import assisted
from unisono.tasks.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """Sums over one microbatch.

    loss: float64 scalar, the sum of its losses.
    terms: how many terms (samples, tokens) are in that sum.
    parts: gradient of each parameter (of a sparse embedding: coalesced rows), then change of each buffer times terms,
        in the order of the space; None: none.
    integers: int64, integer buffers after the microbatch.
    """

    loss: Tensor
    terms: int
    parts: list[Tensor | None]
    integers: Tensor


class Contributes(Protocol):
    """Computes contributions: a `Contributor`, or who writes down, audits or times what one does."""

    def contribute(self, step: int, number: int, microbatch: dict[str, Tensor]) -> Contribution: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributor:
    """Computes contributions of one task with one replica. desk: where others find some of the work; None: nowhere."""

    replica: Replica
    task: Task
    precision: str
    seed: int
    offload: Offload | None = None

    def contribute(self, step: int, number: int, microbatch: Mapping[str, Tensor]) -> Contribution:
        """Compute the contribution of microbatch `number` of `step`; leave the replica as it was.

        Raises:
            ContractError: the task returned no scalar sum, or no whole number of terms.
        """
        replica = self.replica
        device = replica.flat.device
        keys.seed_all(keys.key(self.seed, "contribution", step, number))
        if not all(part.training for part in replica.parts):  # setting it again costs more than looking
            replica.module.train()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            loss, terms = self.task.loss(replica.module, dict(microbatch))  # its own: it may take columns out
        terms = _whole(terms)
        if loss.ndim != 0 or not loss.is_floating_point():
            raise ContractError(
                f"the task's loss is {loss.dtype} of shape {tuple(loss.shape)}; allowed is one float: the sum."
            )
        gradients: list[Tensor | None] = [None] * len(replica.parameters)
        if loss.requires_grad:
            self._go_back(loss)
            gradients = [_gradient(parameter, id(parameter) in replica.sparse) for parameter in replica.parameters]
        for parameter in replica.parameters:
            parameter.grad = None
        changes = [None if change is None else change.mul_(terms) for change in replica.take_buffer_changes()]
        integers = replica.integer_values()
        replica.restore_buffers()
        return Contribution(
            loss=loss.detach().to(torch.float64), terms=terms, parts=gradients + changes, integers=integers
        )

    def _go_back(self, loss: Tensor) -> None:
        """Leave in each parameter its gradient."""
        if self.offload is None:
            loss.backward()
            return
        with assisted(self.offload.publish):
            loss.backward()
        for weights, gradient in self.offload.collect():
            for weight, part in zip(weights, gradient.split([len(weight) for weight in weights]), strict=True):
                if weight.requires_grad:
                    weight.grad = part if weight.grad is None else weight.grad + part


def _gradient(parameter: nn.Parameter, sparse: bool) -> Tensor | None:
    """A parameter's gradient: coalesced rows, if its embedding asks for sparse ones, else a dense tensor.

    An absent row counts as +0.0. So that leaving it out of a sum and adding it are the same, a sparse embedding's
    gradient never holds −0.0.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.is_sparse and sparse and gradient.sparse_dim() == 1:
        gradient = gradient.coalesce()
        gradient.values().add_(0.0)
        return gradient
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.add_(0.0) if sparse else dense


def _whole(terms: int | Tensor) -> int:
    if isinstance(terms, Tensor) and terms.ndim == 0 and not terms.is_floating_point():
        terms = int(terms.item())
    if isinstance(terms, bool) or not isinstance(terms, int) or terms < 0:
        raise ContractError(
            f"the task's loss returned {terms!r} as its number of terms; allowed is a whole number from 0, such "
            "as len(labels). "
            "A sum is divided once a step, by the number of all its terms."
        )
    return terms
