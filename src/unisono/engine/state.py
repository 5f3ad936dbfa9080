"""All that a step reads and leaves behind.

Owns the list of what makes up a run's state; each part is owned by the object that it lies in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.engine.optimizer import Optimizer
from unisono.engine.replica import Replica
from unisono.engine.space import Segment
from unisono.exchange.protocol import Exchange


@dataclass(slots=True, kw_only=True)
class TrainState:
    """After `step` steps: weights and buffers (`replica`), optimiser state and averaged weights (`optimizer`, my
    shard)."""

    step: int
    replica: Replica
    optimizer: Optimizer
    exchange: Exchange
    best_score: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    best_weights: Tensor | None = None
    """My shard of the best evaluation's weights, where they are kept."""
    best_integers: Tensor | None = None

    def judge(self, score: float, *, higher: bool, keep: bool) -> bool:
        """Compare an evaluation's score with the best so far; return whether it is better, and keep its weights if
        so."""
        if self.best_score is not None and not (score > self.best_score if higher else score < self.best_score):
            self.evaluations_since_best += 1
            return False
        self.best_score, self.best_step, self.evaluations_since_best = score, self.step, 0
        if keep:
            average = self.optimizer.average
            self.best_weights = (self.optimizer.weights if average is None else average).clone()
            self.best_integers = self.replica.integer_values()
        return True

    def take_best(self) -> None:
        """Put the best evaluation's weights into the replica (and the average, where there is one), for good."""
        if self.best_weights is None or self.best_integers is None:
            return
        self.exchange.gather_shards(self.best_weights, self.replica.flat)
        self.replica.accept(self.best_integers)
        if self.optimizer.average is not None:
            self.optimizer.average.copy_(self.best_weights)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the replica holds the averaged weights, where there are such."""
        average = self.optimizer.average
        if average is None:
            yield
            return
        own = self.replica.flat.clone()
        self.exchange.gather_shards(average, self.replica.flat)
        try:
            yield
        finally:
            self.replica.flat.copy_(own)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The whole optimiser state by name, gathered: "exp_avg.encoder.weight" …, and "updates.…" (int64 scalars).

        Every worker must call this. The result does not depend on their number.
        """
        space, optimizer = self.replica.space, self.optimizer
        found: dict[str, Tensor] = {}
        shards = dict(optimizer.slots)
        shards |= {
            name: shard
            for name, shard in (("average", optimizer.average), ("best", self.best_weights))
            if shard is not None
        }
        flat = torch.zeros_like(self.replica.flat)
        for slot, shard in shards.items():
            self.exchange.gather_shards(shard, flat)
            segments = space.parameters if slot in optimizer.slots else space.segments
            found |= {f"{slot}.{segment.name}": segment.view(flat).cpu().clone() for segment in segments}
        for segment, count in zip(space.parameters, self.optimizer.counts, strict=True):
            found[f"updates.{segment.name}"] = count.clone()
        if self.best_integers is not None:
            found["best_integers"] = self.best_integers.cpu().clone()
        return found

    def restore(self, module_tensors: dict[str, Tensor], optimizer_tensors: dict[str, Tensor]) -> None:
        """Take over weights, buffers and optimiser state that were saved under any number of workers."""
        replica, optimizer = self.replica, self.optimizer
        with torch.no_grad():
            for name, value in replica.all_tensors().items():
                value.copy_(module_tensors[name])
            replica.accept(replica.integer_values())
            if self.exchange.workers > 1:
                optimizer.weights.copy_(replica.shard.of(replica.flat))
            for slot, shard in optimizer.slots.items():
                shard.copy_(self._shard_of(slot, optimizer_tensors, replica.space.parameters))
            if optimizer.average is not None:
                optimizer.average.copy_(self._shard_of("average", optimizer_tensors, replica.space.segments))
            if "best_integers" in optimizer_tensors:
                self.best_weights = self._shard_of("best", optimizer_tensors, replica.space.segments)
                self.best_integers = optimizer_tensors["best_integers"].to(replica.flat.device)
            counts = [int(optimizer_tensors[f"updates.{segment.name}"]) for segment in replica.space.parameters]
            optimizer.counts.copy_(torch.tensor(counts, dtype=torch.int64))

    def _shard_of(self, slot: str, tensors: dict[str, Tensor], segments: tuple[Segment, ...]) -> Tensor:
        """My shard of what was gathered under `slot`."""
        flat = torch.zeros_like(self.replica.flat)
        for segment in segments:
            segment.view(flat).copy_(tensors[f"{slot}.{segment.name}"])
        return self.replica.shard.of(flat).clone()
