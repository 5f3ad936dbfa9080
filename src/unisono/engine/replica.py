"""A worker's copy of the module, its trained numbers living in one flat tensor.

Owns the module, the flat tensor, and what happens to buffers: each microbatch starts from the step's, and what it
changed is part of its contribution. Knows no other worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from unisono.determinism.space import BLOCK, Segment, Shard, Space, lay_out
from unisono.errors import ContractError

SPARED = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters that share a factor on the rate and a choice of weight decay."""

    pretrained: bool
    decays: bool


class Replica:
    """One module, laid out in a `Space`, with its buffers guarded.

    Attributes:
        module: the module; its trainable parameters are views of `flat`, its float buffers of `buffer_values`.
        parts: the module, and every module in it.
        space: the layout; parameters first, then those buffers whose dtype is the space's.
        flat: [shard size × workers] all of them as they are at the step's start, padded with zeros; read only, since
            other workers may read the same memory.
        buffer_values: float buffers as the module has changed them, the part of `flat` that follows the parameters.
        groups: what each group number in the space means.
        sparse: ids of the weights of embeddings with sparse gradients.
        integers: integer and boolean buffers; after a step they hold what microbatch 0 left.
    """

    def __init__(self, module: nn.Module, *, rank: int, workers: int, pretrained: tuple[str, ...] = ()) -> None:
        self.module = module
        self.parts = tuple(module.modules())
        grouped = _group(module, pretrained)
        self.groups = tuple(grouped)
        dtype = _only_dtype(module)
        buffers = list(module.named_buffers())
        floats = [(name, buffer) for name, buffer in buffers if buffer.dtype == dtype]
        self.sparse = frozenset(
            id(part.weight) for part in self.parts if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
        )
        tables = {name for name, parameter in module.named_parameters() if id(parameter) in self.sparse}
        self.space: Space = lay_out(list(grouped.values()), floats, dtype, tables)
        self.shard: Shard = self.space.shard(rank, workers)
        device = next(module.parameters()).device
        self.flat = torch.zeros(self.shard.padded_space, dtype=dtype, device=device)
        self.buffer_values = torch.zeros_like(self._step_floats)
        self._seen: WeakIdKeyDictionary = (
            WeakIdKeyDictionary()
        )  # flat tensors that come again → views of the parameters
        self.parameters: list[nn.Parameter] = []
        self._owners = _buffer_owners(module)
        self._move_in()
        self.integers = [name for name, buffer in buffers if not buffer.is_floating_point() and not buffer.is_complex()]
        self._others = [name for name, _ in buffers if name not in self.integers and name not in {n for n, _ in floats}]
        self._step_integers = [self._buffer(name).clone() for name in self.integers]
        self._step_others = {name: self._buffer(name).clone() for name in self._others}

    @property
    def _step_floats(self) -> Tensor:
        """The part of `flat` that holds buffers."""
        start = self.space.parameter_blocks * BLOCK
        return self.flat[start : self.space.blocks * BLOCK]

    def take_buffer_changes(self) -> list[Tensor | None]:
        """Return what the last microbatch added to each buffer of the space.

        Values are compared, not version counters: native batch normalisation does not count its changes.

        Raises:
            ContractError: a buffer of another floating dtype or a shape has changed, which no contribution can carry.
        """
        for name, before in self._step_others.items():
            if not same_bits(self._buffer(name), before):
                raise ContractError(
                    f"buffer {name!r} is {before.dtype} and changes while training; allowed are {self.space.dtype} "
                    "and integer buffers. Register it with one of those dtypes."
                )
        for name in [segment.name for segment in self.space.buffers] + self.integers:
            if (now := self._buffer(name)).shape != (before := self._views[name]).shape:
                raise ContractError(
                    f"buffer {name!r} had shape {tuple(before.shape)} and has {tuple(now.shape)} after a microbatch; "
                    "allowed is a fixed shape. Register it with its final size."
                )
            if now is not before:  # assigned anew in the forward pass
                before.copy_(now.detach())
        if not self.space.buffers:
            return []
        # an untouched −inf, as masks have it, has changed by 0 and not by −inf − (−inf)
        change = (self.buffer_values - self._step_floats).masked_fill_(self.buffer_values == self._step_floats, 0.0)
        if ((change != 0.0) & ~self._step_floats.isfinite()).any():
            raise ContractError(self._name_infinite(change))
        return [self._buffer_part(change, segment) for segment in self.space.buffers]

    def _buffer_part(self, values: Tensor, segment: Segment) -> Tensor:
        start = segment.start - self.space.parameter_blocks * BLOCK
        return values[start : start + segment.size].view(segment.shape)

    def _name_infinite(self, change: Tensor) -> str:
        lost = (change != 0.0) & ~self._step_floats.isfinite()
        name = next(one.name for one in self.space.buffers if self._buffer_part(lost, one).any())
        return (
            f"buffer {name!r} was not finite and changes; allowed are finite numbers, since changes are averaged. "
            "Start a running extreme from a large finite number."
        )

    def integer_values(self) -> Tensor:
        """The integer buffers' values now, int64, one after another."""
        values = [self._buffer(name).detach().reshape(-1).to(torch.int64) for name in self.integers]
        return torch.cat(values) if values else torch.empty(0, dtype=torch.int64, device=self.flat.device)

    def restore_buffers(self) -> None:
        """Give every buffer the value it had at the step's start."""
        self.buffer_values.copy_(self._step_floats)
        for name, view in self._views.items():
            self._rebind(name, view)
        for name, value in zip(self.integers, self._step_integers, strict=True):
            self._views[name].copy_(value)

    def show(self, flat: Tensor) -> None:
        """Let the module look at the weights of another flat tensor, which is not copied; buffers follow when they are
        restored."""
        if flat.data_ptr() == self.flat.data_ptr():
            return
        views = self._seen.get(flat)
        if views is None:
            same = flat.detach()  # or the views would keep `flat`, and so themselves
            views = self._seen[flat] = [segment.view(same) for segment in self.space.parameters]
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view
        self.flat = flat

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite `flat` and all buffers, frozen parameters too, with the values of `all_tensors` by name.

        Raises:
            KeyError, RuntimeError: they are those of another module.
        """
        for name, value in self.all_tensors().items():
            value.copy_(tensors[name])
        self._step_floats.copy_(self.buffer_values)
        self.accept(self.integer_values())

    def accept(self, integer_values: Tensor) -> None:
        """Make the present content of `flat` and these integer values the next step's start."""
        for value, part in zip(
            self._step_integers, integer_values.split([v.numel() for v in self._step_integers]), strict=True
        ):
            value.copy_(part.view(value.shape))
        self.restore_buffers()

    def tensors(self) -> dict[str, Tensor]:
        """The module's own tensors by name: parameters, frozen ones too, and persistent buffers. Tied names are all
        there."""
        return module_tensors(self.module)

    def all_tensors(self) -> dict[str, Tensor]:
        """`tensors`, and the buffers that the module's state_dict leaves out."""
        return {**{name: buffer.detach() for name, buffer in self.module.named_buffers()}, **self.tensors()}

    def locate(self, tensor: Tensor) -> tuple[str, int]:
        """Where one of `all_tensors` lies: ("weights", first element of `flat`), ("integers", first element of
        `integer_values`), or ("constant", 0) for what no step changes."""
        size = tensor.numel()
        for flat, first in ((self.flat, 0), (self.buffer_values, self.space.parameter_blocks * BLOCK)):
            offset = (tensor.data_ptr() - flat.data_ptr()) // flat.element_size()
            if tensor.dtype == flat.dtype and size and 0 <= offset <= flat.numel() - size:
                return "weights", first + offset
        start = 0
        for name in self.integers:
            if size and self._views[name].data_ptr() == tensor.data_ptr():
                return "integers", start
            start += self._views[name].numel()
        return "constant", 0

    def _move_in(self) -> None:
        """Copy every value into the flat tensor (aligned, wherever it lay before) and let the module look at it
        there."""
        named = dict(self.module.named_parameters())
        placed = {segment.name for segment in self.space.parameters}
        self._views: dict[str, Tensor] = {}
        with torch.no_grad():
            for segment in self.space.parameters:
                parameter = named[segment.name]
                view = segment.view(self.flat)
                view.copy_(parameter)
                parameter.data = view
                self.parameters.append(parameter)
            for name, parameter in named.items():
                if name not in placed:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            for segment in self.space.buffers:
                # .data: own version counters, so that changing one buffer spares what autograd saved of the others
                view = self._buffer_part(self.buffer_values, segment).data
                view.copy_(self._buffer(segment.name))
                segment.view(self.flat).copy_(view)
                self._views[segment.name] = view
                self._rebind(segment.name, view)
            for name, buffer in list(self.module.named_buffers()):
                if name not in self._views:
                    self._views[name] = buffer.detach().clone(memory_format=torch.contiguous_format)
                    self._rebind(name, self._views[name])

    def _buffer(self, name: str) -> Tensor:
        module, attribute = self._owners[name][0]
        value = module._buffers[attribute]
        assert value is not None, name
        return value

    def _rebind(self, name: str, value: Tensor) -> None:
        for module, attribute in self._owners[name]:
            module._buffers[attribute] = value


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors by name, as its state_dict has them."""
    return {name: value.detach() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def layout_digest(module: nn.Module) -> str:
    """Short hash of names, shapes and present values: equal on workers that built the same module."""
    return tensors_sha256(module_tensors(module))[:16]


def same_bits(left: Tensor | None, right: Tensor | None) -> bool:
    """Whether two tensors are equal byte for byte (None: absent)."""
    if left is None or right is None:
        return left is right
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    left, right = (value.to_dense() if value.is_sparse else value for value in (left, right))
    one, other = (value.detach().contiguous().view(-1).view(torch.uint8) for value in (left, right))
    return torch.equal(one, other)


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in order of name: `weights_sha256` of a run.

    For each name: "name dtype shape\\n" in UTF-8, dtype as torch prints it without "torch.", shape as comma-separated
    sizes, then the contiguous little-endian bytes.
    """
    result = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        shape = ",".join(str(size) for size in value.shape)
        result.update(f"{name} {str(value.dtype).removeprefix('torch.')} {shape}\n".encode())
        result.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()


def _group(module: nn.Module, pretrained: tuple[str, ...]) -> dict[Group, list[tuple[str, Tensor]]]:
    """Trainable parameters by group. Biases, norms and other vectors are spared weight decay."""
    spared = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, SPARED)
        for parameter in part.parameters(recurse=False)
    }
    groups: dict[Group, list[tuple[str, Tensor]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in spared
            group = Group(pretrained=name.startswith(pretrained) if pretrained else False, decays=decays)
            groups.setdefault(group, []).append((name, parameter))
    if not groups:
        raise ContractError(
            "the module has no parameter that requires a gradient: there is nothing to train. Unfreeze one."
        )
    return groups


def _only_dtype(module: nn.Module) -> torch.dtype:
    kinds: dict[torch.dtype, str] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault(parameter.dtype, name)
    if len(kinds) > 1 or not kinds.keys() <= {torch.float32, torch.float64}:
        given = ", ".join(f"{name!r} is {dtype}" for dtype, name in kinds.items())
        raise ContractError(
            f"trainable parameters: {given}; allowed is float32 for all, or float64 for all. "
            'For half precision keep float32 weights and set train.precision = "bf16".'
        )
    return next(iter(kinds), torch.float32)


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
