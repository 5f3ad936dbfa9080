"""A worker's copy of the model's numbers: the trained ones in one flat tensor, on which a backend computes.

Owns the flat tensor, and the handling of buffers: each microbatch starts from the step's buffers, and its changes are
part of its contribution. Depends on no other worker, and on no framework.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from unisono.backends.backend import Backend, Group, ModelParameter
from unisono.determinism.space import BLOCK, Segment, Shard, Space, lay_out
from unisono.errors import ContractError


class Replica:
    """The numbers of one model, laid out in a `Space`, with its buffers restored before each microbatch.

    Attributes:
        backend: what computes with them; it has adopted views of `flat` as its trainable parameters, and views of
            `buffer_values` as its float buffers.
        space: the layout; parameters first, then those buffers whose dtype is the space's.
        flat: [shard size × workers] all values at the step's start, padded with zeros; read only, since
            other workers may read the same memory.
        buffer_values: float buffers as the backend has changed them, the part of `flat` that follows the parameters.
        groups: the meaning of each group number in the space.
        integers: integer and boolean buffers; after a step they hold the values from microbatch 0.
    """

    def __init__(self, backend: Backend, *, rank: int, workers: int) -> None:
        self.backend = backend
        parameters = backend.parameters()
        grouped = _group(parameters)
        self.groups = tuple(grouped)
        dtype = _only_dtype(parameters)
        buffers = backend.buffers()
        floats = [(name, buffer) for name, buffer in buffers.items() if buffer.dtype == dtype]
        tables = {one.name for one in parameters if one.table}
        self.space: Space = lay_out(
            [[(one.name, one.value) for one in group] for group in grouped.values()], floats, dtype, tables
        )
        self.shard: Shard = self.space.shard(rank, workers)
        self.flat = torch.zeros(self.shard.padded_space, dtype=dtype, device=parameters[0].value.device)
        self.buffer_values = torch.zeros_like(self._step_floats)
        self._seen: WeakIdKeyDictionary = (
            WeakIdKeyDictionary()
        )  # flat tensors that are used again → views of the parameters
        self._buffers: dict[str, Tensor] = {}
        self._move_in({one.name: one.value for one in parameters}, buffers)
        self.integers = [
            name for name, buffer in buffers.items() if not buffer.is_floating_point() and not buffer.is_complex()
        ]
        others = [name for name in buffers if name not in self.integers and name not in {n for n, _ in floats}]
        self._step_integers = [self._buffers[name].clone() for name in self.integers]
        self._step_others = {name: self._buffers[name].clone() for name in others}

    @property
    def parameters(self) -> list[Tensor]:
        """Views of the trainable parameters in `flat`, in the order of the space."""
        return list(self._shown.values())

    @property
    def _step_floats(self) -> Tensor:
        """The part of `flat` that holds buffers."""
        start = self.space.parameter_blocks * BLOCK
        return self.flat[start : self.space.blocks * BLOCK]

    def take_buffer_changes(self) -> list[Tensor | None]:
        """Return the change of each buffer of the space by the last microbatch.

        Raises:
            ContractError: a buffer of another floating dtype has changed, which no contribution can carry.
        """
        for name, before in self._step_others.items():
            if not same_bits(self._buffers[name], before):
                raise ContractError(
                    f"buffer {name!r} is {before.dtype} and changes while training; allowed are {self.space.dtype} "
                    "and integer buffers. Register it with one of those dtypes."
                )
        if not self.space.buffers:
            return []
        # an untouched −inf, as in masks, has changed by 0 and not by −inf − (−inf)
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
        values = [self._buffers[name].reshape(-1).to(torch.int64) for name in self.integers]
        return torch.cat(values) if values else torch.empty(0, dtype=torch.int64, device=self.flat.device)

    def restore_buffers(self) -> None:
        """Give every buffer the value it had at the step's start."""
        self.buffer_values.copy_(self._step_floats)
        for name, value in zip(self.integers, self._step_integers, strict=True):
            self._buffers[name].copy_(value)

    def show(self, flat: Tensor) -> None:
        """Make the backend compute with the present weights of this flat tensor, which is not copied; buffers follow
        when they are restored."""
        if flat.data_ptr() != self.flat.data_ptr():
            if flat not in self._seen:
                self._seen[flat] = self._cut(flat)
            self._shown, self.flat = self._seen[flat], flat
        self.backend.adopt(self._shown)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite `flat` and all buffers, frozen parameters too, with the values of `all_tensors` by name.

        Raises:
            KeyError, RuntimeError: they are those of another model.
        """
        for name, value in self.all_tensors().items():
            value.copy_(tensors[name])
        self.backend.adopt(self._shown)
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
        """The model's own tensors by name: parameters, frozen ones too, and persistent buffers. All names of tied
        tensors are included."""
        return self.backend.tensors()

    def all_tensors(self) -> dict[str, Tensor]:
        """`tensors`, and the buffers that are not among them."""
        return {**self.backend.buffers(), **self.backend.tensors()}

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
            if size and self._buffers[name].data_ptr() == tensor.data_ptr():
                return "integers", start
            start += self._buffers[name].numel()
        return "constant", 0

    def _cut(self, flat: Tensor) -> dict[str, Tensor]:
        same = flat.detach()  # else the views would keep `flat` alive, and so themselves
        return {segment.name: segment.view(same) for segment in self.space.parameters}

    def _move_in(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Copy every value into the flat tensor (aligned, wherever it lay before) and give the backend views of it."""
        self._shown = self._cut(self.flat)
        for name, view in self._shown.items():
            view.copy_(parameters[name])
        for segment in self.space.buffers:
            # .data: own version counters, so that changing one buffer does not invalidate what autograd saved of the
            # others
            view = self._buffer_part(self.buffer_values, segment).data
            view.copy_(buffers[segment.name])
            segment.view(self.flat).copy_(view)
            self._buffers[segment.name] = view
        for name, buffer in buffers.items():
            if name not in self._buffers:
                self._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
        self.backend.adopt(self._shown)
        self.backend.adopt_buffers(self._buffers)


def layout_digest(backend: Backend) -> str:
    """Short hash of names, shapes and present values: equal on workers that built the same model."""
    return tensors_sha256(backend.tensors())[:16]


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


def _group(parameters: Sequence[ModelParameter]) -> dict[Group, list[ModelParameter]]:
    """Trainable parameters by group, groups and parameters in the model's order."""
    groups: dict[Group, list[ModelParameter]] = {}
    for one in parameters:
        if one.group is not None:
            groups.setdefault(one.group, []).append(one)
    if not groups:
        raise ContractError(
            "the module has no parameter that requires a gradient: there is nothing to train. Unfreeze one."
        )
    return groups


def _only_dtype(parameters: Sequence[ModelParameter]) -> torch.dtype:
    kinds: dict[torch.dtype, str] = {}
    for one in parameters:
        if one.group is not None:
            kinds.setdefault(one.value.dtype, one.name)
    if len(kinds) > 1 or not kinds.keys() <= {torch.float32, torch.float64}:
        given = ", ".join(f"{name!r} is {dtype}" for dtype, name in kinds.items())
        raise ContractError(
            f"trainable parameters: {given}; allowed is float32 for all, or float64 for all. "
            'For half precision keep float32 weights and set train.precision = "bf16".'
        )
    return next(iter(kinds), torch.float32)
