"""From a step's contributions to my shard of its gradient: the tree, and the first crossing to other workers.

Owns the buffers in which this worker adds, and the *tally*: the small exact facts of a step that every worker learns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.board import REGROUP, RUNNING, STOP
from unisono.data.order import Step
from unisono.engine.assignment import Assignment
from unisono.engine.contribution import Contribution
from unisono.engine.replica import Replica
from unisono.engine.rows import Rows, add_up, pack, rows_of, unpack
from unisono.engine.tree import Tree, fold_nodes
from unisono.errors import ContractError, DivergedError, LostPeerError
from unisono.exchange.protocol import Exchange
from unisono.nodes import Node, fold, nodes


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

    def __init__(
        self, nodes: Sequence[tuple[Node, Tensor]], tables: Mapping[int, Mapping[int, Rows]] | None = None
    ) -> None:
        """tables: number of the parameter → number of the microbatch → its rows. They are no part of the nodes."""
        self._nodes = nodes
        self._tables = tables or {}

    def mean(self, place: slice, weight: int, into: Tensor | None = None) -> Tensor:
        """A part of the shard, divided by the step's weight, once: in the beginning of `into`, or left where `left`
        finds it."""
        parts = [(node, value[place]) for node, value in self._nodes]
        target = parts[0][1] if into is None else into[: place.stop - place.start]
        return torch.div(fold_nodes(parts, target), weight, out=target)

    def rows(self, table: int, first: int, last: int, weight: int) -> Rows:
        """The rows of a table that any microbatch touched, from `first` up to, but without, `last`, divided by the
        step's weight."""
        found = add_up(self._tables[table], first, last)
        found.values.div_(weight)
        return found

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
        self._tables = [index for index, segment in enumerate(replica.space.parameters) if segment.table]
        self._dense = [index for index, segment in enumerate(replica.space.segments) if not segment.table]
        self._packed = exchange.new_buffer(1, replica.space.dtype)  # grows with the rows
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
        self._rows: dict[int, dict[int, Rows]] = {table: {} for table in self._tables}
        self._first_integers: Tensor | None = None
        return self.shares[self._exchange.rank]

    def add(self, number: int, contribution: Contribution) -> None:
        """Add microbatch `number`'s contribution; numbers rise."""
        dense = [contribution.parts[index] for index in self._dense]
        self._tree.add(number, lambda buffer, add: self._write(dense, buffer, add))
        for table, rows in self._rows.items():
            rows[number] = rows_of(contribution.parts[table], self._replica.parameters[table])
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
        totals, counts = self._tally(request)
        pending = self._tree.pending
        owned = [node for share in self.shares for node in nodes(share)]
        received = self._exchange.to_owners(
            [buffer for _, buffer in pending],
            [len(nodes(share)) for share in self.shares],
            shard_size=self._replica.shard.size,
            dtype=self._replica.space.dtype,
        )
        tables = self._gather_rows(counts) if self._tables else {}
        return Sum(list(zip(owned, received, strict=True)), tables), totals

    def _gather_rows(self, counts: list[list[int]]) -> dict[int, dict[int, Rows]]:
        """Everybody's rows. counts: table by table, how many each microbatch has."""
        widths = [self._replica.parameters[table].shape[1] for table in self._tables]
        sizes = [
            [sum(counts[k][number] for number in share) * (1 + width) for k, width in enumerate(widths)]
            for share in self.shares
        ]
        longest = max(1, *(sum(size) for size in sizes))
        if len(self._packed) < longest:
            self._packed = self._exchange.new_buffer(2 * longest, self._replica.space.dtype)
        position = 0
        for mine, elements in zip(self._rows.values(), sizes[self._exchange.rank], strict=True):
            pack([mine[number] for number in self.shares[self._exchange.rank]], self._packed[position:])
            position += elements
        everyone = self._packed.new_empty(longest * self._exchange.workers)
        self._exchange.gather_shards(self._packed[:longest], everyone)
        found: dict[int, dict[int, Rows]] = {table: {} for table in self._tables}
        for share, size, content in zip(self.shares, sizes, everyone.split(longest), strict=True):
            for k, table in enumerate(self._tables):
                rows = unpack(content[sum(size[:k]) :], [counts[k][number] for number in share], widths[k])
                found[table].update(zip(share, rows, strict=True))
        return found

    def _tally(self, request: int) -> tuple[Totals, list[list[int]]]:
        """Add the workers' facts as integers: exact in any order. A float64 travels as its bits, zero from all but
        one. Return the totals, and how many rows of each table each microbatch has."""
        assert self._step is not None
        microbatches = len(self._step.microbatches)
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
        counts = torch.zeros(len(self._tables), microbatches, dtype=torch.int64)
        for k, rows in enumerate(self._rows.values()):
            for number, one in rows.items():
                counts[k, number] = len(one.numbers)
        facts = [losses.view(torch.int64), weights, self._used, integers.cpu(), requests, pace, counts.view(-1)]
        mine = torch.cat(facts)
        device = self._replica.flat.device
        everyone = self._exchange.add_integers(mine.to(device)).cpu()
        everything = everyone.split([len(fact) for fact in facts])
        loss_bits, weights, used, integers, requests, pace, rows_each = everything
        self._learn(*pace.tolist())
        stops, regroups = requests.tolist()
        asked = STOP if stops else REGROUP if regroups else RUNNING
        totals = self._conclude(loss_bits.view(torch.float64).tolist(), weights.tolist(), used, integers, asked)
        return totals, rows_each.view(counts.shape).tolist()

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
        """Write parts (None: zeros) of what is no table into a flat buffer of the space, or add them to it."""
        key = buffer.data_ptr()
        if key not in self._views:
            segments = self._replica.space.segments
            self._views[key] = [segments[index].view(buffer) for index in self._dense]
        targets: list[Tensor] = []
        values: list[Tensor] = []
        absent: list[Tensor] = []
        for view, part in zip(self._views[key], parts, strict=True):
            if part is None:
                absent.append(view)
            else:
                targets.append(view)
                values.append(part)
        if targets:
            (torch._foreach_add_ if add else torch._foreach_copy_)(targets, values)
        if absent:  # adding 0.0 makes +0.0 of −0.0, just as adding a buffer of zeros would
            torch._foreach_add_(absent, 0.0) if add else torch._foreach_zero_(absent)


def _some(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:5])) + (", …" if len(samples) > 5 else "")
