"""What one microbatch adds to a step: a pure function of (parameters and buffers at the step's start, microbatch, key).

Owns the key, and the handling of buffers; the backend computes the forward and backward pass. Does not add
contributions up, and depends on neither worker nor shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unisono.determinism import keys
from unisono.engine.numerics import Settings
from unisono.engine.replica import Replica
from unisono.exchange.protocol import Offload
from unisono.processes.forking import end_copy


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
    """Computes contributions: a `Contributor`, or a wrapper that records, audits or times one."""

    def contribute(self, step: int, number: int, microbatch: dict[str, Tensor]) -> Contribution: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributor:
    """Computes contributions with one replica.

    offload: where other workers find some of the work; None: nowhere. halfway: called between the forward and the
    backward pass, to read the clock there. settings: the known state of the process, in which each contribution begins,
    and which the task cannot change for what follows it.
    """

    replica: Replica
    seed: int
    offload: Offload | None = None
    halfway: Callable[[], None] | None = None
    settings: Settings | None = None

    def contribute(self, step: int, number: int, microbatch: Mapping[str, Tensor]) -> Contribution:
        """Compute the contribution of microbatch `number` of `step`; leave the replica as it was.

        Raises:
            ContractError: the task returned no scalar sum, or no whole number of terms.
        """
        replica = self.replica
        key = keys.key(self.seed, "contribution", step, number)
        if self.settings is not None:  # the data's code may have changed it
            self.settings.keep()
        keys.seed_all(key)
        process = os.getpid()
        sums = replica.backend.contribute(microbatch, key, offload=self.offload, halfway=self.halfway)
        end_copy(process)
        if self.settings is not None:
            self.settings.keep()
        changes = [None if change is None else change.mul_(sums.terms) for change in replica.take_buffer_changes()]
        integers = replica.integer_values()
        replica.restore_buffers()
        return Contribution(
            loss=sums.loss.to(torch.float64), terms=sums.terms, parts=sums.gradients + changes, integers=integers
        )
