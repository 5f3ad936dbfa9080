"""The fixed numeric layout: one flat space that holds every trained number, and its cut into shards.

Parameters lie group after group, then the floating-point buffers; each tensor starts on a grid of 64 elements, so that
no vector body or scalar tail of any kernel depends on where a shard is cut; shards are made of whole blocks of 1,024
elements. Padding is zero and stays zero. The layout is a function of the module alone; only the cut depends on the
number of workers.

Owns positions. Holds no values.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GRID = 64  # elements; 256 bytes of float32, four times what the widest vector needs
BLOCK = 1024  # elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Where one tensor lies in the space."""

    name: str
    group: int
    """Number of its parameter group; −1 for a buffer."""
    start: int
    size: int
    shape: torch.Size
    table: bool = False
    """Whether its gradients come as rows; it then takes up whole blocks."""

    @property
    def stop(self) -> int:
        """End of the segment with its padding, on the grid."""
        return self.start + _up(self.size, BLOCK if self.table else GRID)

    def view(self, flat: Tensor) -> Tensor:
        """This tensor's values in a flat tensor of the whole space."""
        return flat[self.start : self.start + self.size].view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The layout of one module's trained numbers."""

    parameters: tuple[Segment, ...]
    buffers: tuple[Segment, ...]
    parameter_blocks: int
    blocks: int
    dtype: torch.dtype

    def shard(self, rank: int, workers: int) -> Shard:
        """The part of the space that worker `rank` of `workers` owns."""
        return Shard(rank=rank, workers=workers, size=max(1, math.ceil(self.blocks / workers)) * BLOCK)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.parameters + self.buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Whole blocks of the space, the same number for each worker; the last ones may lie past its end."""

    rank: int
    workers: int
    size: int

    @property
    def start(self) -> int:
        return self.rank * self.size

    @property
    def padded_space(self) -> int:
        """Elements of a flat tensor that holds all shards."""
        return self.size * self.workers

    def local(self, segment: Segment) -> slice | None:
        """Where this shard's part of a segment lies in a tensor of the shard; None if it has none."""
        start, stop = max(segment.start - self.start, 0), min(segment.stop - self.start, self.size)
        return slice(start, stop) if start < stop else None

    def of(self, flat: Tensor) -> Tensor:
        """The part of a padded flat tensor that this shard owns."""
        return flat[self.start : self.start + self.size]


def lay_out(
    groups: Sequence[Sequence[tuple[str, Tensor]]],
    buffers: Sequence[tuple[str, Tensor]],
    dtype: torch.dtype,
    tables: Container[str] = (),
) -> Space:
    """Lay out named parameters, group after group, and then named buffers. `tables`: names of those parameters whose
    gradients come as rows."""
    position = 0

    def place(name: str, tensor: Tensor, group: int) -> Segment:
        nonlocal position
        table = name in tables and group >= 0
        start = _up(position, BLOCK) if table else position
        segment = Segment(name=name, group=group, start=start, size=tensor.numel(), shape=tensor.shape, table=table)
        position = segment.stop
        return segment

    parameters = tuple(place(name, tensor, number) for number, group in enumerate(groups) for name, tensor in group)
    position = _up(position, BLOCK)
    parameter_blocks = position // BLOCK
    placed = tuple(place(name, tensor, -1) for name, tensor in buffers)
    return Space(
        parameters=parameters,
        buffers=placed,
        parameter_blocks=parameter_blocks,
        blocks=_up(position, BLOCK) // BLOCK,
        dtype=dtype,
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
