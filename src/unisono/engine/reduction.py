"""From a step's contributions to my shard of its gradient: the tree, and the first crossing to other workers.

A gradient is added where autograd has left it; the last addition of a node that I send is written where others read it.
Owns the buffers for that, and the *tally*: the small exact facts of a step that every worker learns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.data.order import Step
from unisono.determinism.nodes import Node, fold, nodes
from unisono.determinism.tree import Tree, additions
from unisono.engine.assignment import Assignment
from unisono.engine.contribution import Contribution
from unisono.engine.replica import Replica
from unisono.engine.sparse_rows import Rows, add_up, pack, rows_of, unpack
from unisono.errors import ContractError, DivergedError, LostPeerError
from unisono.exchange.protocol import Exchange
from unisono.kernels.update import mean
from unisono.processes.progress_table import FINISH, REGROUP, RUNNING, STOP

REQUESTS = (STOP, FINISH, REGROUP)  # the first one that any worker reports counts for all


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What every worker knows of a finished step.

    loss: mean over all terms, float64 arithmetic. terms: number of terms. used: whether each parameter got a gradient
    at all. integers: int64, the integer buffers as microbatch 0 left them. request: the request to the workers
    after this step: one of REQUESTS or `progress_table.RUNNING`.
    """

    loss: float
    terms: int
    used: list[bool]
    integers: Tensor
    request: int


class Sum:
    """My shard of the *sum* of a step's contributions, still in nodes: each part is added as the tree says when it is
    needed. Their memory is overwritten freely.

    Attributes:
        additions: how the nodes are added, see `tree.additions`.
    """

    def __init__(
        self, nodes: Sequence[tuple[Node, Tensor]], tables: Mapping[int, Mapping[int, Rows]] | None = None
    ) -> None:
        """tables: number of the parameter → number of the microbatch → its rows. They are no part of the nodes."""
        self._values = [value for _, value in nodes]
        self.additions = additions([node for node, _ in nodes])
        self._tables = tables or {}

    def nodes(self, place: slice) -> list[Tensor]:
        """A part of the shard, of each node."""
        return [value[place] for value in self._values]

    def mean(self, place: slice, terms: int, into: Tensor | None = None, *, squares: Tensor | None = None) -> Tensor:
        """A part of the shard, added and divided by the step's number of terms, once: in the beginning of `into`, or
        left where `left` finds it. squares: float64, gets the sum of squares of each of its blocks."""
        target = self.left(place) if into is None else into[: place.stop - place.start]
        return mean(self.nodes(place), self.additions, terms, target, squares)

    def rows(self, table: int, first: int, last: int, terms: int) -> Rows:
        """The rows of a table that any microbatch touched, from `first` up to `last`, `last` excluded, divided by the
        step's terms."""
        found = add_up(self._tables[table], first, last)
        found.values.div_(terms)
        return found

    def left(self, place: slice) -> Tensor:
        """What `mean` has left of a part."""
        return self._values[0][place]


class Reduction:
    """Adds up one step at a time.

    Attributes:
        shares: which microbatches of the present step each worker computes, by rank.
    """

    def __init__(self, replica: Replica, exchange: Exchange) -> None:
        self._replica = replica
        self._exchange = exchange
        self._tree: Tree[list[Tensor | None]] = Tree(self._combine)
        self._buffers: list[Tensor] = []  # of the nodes that I send, in their order
        self._views: list[list[Tensor]] = []  # the parts in each buffer
        self._targets: dict[Node, list[Tensor]] = {}  # node of the present step that I send → the parts in its buffer
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
        self._began = time.perf_counter() + self._taken()
        self.shares = self._assignment.shares(len(step.microbatches))
        self._tree.clear()
        mine = nodes(self.shares[self._exchange.rank])
        while len(self._buffers) < len(mine):
            self._add_buffer()
        self._targets = dict(zip(mine, self._views, strict=False))
        self._used = torch.zeros(self._parameters, dtype=torch.int64)
        self._scalars: dict[int, tuple[Tensor, int]] = {}
        self._rows: dict[int, dict[int, Rows]] = {table: {} for table in self._tables}
        self._first_integers: Tensor | None = None
        return self.shares[self._exchange.rank]

    def add(self, number: int, contribution: Contribution) -> None:
        """Add microbatch `number`'s contribution, whose parts are then overwritten; numbers rise."""
        node, dense = Node(0, number), [contribution.parts[index] for index in self._dense]
        if node in self._targets:  # no addition writes to it
            copy_parts(dense, self._targets[node])
            dense = []
        self._tree.add(node, dense)
        for table, rows in self._rows.items():
            rows[number] = rows_of(contribution.parts[table], self._replica.parameters[table])
        self._scalars[number] = (contribution.loss, contribution.terms)
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
        if sum(rows.elements for rows in self._my_rows()) <= len(self._packed):
            pack(self._my_rows(), self._packed)
        totals, told = self._tally(request)
        names = [row[: len(nodes(share))] for row, share in zip(told["names"].tolist(), self.shares, strict=True)]
        received = self._exchange.to_owners(
            self._buffers[: len(self._targets)],
            names,
            shard_size=self._replica.shard.size,
            dtype=self._replica.space.dtype,
        )
        owned = [node for share in self.shares for node in nodes(share)]
        tables = self._gather_rows(told["rows"].tolist(), told["names"][:, -1].tolist()) if self._tables else {}
        return Sum(list(zip(owned, received, strict=True)), tables), totals

    def _my_rows(self) -> list[Rows]:
        """Table by table, those of each microbatch."""
        return [rows for table in self._rows.values() for rows in table.values()]

    def _gather_rows(self, counts: list[list[int]], names: list[int]) -> dict[int, dict[int, Rows]]:
        """All workers' rows. counts: table by table, how many each microbatch has. names: of all workers' packed
        rows."""
        widths = [self._replica.parameters[table].shape[1] for table in self._tables]
        sizes = [
            [sum(counts[k][number] for number in share) * (1 + width) for k, width in enumerate(widths)]
            for share in self.shares
        ]
        longest = max(1, *(sum(size) for size in sizes))
        fits = longest <= len(self._packed)  # for all, or for none: the buffers are equally long
        if not fits:
            self._packed = self._exchange.new_buffer(2 * longest, self._replica.space.dtype)
            pack(self._my_rows(), self._packed)
        everyone = self._packed.new_empty(longest * self._exchange.workers)
        self._exchange.gather_shards(self._packed[:longest], everyone, names if fits else None)
        found: dict[int, dict[int, Rows]] = {table: {} for table in self._tables}
        for share, size, content in zip(self.shares, sizes, everyone.split(longest), strict=True):
            for k, table in enumerate(self._tables):
                rows = unpack(content[sum(size[:k]) :], [counts[k][number] for number in share], widths[k])
                found[table].update(zip(share, rows, strict=True))
        return found

    def _tally(self, request: int) -> tuple[Totals, dict[str, Tensor]]:
        """Add the workers' facts as integers: exact in any order. A float64 travels as its bits, zero from all workers
        except one. Return the totals, and the other facts: "names" of all workers' buffers, int64 [workers, nodes + 1],
        the last that of packed rows; "rows" that each microbatch has of each table, int64 [tables, microbatches]."""
        assert self._step is not None
        microbatches, rank, workers = len(self._step.microbatches), self._exchange.rank, self._exchange.workers
        losses, terms = torch.zeros(microbatches, dtype=torch.float64), torch.zeros(microbatches, dtype=torch.int64)
        for number, (loss, count) in self._scalars.items():
            losses[number], terms[number] = loss, count
        integers = self._first_integers
        if integers is None:
            integers = torch.zeros(self._integers, dtype=torch.int64)
        pace = torch.zeros(workers + 1, dtype=torch.int64)
        pace[rank] = round((time.perf_counter() + self._taken() - self._began) * 1e6) if self._scalars else 0
        pace[-1] = self._assignment.number
        names = torch.zeros(workers, 1 + max(len(nodes(share)) for share in self.shares), dtype=torch.int64)
        for place in range(len(self._targets)):
            names[rank, place] = self._exchange.name(self._buffers[place])
        names[rank, -1] = self._exchange.name(self._packed)
        rows = torch.zeros(len(self._tables), microbatches, dtype=torch.int64)
        for k, table in enumerate(self._rows.values()):
            for number, one in table.items():
                rows[k, number] = len(one.numbers)
        places = torch.zeros(workers, 2, dtype=torch.int64)
        places[rank, 0], places[rank, 1] = self._exchange.generation, self._step.number + 1
        facts = {
            "places": places,  # first: so they are found even where another step's facts are longer
            "losses": losses.view(torch.int64),
            "terms": terms,
            "used": self._used,
            "integers": integers.cpu(),
            "requests": torch.tensor([int(request == asked) for asked in REQUESTS]),
            "pace": pace,
            "names": names,
            "rows": rows,
        }
        mine = torch.cat([fact.view(-1) for fact in facts.values()])
        everyone = self._exchange.add_integers(mine)
        self._compare_places(everyone[: places.numel()].view(workers, 2).tolist())
        parts = everyone.split([fact.numel() for fact in facts.values()])
        told = {name: part.view(fact.shape) for (name, fact), part in zip(facts.items(), parts, strict=True)}
        self._learn(*told["pace"].tolist())
        return self._conclude(told), told

    def _compare_places(self, places: list[list[int]]) -> None:
        """Refuse to add parts of different steps. places: by rank, generation and step of each worker."""
        mine = places[self._exchange.rank]
        if places != [mine] * len(places):
            told = ", ".join(f"worker {n} at step {step} (group {group})" for n, (group, step) in enumerate(places))
            raise LostPeerError(f"the workers are not at the same step: {told}")

    def _taken(self) -> float:
        """Seconds that other workers have saved me, in all: they count as time of my microbatches."""
        return self._exchange.offload.taken_seconds if self._exchange.offload else 0.0

    def _learn(self, *pace: int) -> None:
        """Let the next step's shares follow what this one took: every worker gets the same numbers."""
        *microseconds, numbers = pace
        if numbers != self._assignment.number * self._exchange.workers:
            raise LostPeerError("the workers do not agree on the shares of this step")
        self._assignment.learn(microseconds)

    def _conclude(self, told: dict[str, Tensor]) -> Totals:
        assert self._step is not None
        losses, counts = told["losses"].view(torch.float64).tolist(), told["terms"].tolist()
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"the loss is {loss} at step {self._step.number + 1}, microbatch {number} (samples "
                    f"{_some(self._step.microbatches[number].tolist())}). No update was made. "
                    "Lower train.learning_rate, set train.clip_norm = 1.0, or look at these samples."
                )
        terms = sum(counts)
        if terms == 0:
            raise ContractError(
                f"step {self._step.number + 1} has no terms: the task's loss returned 0 for all its microbatches."
            )
        return Totals(
            loss=fold(losses) / terms,
            terms=terms,
            used=(told["used"] > 0).tolist(),
            integers=told["integers"],
            request=next((REQUESTS[place] for place, count in enumerate(told["requests"].tolist()) if count), RUNNING),
        )

    def _combine(self, node: Node, left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
        """A node's parts, of those of its children: where the left ones lie, or where I send the node from."""
        if node not in self._targets:
            return add_parts(left, right)
        add_parts_into(left, right, self._targets[node])
        return []

    def _add_buffer(self) -> None:
        segments = self._replica.space.segments
        self._buffers.append(self._exchange.new_buffer(self._replica.flat.numel(), self._replica.space.dtype))
        self._views.append([segments[index].view(self._buffers[-1]) for index in self._dense])


def add_parts(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add the parts of two nodes, in place where either has them. None is zeros; adding 0.0 makes +0.0 of −0.0."""
    both = [(one, other) for one, other in zip(left, right, strict=True) if one is not None and other is not None]
    if both:
        torch._foreach_add_([one for one, _ in both], [other for _, other in both])
    found = [one if one is not None else other for one, other in zip(left, right, strict=True)]
    alone = [one for one, l, r in zip(found, left, right, strict=True) if one is not None and (l is None or r is None)]
    if alone:
        torch._foreach_add_(alone, 0.0)
    return found


def add_parts_into(left: Sequence[Tensor | None], right: Sequence[Tensor | None], targets: Sequence[Tensor]) -> None:
    """As `add_parts`, with the sum in `targets`."""
    for one, other, target in zip(left, right, targets, strict=True):
        given = [part for part in (one, other) if part is not None]
        if len(given) == 2:
            torch.add(*given, out=target)
        elif given:
            torch.add(given[0], 0.0, out=target)
        else:
            target.zero_()


def copy_parts(parts: Sequence[Tensor | None], targets: Sequence[Tensor]) -> None:
    """Write a node's parts into `targets`."""
    given = [(target, part) for target, part in zip(targets, parts, strict=True) if part is not None]
    absent = [target for target, part in zip(targets, parts, strict=True) if part is None]
    if given:
        torch._foreach_copy_([target for target, _ in given], [part for _, part in given])
    if absent:
        torch._foreach_zero_(absent)


def _some(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:5])) + (", …" if len(samples) > 5 else "")
