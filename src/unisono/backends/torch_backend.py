"""The backend of torch: an `nn.Module`, its numbers in the engine's memory, and autograd.

Owns the forward and backward pass, and everything specific to modules: which parameters decay, where buffers are
attached, what a state_dict holds. Copies nothing: parameters and buffers are views of the adopted memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unisono.backends.backend import Group, Measure, Measurement, MicrobatchSums, ModelParameter, check_sum
from unisono.config.sections import Train
from unisono.errors import ContractError
from unisono.exchange.protocol import Offload
from unisono.kernels.linear import assisted
from unisono.tasks.task import Microbatch, Task

SPARED = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
INTERNAL = frozenset(vars(nn.Module()))
"""Attributes of any module: no state of a model."""


class TorchBackend:
    """A `Backend`: the module of one task.

    Attributes:
        module: the module. Once adopted, its trainable parameters are views of the engine's memory, and so are its
            buffers between two calls.
    """

    name: ClassVar[str] = "torch"

    def __init__(self, task: Task, module: nn.Module, *, precision: str = "float32") -> None:
        self.module = module
        self._task = task
        self._half = precision == "bf16"
        self._device_type = next((one.device.type for one in module.parameters()), "cpu")
        self._parts = tuple(module.modules())
        self._parameters = dict(module.named_parameters())
        self._owners = _buffer_owners(module)
        self._adopted: Mapping[str, Tensor] | None = None
        self._trained: list[nn.Parameter] = []
        self._buffers: Mapping[str, Tensor] = {}  # the adopted ones
        self._sparse = frozenset(
            id(part.weight) for part in self._parts if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
        )

    @property
    def min_samples(self) -> int:
        """2 with batch normalisation in any form: it refuses to train on one sample."""
        return 2 if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self._parts) else 1

    @classmethod
    def build(
        cls,
        task: Task,
        train: Train,
        *,
        key: int,
        device: torch.device,
        on_built: Callable[[Any], None] = lambda built: None,
    ) -> TorchBackend:
        """From the global generators of torch, NumPy and Python, which the caller has seeded; `numerics.settle` has put
        torch into the known state."""
        module = task.build()
        if not isinstance(module, nn.Module):
            raise ContractError(f"the task's build returned {type(module).__name__}; allowed is a torch nn.Module.")
        on_built(module)
        return cls(task, module.to(device), precision=train.precision)

    def fingerprint(self) -> dict[str, str]:
        return {}

    def parameters(self) -> list[ModelParameter]:
        """Biases, norms and other vectors get no weight decay."""
        spared = {
            id(parameter)
            for part in self._parts
            if isinstance(part, SPARED)
            for parameter in part.parameters(recurse=False)
        }
        pretrained = self._task.pretrained
        found = []
        for name, parameter in self._parameters.items():
            group = None
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and id(parameter) not in spared
                group = Group(pretrained=name.startswith(pretrained) if pretrained else False, decays=decays)
            table = id(parameter) in self._sparse
            found.append(ModelParameter(name=name, value=parameter.detach(), group=group, table=table))
        return found

    def buffers(self) -> dict[str, Tensor]:
        return {name: self._buffer(name).detach() for name in self._owners}

    def adopt(self, parameters: Mapping[str, Tensor]) -> None:
        """Make the module use these values; frozen ones move once, to aligned memory, wherever they were."""
        if parameters is self._adopted:
            return
        if self._adopted is None:
            for name, parameter in self._parameters.items():
                if name not in parameters:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._trained = [self._parameters[name] for name in parameters]
        for parameter, value in zip(self._trained, parameters.values(), strict=True):
            parameter.data = value
        self._adopted = parameters

    def adopt_buffers(self, buffers: Mapping[str, Tensor]) -> None:
        self._buffers = buffers
        for name, value in buffers.items():
            self._rebind(name, value)

    def contribute(
        self,
        microbatch: Microbatch,
        key: int,
        *,
        offload: Offload | None = None,
        halfway: Callable[[], None] | None = None,
    ) -> MicrobatchSums:
        if not all(part.training for part in self._parts):  # setting it again costs more than reading
            self.module.train()
        with self._autocast():
            found = self._compute_loss(dict(microbatch))  # a copy: the task may remove columns
        if not isinstance(found, tuple) or len(found) != 2:
            raise ContractError(
                f"the task's loss returned {type(found).__name__}; allowed is a pair: the sum of the losses, and "
                "how many terms it has, such as (losses.sum(), len(losses))."
            )
        loss, count = found
        terms = check_sum(loss, count)
        if halfway:
            halfway()
        gradients: list[Tensor | None] = [None] * len(self._trained)
        if loss.requires_grad:
            self._go_back(loss, offload)
            gradients = [_gradient(parameter, id(parameter) in self._sparse) for parameter in self._trained]
        for parameter in self._trained:
            parameter.grad = None
        self.settle_buffers()
        return MicrobatchSums(loss=loss.detach(), terms=terms, gradients=gradients)

    def _compute_loss(self, microbatch: Microbatch) -> Any:
        """What the task's loss returns; torch's refusal to normalise one sample, explained."""
        try:
            return self._task.loss(self.module, microbatch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ContractError(
                f"batch normalisation compares the samples of a microbatch, and this one has one ({error}). Give 2 "
                "samples at least, set train.samples_per_step to 2 at least, or use nn.GroupNorm or nn.LayerNorm."
            ) from error

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._half)

    def _go_back(self, loss: Tensor, offload: Offload | None) -> None:
        """Store in each parameter its gradient."""
        if offload is None:
            loss.backward()
            return
        with assisted(offload.publish):
            loss.backward()
        for weights, gradient in offload.collect():
            for weight, part in zip(weights, gradient.split([len(weight) for weight in weights]), strict=True):
                if weight.requires_grad:
                    weight.grad = part if weight.grad is None else weight.grad + part

    def settle_buffers(self) -> None:
        """Copy newly assigned buffers of a forward pass into the adopted ones, and attach those again.

        Raises:
            ContractError: one has another shape than before.
        """
        for name, before in self._buffers.items():
            now = self._buffer(name)
            if now.shape != before.shape:
                raise ContractError(
                    f"buffer {name!r} had shape {tuple(before.shape)} and has {tuple(now.shape)} after a microbatch; "
                    "allowed is a fixed shape. Register it with its final size."
                )
            if now is not before:
                before.copy_(now.detach())
            self._rebind(name, before)

    @contextmanager
    def measuring(self, measure: Measurement) -> Iterator[Measure]:
        was_training = self.module.training
        kept = _KeptBuffers(self.module)

        def compute(microbatch: Microbatch, key: int) -> Mapping[str, Tensor]:
            found = measure(self.module, microbatch)
            kept.restore()
            if not isinstance(found, Mapping):
                name = getattr(measure, "__name__", "measure")
                raise ContractError(
                    f"the task's {name} returned {type(found).__name__}; allowed is a mapping of names to tensors, "
                    'such as {"loss": losses}.'
                )
            return found

        self.module.eval()
        with torch.no_grad(), self._autocast():
            yield compute
        self.module.train(was_training)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the module's state_dict."""
        return {name: value.detach() for name, value in self.module.state_dict().items() if isinstance(value, Tensor)}

    def remembered(self) -> dict[str, Any]:
        """Plain values and tensors that modules and the task keep as ordinary attributes, by full name."""
        found: dict[str, Any] = {}
        for prefix, part in [("task", self._task), *self.module.named_modules()]:
            for attribute, value in getattr(part, "__dict__", {}).items():
                if attribute in INTERNAL:
                    continue
                name = f"{prefix}.{attribute}" if prefix else attribute
                if isinstance(value, int | float | str | bytes | None):
                    found[name] = value
                elif isinstance(value, Tensor):
                    found[name] = (tuple(value.shape), value.detach().double().sum().item())
                elif isinstance(value, list | tuple | dict | set):
                    found[name] = repr(value)[:10_000]
        return found

    def count_flop(self, compute: Callable[[], object]) -> int:
        from unisono.backends.torch_footprint import count_flop

        return count_flop(compute)

    def measure_saved(self, compute: Callable[[], object], constants: Sequence[Tensor]) -> int:
        from unisono.backends.torch_footprint import measure_saved

        return measure_saved(compute, constants)

    def _buffer(self, name: str) -> Tensor:
        module, attribute = self._owners[name][0]
        value = module._buffers[attribute]
        assert value is not None, name
        return value

    def _rebind(self, name: str, value: Tensor) -> None:
        for module, attribute in self._owners[name]:
            module._buffers[attribute] = value


class _KeptBuffers:
    """A module's buffers at the beginning, so that changes by one microbatch reach no other microbatch, and no later
    training."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [
            (part, attribute, buffer, buffer.clone()) for _, part, attribute, buffer in _all_buffers(module)
        ]

    def restore(self) -> None:
        """Restore the value of every buffer."""
        for part, attribute, buffer, value in self._before:
            part._buffers[attribute] = buffer
            buffer.copy_(value)


def _gradient(parameter: nn.Parameter, sparse: bool) -> Tensor | None:
    """A parameter's gradient: coalesced rows, if its embedding has sparse=True, else a dense tensor.

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


def _buffer_owners(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each buffer's first name, every module and attribute that holds that same tensor."""
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    for prefix, part, attribute, buffer in _all_buffers(module):
        name = names.setdefault(id(buffer), f"{prefix}.{attribute}" if prefix else attribute)
        owners.setdefault(name, []).append((part, attribute))
    return owners


def _all_buffers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for prefix, part in module.named_modules():
        for attribute, buffer in part._buffers.items():
            if buffer is not None:
                yield prefix, part, attribute, buffer
