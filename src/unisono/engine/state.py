"""All that a step reads and writes.

Owns the list of what makes up a run's state, and the commit of a step; each part is owned by the object that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unisono.determinism.space import Segment
from unisono.engine.arrays import AVERAGE, BEST, WEIGHTS
from unisono.engine.optimizer import Optimizer
from unisono.engine.reduction import Totals
from unisono.engine.replica import Replica
from unisono.exchange.protocol import Exchange
from unisono.processes.progress_table import FINISH
from unisono.storage.checkpoints import Content


@dataclass(slots=True, kw_only=True)
class TrainState:
    """After `step` steps: weights and buffers (`replica`), optimiser state and averaged weights (`optimizer`, my
    shard).

    last: loss, norm and rate of the last step, plain values. evaluated: whether the evaluation that may follow it is
    done. has_best: whether the best evaluation's weights are kept. finished: an observer has requested the end, so no
    step follows; it is committed with the step, so that a loss after it changes nothing. stream: where a stream of
    samples stands, from its own state; None: there is none, or it has no state. read_stream: the same, for a number of
    steps. lineage: what came before the run or was added to it: the run whose weights it began with, and each time that
    it went on after its end; plain values.
    """

    step: int
    replica: Replica
    optimizer: Optimizer
    exchange: Exchange
    best_score: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    has_best: bool = False
    evaluated: bool = True
    finished: bool = False
    last: Mapping[str, Any] | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)
    read_stream: Callable[[int], Any] | None = None
    stream: Any = None
    _took_best: bool = False

    def commit(self, step: int, totals: Totals, last: Mapping[str, Any]) -> None:
        """Make the optimiser's result the state after `step` steps: on all workers, or on none."""
        self.step, self.last, self.evaluated = step, last, False
        self.finished = totals.request == FINISH
        self.stream = None if self.read_stream is None else self.read_stream(step)
        self.optimizer.publish(totals.integers, self.facts())

    def begin(self) -> None:
        """Commit the state that the run begins with, or goes on from."""
        self.optimizer.publish(self.replica.integer_values(), self.facts())

    def note_evaluation(self) -> None:
        """Commit what an evaluation has changed."""
        self.evaluated = True
        self.optimizer.arrays.note(self.facts())

    def facts(self) -> dict[str, Any]:
        """The plain values of this state."""
        return {
            "step": self.step,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "evaluations_since_best": self.evaluations_since_best,
            "has_best": self.has_best,
            "evaluated": self.evaluated,
            "finished": self.finished,
            "last": self.last,
            "lineage": self.lineage,
            **({} if self.read_stream is None else {"stream": self.stream}),
        }

    def recover(self, facts: Mapping[str, Any], counts: Tensor, integers: Tensor) -> None:
        """Go on from the committed state that the optimiser's arrays hold, with its facts."""
        for name in self.facts():
            setattr(self, name, facts[name])
        self.optimizer.counts.copy_(counts)
        self.replica.show(self.optimizer.arrays.whole(WEIGHTS))
        self.replica.accept(integers.clone())

    def judge(self, score: float, *, higher: bool, keep: bool) -> bool:
        """Compare an evaluation's score with the best so far; return whether it is better, and keep its weights if
        so. NaN is never better."""
        before = (-math.inf if higher else math.inf) if self.best_score is None else self.best_score
        first = self.best_score is None and not math.isnan(score)
        if not first and not (score > before if higher else score < before):
            self.evaluations_since_best += 1
            return False
        self.best_score, self.best_step, self.evaluations_since_best = score, self.step, 0
        if keep:
            optimizer = self.optimizer
            optimizer.arrays.best().copy_(optimizer.weights if optimizer.average is None else optimizer.average)
            optimizer.arrays.best_integers().copy_(self.replica.integer_values())
            self.has_best = True
        return True

    def take_best(self) -> None:
        """Put the best evaluation's weights into the replica, for good: there is no training after it."""
        if self.has_best:
            self._took_best = True
            self.replica.show(self.optimizer.arrays.whole(BEST))
            self.replica.accept(self.optimizer.arrays.best_integers().to(self.replica.flat.device, copy=True))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the replica holds the averaged weights, where the run has them (and has not taken the best ones)."""
        if self.optimizer.average is None or self._took_best:
            yield
            return
        own = self.replica.flat
        self.replica.show(self.optimizer.arrays.whole(AVERAGE))
        self.replica.restore_buffers()
        try:
            yield
        finally:
            self.replica.show(own)
            self.replica.restore_buffers()

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The whole optimiser state by name, gathered: "exp_avg.encoder.weight" …, and "updates.…" (int64 scalars).

        Every worker must call this. The result does not depend on their number.
        """
        space, optimizer = self.replica.space, self.optimizer
        found: dict[str, Tensor] = {}
        names = [*optimizer.slots, *([AVERAGE] if optimizer.average is not None else [])]
        for name in [*names, *([BEST] if self.has_best else [])]:
            flat = optimizer.arrays.whole(name)
            segments = space.parameters if name in optimizer.slots else space.segments
            found |= {f"{name}.{segment.name}": segment.view(flat).cpu().clone() for segment in segments}
        for segment, count in zip(space.parameters, self.optimizer.counts, strict=True):
            found[f"updates.{segment.name}"] = count.clone()
        if self.has_best:
            found["best_integers"] = optimizer.arrays.best_integers().cpu().clone()
        return found

    def content(self) -> Content:
        """The whole state as a checkpoint has it, gathered: every worker must call this."""
        parameters, everything = self.replica.tensors(), self.replica.all_tensors()
        facts = {name: value for name, value in self.facts().items() if name != "has_best"}
        buffers = {name: value for name, value in everything.items() if name not in parameters}
        return Content(parameters=parameters, buffers=buffers, optimizer=self.optimizer_tensors(), facts=facts)

    def restore(self, content: Content) -> None:
        """Load a state that was saved under any number of workers.

        Raises:
            KeyError, RuntimeError: it is that of another model.
        """
        replica, optimizer = self.replica, self.optimizer
        for name in self.facts():
            setattr(self, name, content.facts.get(name, getattr(self, name)))
        tensors = content.optimizer
        module_tensors = content.parameters | content.buffers
        with torch.no_grad():
            replica.load(module_tensors)
            optimizer.weights.copy_(replica.shard.of(replica.flat))
            for slot, shard in optimizer.slots.items():
                shard.copy_(self._shard_of(slot, tensors, replica.space.parameters))
            if optimizer.average is not None:
                optimizer.average.copy_(self._shard_of(AVERAGE, tensors, replica.space.segments))
            self.has_best = "best_integers" in tensors
            if self.has_best:
                optimizer.arrays.best().copy_(self._shard_of(BEST, tensors, replica.space.segments))
                optimizer.arrays.best_integers().copy_(tensors["best_integers"])
            counts = [int(tensors[f"updates.{segment.name}"]) for segment in replica.space.parameters]
            optimizer.counts.copy_(torch.tensor(counts, dtype=torch.int64))

    def _shard_of(self, slot: str, tensors: Mapping[str, Tensor], segments: tuple[Segment, ...]) -> Tensor:
        """My shard of what was gathered under `slot`."""
        flat = torch.zeros_like(self.replica.flat)
        for segment in segments:
            segment.view(flat).copy_(tensors[f"{slot}.{segment.name}"])
        return self.replica.shard.of(flat)
