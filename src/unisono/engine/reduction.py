"""From a step's contributions to my shard of its gradient: the tree, and the first crossing to other workers.

Owns the buffers in which this worker adds, and the *tally*: the small exact facts of a step that every worker learns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.board import REGROUP, RUNNING, STOP
from unisono.data.order import Step
from unisono.engine.assignment import Assignment
from unisono.engine.contribution import Contribution
from unisono.engine.replica import Replica
from unisono.engine.tree import Node, Tree, fold, fold_nodes, nodes
from unisono.errors import ContractError, DivergedError, LostPeerError
from unisono.exchange.protocol import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What every worker knows of a finished step.

    loss: mean over all terms, float64 arithmetic. weight: number of terms. used: whether each parameter got a gradient
    at all. integers: int64, the integer buffers as microbatch 0 left them. request: what the workers were asked to do
    after this step, `board.STOP` before `board.REGROUP`.
    """

    loss: float
    weight: int
    used: list[bool]
    integers: Tensor
    request: int


class Sum:
    """My shard of the *sum* of a step's contributions, still in nodes: they are added up a part at a time, as the tree
    says, by whoever needs the part. Their memory is overwritten freely.
    """

    def __init__(self, nodes: Sequence[tuple[Node, Tensor]]) -> None:
        self._nodes = nodes

    def mean(self, place: slice, weight: int, into: Tensor | None = None) -> Tensor:
        """A part of the shard, divided by the step's weight, once: in the beginning of `into`, or left where `left`
        finds it."""
        parts = [(node, value[place]) for node, value in self._nodes]
        target = parts[0][1] if into is None else into[: place.stop - place.start]
        return torch.div(fold_nodes(parts, target), weight, out=target)

    def left(self, place: slice) -> Tensor:
        """What `mean` has left of a part."""
        return self._nodes[0][1][place]


class Reduction:
    """Adds up one step at a time.

    Attributes:
        shares: which microbatches of the present step each worker computes, by rank.
    """

    def __init__(self, replica: Replica, exchange: Exchange) -> None:
        self._replica = replica
        self._exchange = exchange
        self._tree = Tree(lambda: exchange.new_buffer(replica.flat.numel(), replica.space.dtype))
        self._views: dict[int, list[Tensor]] = {}
        self._parameters = len(replica.parameters)
        self._integers = int(replica.integer_values().numel())
        self._step: Step | None = None
        self._assignment = Assignment(exchange.workers)
        self._began = 0.0

    def begin(self, step: Step) -> range:
        """Forget the last step; return the microbatches of this one that are mine."""
        self._step = step
        self._began = time.perf_counter()
        self.shares = self._assignment.shares(len(step.microbatches))
        self._tree.clear()
        self._used = torch.zeros(self._parameters, dtype=torch.int64)
        self._scalars: dict[int, tuple[Tensor, int]] = {}
        self._first_integers: Tensor | None = None
        return self.shares[self._exchange.rank]

    def add(self, number: int, contribution: Contribution) -> None:
        """Add microbatch `number`'s contribution; numbers rise."""
        self._tree.add(number, lambda buffer, add: self._write(contribution.parts, buffer, add))
        self._scalars[number] = (contribution.loss, contribution.weight)
        gradients = contribution.parts[: self._parameters]
        self._used |= torch.tensor([part is not None for part in gradients], dtype=torch.int64)
        if number == 0:
            self._first_integers = contribution.integers

    def finish(self, request: int = RUNNING) -> tuple[Sum, Totals]:
        """Exchange nodes; return my shard of the sum of all contributions, good until the next step, and the totals.

        Raises:
            DivergedError: a microbatch's loss is not finite.
            ContractError: the step has no terms at all.
        """
        totals = self._tally(request)
        pending = self._tree.pending
        owned = [node for share in self.shares for node in nodes(share)]
        received = self._exchange.to_owners(
            [buffer for _, buffer in pending],
            [len(nodes(share)) for share in self.shares],
            shard_size=self._replica.shard.size,
            dtype=self._replica.space.dtype,
        )
        return Sum(list(zip(owned, received, strict=True))), totals

    def _tally(self, request: int) -> Totals:
        """Add the workers' facts as integers: exact in any order. A float64 travels as its bits, zero from all but
        one."""
        assert self._step is not None
        microbatches, parameters = len(self._step.microbatches), self._parameters
        losses, weights = torch.zeros(microbatches, dtype=torch.float64), torch.zeros(microbatches, dtype=torch.int64)
        for number, (loss, weight) in self._scalars.items():
            losses[number], weights[number] = loss, weight
        integers = self._first_integers
        if integers is None:
            integers = torch.zeros(self._integers, dtype=torch.int64)
        requests = torch.tensor([int(request == STOP), int(request == REGROUP)])
        pace = torch.zeros(self._exchange.workers + 1, dtype=torch.int64)
        pace[self._exchange.rank] = round((time.perf_counter() - self._began) * 1e6) if self._scalars else 0
        pace[-1] = self._assignment.number
        mine = torch.cat([losses.view(torch.int64), weights, self._used, integers.cpu(), requests, pace])
        device = self._replica.flat.device
        everyone = self._exchange.add_integers(mine.to(device)).cpu()
        sizes = [microbatches, microbatches, parameters, self._integers, 2, len(pace)]
        loss_bits, weights, used, integers, requests, pace = everyone.split(sizes)
        self._learn(*pace.tolist())
        stops, regroups = requests.tolist()
        asked = STOP if stops else REGROUP if regroups else RUNNING
        return self._conclude(loss_bits.view(torch.float64).tolist(), weights.tolist(), used, integers, asked)

    def _learn(self, *pace: int) -> None:
        """Let the next step's shares follow what this one took: every worker learns the same."""
        *microseconds, numbers = pace
        if numbers != self._assignment.number * self._exchange.workers:
            raise LostPeerError("the workers do not agree on the sharing out of this step")
        self._assignment.learn(microseconds)

    def _conclude(
        self, losses: list[float], weights: list[int], used: Tensor, integers: Tensor, request: int
    ) -> Totals:
        assert self._step is not None
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {self._step.number + 1}, microbatch {number} (samples "
                    f"{_some(self._step.microbatches[number].tolist())}). No update was made. "
                    "Lower train.learning_rate, set train.clip_norm = 1.0, or look at these samples."
                )
        weight = sum(weights)
        if weight == 0:
            raise ContractError(
                f"step {self._step.number + 1} has no terms: the task's loss returned 0 for all its microbatches."
            )
        return Totals(
            loss=fold(losses) / weight, weight=weight, used=(used > 0).tolist(), integers=integers, request=request
        )

    def _write(self, parts: Sequence[Tensor | None], buffer: Tensor, add: bool) -> None:
        """Write parts (None: zeros) into a flat buffer of the space, or add them to it."""
        key = buffer.data_ptr()
        if key not in self._views:
            self._views[key] = [segment.view(buffer) for segment in self._replica.space.segments]
        targets: list[Tensor] = []
        values: list[Tensor] = []
        absent: list[Tensor] = []
        for view, part in zip(self._views[key], parts, strict=True):
            if part is None:
                absent.append(view)
            elif part.is_sparse:  # its absent rows are zeros
                (view if add else view.zero_()).index_add_(0, part.indices()[0], part.values())
            else:
                targets.append(view)
                values.append(part)
        if targets:
            (torch._foreach_add_ if add else torch._foreach_copy_)(targets, values)
        if absent:  # adding 0.0 makes +0.0 of −0.0, just as adding a buffer of zeros would
            torch._foreach_add_(absent, 0.0) if add else torch._foreach_zero_(absent)


def _some(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:5])) + (", …" if len(samples) > 5 else "")
