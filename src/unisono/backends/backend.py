"""The interface of what computes contributions: a model in one framework, seen as pure functions over named arrays.

    contribute: (parameters, buffers, microbatch, key) → sum of the losses, terms, gradients, buffers afterwards
    measure:    (parameters, buffers, microbatch, key) → results per sample

Owns the interface and what every backend checks in the same way. Everything around it (the tree, the exchange, the
optimiser, snapshot, checkpoints, audit, evaluation) is computed by the engine over torch tensors, for all backends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from unisono.config.sections import Train
from unisono.errors import ContractError
from unisono.exchange.protocol import Offload
from unisono.tasks.task import Microbatch, Task

Measurement = Callable[[Any, Microbatch], Mapping[str, Tensor]]
"""A task's `measure`, or another method of its form: (model, microbatch) → name → [samples] or [samples, k]. The model
is the object that the backend gives to tasks: an `nn.Module`, with torch."""
Measure = Callable[[Microbatch, int], Mapping[str, Tensor]]
"""(microbatch, key) → the results of a `Measurement`, as torch tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that share a factor on the rate and a choice of weight decay."""

    pretrained: bool
    decays: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParameter:
    """One parameter of a model.

    value: its present value, of any strides. group: None for a frozen one, which no step changes. table: whether its
    gradients come as rows ([rows, width] only).
    """

    name: str
    value: Tensor
    group: Group | None
    table: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchSums:
    """The result of `Backend.contribute`, without the buffers.

    loss: scalar float tensor, the sum of the losses. terms: how many terms are in it. gradients: of that sum, one for
    each adopted parameter in their order, of its shape, dtype and device; None where the loss does not depend on it.
    A table's gradient is a coalesced sparse tensor with one sparse dimension, or dense, and holds no −0.0. The engine
    adds to gradients in place: they share memory neither with each other nor with what the backend keeps.
    """

    loss: Tensor
    terms: int
    gradients: list[Tensor | None]


class Backend(Protocol):
    """One model, and how a framework computes with it.

    *Names.* Parameters and buffers have names that are the same on every worker. An array that a model holds in several
    places has one name here. Trainable parameters are all float32, or all float64; buffers have any dtype and keep it,
    and their shape. A buffer of the parameters' dtype may change in training, and so may integer and boolean ones.

    *Memory.* Arrays are torch tensors. The engine owns those of trainable parameters and of buffers, once they are
    adopted: contiguous, on `device`, aligned to 256 bytes. A backend computes in them (torch), or copies out of them
    (most frameworks). It never writes to parameters, since other workers may read the same memory. Frozen parameters
    stay the backend's.

    *Purity.* Contributions and measurements depend on nothing except the adopted values, the microbatch and the key:
    they give the same bits on every worker, in any order, however often. Before each call the engine seeds the global
    generators of torch, NumPy and Python from `key`; a framework with random numbers of its own derives them from it.

    *Processes.* `build` is called in the process that computes, which may be forked from one that has imported
    this module: a framework whose threads do not survive a fork is imported, and started, in `build`.
    """

    name: ClassVar[str]

    @property
    def min_samples(self) -> int:
        """Fewest samples that a microbatch must have in training; 2 where samples are compared with each other, as by
        batch normalisation. Else 1."""
        ...

    """The name under which tasks choose it: `Task.backend`."""

    @classmethod
    def build(
        cls, task: Task, train: Train, *, key: int, device: torch.device, on_built: Callable[[Any], None] = ...
    ) -> Backend:
        """Put the framework into its known state (`train.threads`, deterministic kernels), and build the task's model
        there, with initial values that depend on `key` alone. `train.precision` is that of later computations."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Names and values that decide this backend's bits: its versions and settings, and a digest of what a few of
        its kernels compute. No names of torch, whose numerics the engine's fingerprint holds."""
        ...

    def parameters(self) -> Sequence[ModelParameter]:
        """Every parameter, in the model's order, frozen ones too; adopted values are in the adopted memory."""
        ...

    def buffers(self) -> Mapping[str, Tensor]:
        """Name → present value of every buffer, in the model's order; in the adopted memory, if there is one."""
        ...

    def adopt(self, parameters: Mapping[str, Tensor]) -> None:
        """Compute with these values of the trainable parameters, in this order, from now on.

        Called before the first contribution and whenever values have changed: once a step. The same mapping again means
        the same memory with other values, so a backend that computes in this memory has nothing to do. Frozen
        parameters may have changed as well, but only if `tensors` was written to.
        """
        ...

    def adopt_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        """Read the buffers' values here in each contribution from now on, and write the new ones here."""
        ...

    def contribute(
        self,
        microbatch: Microbatch,
        key: int,
        *,
        offload: Offload | None = None,
        halfway: Callable[[], None] | None = None,
    ) -> MicrobatchSums:
        """Compute one microbatch's sums; write the new buffer values to the adopted buffers. The engine restores their
        old values.

        offload: takes products that waiting workers may compute; ignored by a backend without such products. halfway:
        called between the forward and the backward pass, where they can be told apart.

        Raises:
            ContractError: the task returned no sum and number of terms (`check_sum`), or a buffer changed its shape.
        """
        ...

    def measuring(self, measure: Measurement) -> AbstractContextManager[Measure]:
        """Within, `measure` as a function of (microbatch, key), with the model in evaluation mode and without
        gradients. Values do not change meanwhile, and no call leaves anything in buffers, adopted or not."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The arrays that a finished model is saved as, under the names of the framework's own format, a shared array
        under each of its names: the adopted tensors (views of them), and the backend's own of frozen parameters. The
        engine writes to them when it loads a checkpoint, and calls `adopt` after it."""
        ...

    def remembered(self) -> dict[str, Any]:
        """Plain values that model and task keep outside parameters and buffers, by name: if two calls for the same
        microbatch differ, the changed values are named. {}: the backend keeps no such list."""
        ...

    def count_flop(self, compute: Callable[[], object]) -> int | None:
        """Floating-point operations of the contributions that `compute` makes; None: they cannot be counted here."""
        ...

    def measure_saved(self, compute: Callable[[], object], constants: Sequence[Tensor]) -> int | None:
        """The most bytes that were kept at one time for the backward pass, those of `constants` left out; None: not
        measured here."""
        ...


def check_sum(loss: Tensor, terms: object) -> int:
    """Check what a task's `loss` returned; return the number of terms. Call it before the backward pass.

    Raises:
        ContractError: the loss is no scalar float, or the terms are no whole number.
    """
    count = _whole(terms)
    if loss.ndim != 0 or not loss.is_floating_point():
        raise ContractError(
            f"the task's loss is {loss.dtype} of shape {tuple(loss.shape)}; allowed is one float: the sum."
        )
    return count


def _whole(terms: object) -> int:
    if isinstance(terms, Tensor) and terms.ndim == 0 and not terms.is_floating_point():
        terms = int(terms.item())
    if isinstance(terms, bool) or not isinstance(terms, int) or terms < 0:
        raise ContractError(
            f"the task's loss returned {terms!r} as its number of terms; allowed is a whole number from 0, such "
            "as len(labels). "
            "A sum is divided once a step, by the number of all its terms."
        )
    return terms
