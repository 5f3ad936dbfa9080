"""From my shard of the gradient to all workers' new weights: the norm, the update, and the second crossing.

Owns the optimiser's state, of which each worker keeps its shard. An update goes through the shard in one pass
(`kernels/update.py`), or else in chunks, so that what one operation has read or written is still in the processor's
cache for the next; all cuts lie on the grid of 64 elements, and nothing depends on them. The rules themselves are in
`kernels/update_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.backends.backend import Group
from unisono.config.sections import Train
from unisono.determinism.space import BLOCK, Shard, Space
from unisono.engine.arrays import AVERAGE, WEIGHTS, Arrays, PrivateArrays
from unisono.engine.reduction import Sum, Totals
from unisono.engine.replica import Replica
from unisono.engine.sparse_rows import Rows
from unisono.engine.sparse_tables import Behind, Named, Table, tables_of
from unisono.errors import DivergedError
from unisono.exchange.protocol import Exchange
from unisono.kernels.update import LARGE, AdamWalk, Gradient, find_adam
from unisono.kernels.update_rules import RULES, SLOTS, UpdateSlice

CHUNK = 256 * BLOCK  # elements: larger ones leave the cache, smaller ones are made of calls


def array_names(train: Train) -> list[str]:
    """The arrays that a run keeps: weights, the state of its rule, and averaged weights where the recipe sets them."""
    return [WEIGHTS, *SLOTS[train.optimizer], *([AVERAGE] if train.ema_decay else [])]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardChunk:
    """A part of my shard: either of parameters or of buffers.

    place: its place in the shard, whole blocks. pieces: number of each parameter in it, its group, and where its
    part lies in the chunk.
    """

    place: slice
    pieces: tuple[tuple[int, int, slice], ...]


def cut(space: Space, shard: Shard, size: int) -> tuple[list[ShardChunk], slice]:
    """Cut a shard into chunks of parameters, tables left out, and the part that holds buffers.

    size: most elements of a chunk, whole blocks.
    """
    end = min(max(space.parameter_blocks * BLOCK - shard.start, 0), shard.size)
    tables = [place for segment in space.parameters if segment.table and (place := shard.local(segment)) is not None]
    edges = [0, *(edge for place in tables for edge in (place.start, place.stop)), end]
    places = [
        slice(start, min(start + size, stop))
        for first, stop in zip(edges[::2], edges[1::2], strict=True)
        for start in range(first, stop, size)
    ]
    chunks = []
    for place in places:
        part = Shard(rank=0, workers=1, size=place.stop - place.start)
        pieces = []
        for index, segment in enumerate(space.parameters):
            first = max(segment.start - shard.start - place.start, 0)
            last = min(segment.stop - shard.start - place.start, part.size)
            if first < last:
                pieces.append((index, segment.group, slice(first, last)))
        chunks.append(ShardChunk(place=place, pieces=tuple(pieces)))
    return chunks, slice(end, shard.size)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known before an update begins. counts: int64, updates that each parameter will have had. factor: clipping
    multiplies the gradient by it."""

    used: Sequence[bool]
    counts: Tensor
    rate: float
    ema_decay: float
    factor: float = 1.0

    @cached_property
    def count_tensors(self) -> Sequence[Tensor]:
        """The counts as float32 scalars."""
        return self.counts.to(torch.float32).unbind(0)


class Optimizer:
    """My shard of weights, optimiser state and averaged weights, and the rule that updates them.

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
        self._adam = None if self.arrays.in_place else find_adam(train, replica.flat)
        on_cpu, whole = replica.flat.device.type == "cpu", replica.shard.size
        self._chunk_elements = min(CHUNK, whole) if on_cpu else whole  # a GPU gains nothing from small chunks
        size = whole if self._adam else self._chunk_elements  # one pass gains nothing from them, either
        self._chunks, self._buffers = cut(replica.space, replica.shard, size)
        self._tables = tables_of(replica.space, replica.shard)
        self._behind = Behind(self._tables)
        self._scratch = replica.flat.new_empty(self._chunk_elements)
        self._met = False  # whether all workers have met since they wrote the new arrays
        self._hold(self.arrays.mine())
        if not self.arrays.committed:  # the average begins as the weights, everything else at zero
            for target in (self.weights, self.average):
                if target is not None:
                    target.copy_(replica.shard.of(replica.flat))

    def _hold(self, arrays: dict[str, Tensor]) -> None:
        self.weights = arrays[WEIGHTS]
        self.slots = {name: arrays[name] for name in SLOTS[self._train.optimizer]}
        self.average = arrays.get(AVERAGE)

    def update(self, gradient: Sum, totals: Totals, *, step: int, rate: float) -> float:
        """Compute one step, up to `publish`. Return the norm of the whole gradient.

        `gradient` is my shard of the sum of contributions, and is overwritten.

        Raises:
            DivergedError: the gradient is not finite; the committed content of `arrays` is unchanged.
        """
        old, new = self.arrays.mine(), self.arrays.begin()
        known = self._know(totals, step, rate)
        squares = torch.zeros(self._replica.shard.size // BLOCK, dtype=torch.float64, device=self._replica.flat.device)
        touched = {
            table.index: gradient.rows(table.index, table.first, table.last, totals.terms) for table in self._tables
        }
        for table in self._tables:
            table.add_squares(touched[table.index], squares)
        norm_first = new is old or bool(self._train.clip_norm)  # else the written arrays stay uncommitted
        if norm_first:
            for chunk in self._chunks:
                gradient.mean(chunk.place, totals.terms, squares=_blocks(squares, chunk))
            norm = self._norm(squares, totals, step)
            clip = self._train.clip_norm
            if clip and norm > clip:
                known = replace(known, factor=clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
                for rows in touched.values():
                    rows.values.mul_(known.factor)
        for chunk in self._chunks:
            if norm_first:
                part = Gradient(values=[gradient.left(chunk.place)], factor=known.factor)
            else:
                nodes = gradient.nodes(chunk.place)
                asked = _blocks(squares, chunk)
                part = Gradient(values=nodes, additions=gradient.additions, terms=totals.terms, squares=asked)
            self._apply(part, chunk, old, new, known)
        self._update_tables(touched, old, new, known)
        self._move_buffers(gradient.mean(self._buffers, totals.terms), old, new, known)
        if not norm_first:
            norm = self._norm(squares, totals, step)
        self._met = not norm_first  # false where arrays are updated in place, or copied by the commit
        if self._train.lazy_rows and new is not old:
            self._behind.commit(_copy(new), {table: rows.numbers for table, rows in touched.items()})
        self._hold(new)
        self.counts += torch.tensor(totals.used, dtype=torch.int64)
        return norm

    def _know(self, totals: Totals, step: int, rate: float) -> Known:
        counts = (self.counts + 1).to(self._replica.flat.device)
        decay = min(self._train.ema_decay, (1 + step) / (10 + step))
        return Known(used=totals.used, counts=counts, rate=rate, ema_decay=decay)

    def publish(self, integers: Tensor, facts: Mapping[str, Any] | None = None) -> None:
        """Commit the present arrays, with the step's integer buffers and its other facts; afterwards `replica.flat`
        holds all workers' new weights."""
        self.arrays.commit(facts or {}, self.counts, integers, met=self._met)
        self._met = False
        self._replica.show(self.arrays.whole(WEIGHTS))
        self._replica.accept(integers)

    def _apply(self, gradient: Gradient, chunk: ShardChunk, old: Named, new: Named, known: Known) -> None:
        """Run the rule on those parameters of a chunk that got a gradient; skip the others, as torch skips None."""
        if self._adam:
            self._update_in_one_pass(self._adam, gradient, chunk, old, new, known)
        else:
            self._copy_and_update(gradient, chunk, old, new, known)
        if AVERAGE in new:
            new[AVERAGE][chunk.place].lerp_(new[WEIGHTS][chunk.place], 1 - known.ema_decay)

    def _copy_and_update(self, gradient: Gradient, chunk: ShardChunk, old: Named, new: Named, known: Known) -> None:
        mean, values = gradient.resolve(self._scratch), _moved(chunk.place, old, new)
        for number, group in enumerate(self._replica.groups):
            places = [(index, place) for index, owner, place in chunk.pieces if owner == number and known.used[index]]
            if places:
                pieces = UpdateSlice(
                    weights=[values[WEIGHTS][place] for _, place in places],
                    gradients=[mean[place] for _, place in places],
                    slots=tuple([values[name][place] for _, place in places] for name in self.slots),
                    counts=[known.count_tensors[index] for index, _ in places],
                )
                self._run_rule(group, pieces, known.rate)

    def _update_in_one_pass(
        self, rule: AdamWalk, gradient: Gradient, chunk: ShardChunk, old: Named, new: Named, known: Known
    ) -> None:
        pieces, counts = [], known.counts.tolist()
        for index, number, place in chunk.pieces:
            settings = self._settings(self._replica.groups[number], known.rate)
            pieces.append((place.stop, (counts[index], *settings) if known.used[index] else None))
        before, after = ([array[name][chunk.place] for name in (WEIGHTS, *self.slots)] for array in (old, new))
        rule.update(gradient, pieces, before, after, past_caches=self._replica.shard.size >= LARGE)
        if AVERAGE in new:
            new[AVERAGE][chunk.place] = old[AVERAGE][chunk.place]

    def _settings(self, group: Group, rate: float) -> tuple[float, float]:
        """A group's learning rate and weight decay."""
        factor = self._train.pretrained_rate if group.pretrained else 1.0
        return rate * factor, self._train.weight_decay if group.decays else 0.0

    def _run_rule(self, group: Group, pieces: UpdateSlice, rate: float) -> None:
        with torch.no_grad():
            RULES[self._train.optimizer](self._train, pieces, *self._settings(group, rate))

    def _update_tables(self, touched: Mapping[int, Rows], old: Named, new: Named, known: Known) -> None:
        """Run the rule on every row of each table, or on those that the step touched, as the recipe says."""
        if not self._train.lazy_rows:
            for table in self._tables:
                for place, mean in table.dense(touched[table.index], self._chunk_elements):
                    pieces = ((table.index, table.group, slice(0, len(mean))),)
                    self._apply(Gradient(values=[mean]), ShardChunk(place=place, pieces=pieces), old, new, known)
            return
        if new is not old:
            self._behind.catch_up(_copy(new), old, new, touched)
        for table in self._tables:
            if known.used[table.index]:  # else there are no such rows
                table.update(touched[table.index], old, new, self._rule_of(table, known))

    def _rule_of(self, table: Table, known: Known) -> Callable[[Tensor, Named], None]:
        def rule(gradient: Tensor, values: Named) -> None:
            pieces = UpdateSlice(
                weights=[values[WEIGHTS]],
                gradients=[gradient],
                slots=tuple([values[name]] for name in self.slots),
                counts=[known.count_tensors[table.index]],
            )
            self._run_rule(self._replica.groups[table.group], pieces, known.rate)

        return rule

    def _move_buffers(self, change: Tensor, old: Named, new: Named, known: Known) -> None:
        """Add the mean change of the buffers in my shard."""
        values = _moved(self._buffers, old, new)
        weights = values[WEIGHTS].add_(change)
        if AVERAGE in values:  # an untouched −inf, as in masks, has no mean with itself
            average = values[AVERAGE]
            average.copy_(torch.where(average == weights, average, average.lerp(weights, 1 - known.ema_decay)))

    def _norm(self, squares: Tensor, totals: Totals, step: int) -> float:
        """Euclidean norm of the whole gradient, from the squares of my blocks: added in a tree, whichever worker owns
        them.

        Raises:
            DivergedError: it is not finite.
        """
        everyone = torch.zeros(len(squares) * self._exchange.workers, dtype=torch.float64, device=squares.device)
        self._exchange.gather_shards(squares, everyone)
        norm = math.sqrt(fold_vector(everyone[: self._replica.space.parameter_blocks]))
        if not math.isfinite(norm):
            raise DivergedError(
                f"the gradient's norm is {norm} at step {step + 1}, though the loss is {totals.loss:.6g}. No "
                "update was made. Lower train.learning_rate, or set train.clip_norm = 1.0."
            )
        return norm


def _copy(arrays: Named) -> int:
    """What distinguishes the copies of the arrays."""
    return arrays[WEIGHTS].data_ptr()


def _blocks(squares: Tensor, chunk: ShardChunk) -> Tensor:
    return squares[chunk.place.start // BLOCK : chunk.place.stop // BLOCK]


def _moved(place: slice, old: Named, new: Named) -> dict[str, Tensor]:
    """A part of the new arrays, with the content of the old ones."""
    values = {name: array[place] for name, array in new.items()}
    if new is not old:
        for name, value in values.items():
            value.copy_(old[name][place])
    return values


def fold_vector(values: Tensor) -> float:
    """Add a vector's elements in the fixed tree."""
    level = values.cpu().numpy()
    while len(level) > 1:
        pairs = len(level) // 2
        level = np.concatenate([level[: 2 * pairs : 2] + level[1 : 2 * pairs : 2], level[2 * pairs :]])
    return float(level[0])
