"""The tokens of a microbatch: packed one after another, and spread out in rectangles.

Owns the conversion between the two. Operations on single tokens (linear layers, norms, dropout) work on packed ones and
spend nothing on padding; operations across tokens spread them out for themselves. On CPUs samples of similar length
share a rectangle, so that little of it is empty and all that is computed for it stays in the cache; on a GPU one large
rectangle is faster.

Shapes: n samples, m tokens of all samples, h heads, w numbers per token, R cells of all rectangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

CELLS = 2**18  # most scores of a rectangle: 1 MB of float32
LANES = 8  # numbers in a vector of most processors: scores in whole vectors are multiplied 1.4 times as fast


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """Some samples, one of their heads to a row. rows: heads × samples. columns: the longest sample's tokens, up to a
    multiple of LANES. absent: bool [rows, 1, columns], true where there is no token; None: there are tokens
    everywhere."""

    rows: int
    columns: int
    absent: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The rectangles of a microbatch, cell after cell.

    place: which (token, head) is in each of the R cells; the sample's first token where there is none.
    hole: bool [R], the cells without a token.
    samples, ranks: int64 [n], the samples in order of rectangles, and where each stands in that order.
    """

    heads: int
    rectangles: tuple[Rectangle, ...]
    place: np.ndarray
    hole: np.ndarray
    samples: Tensor
    ranks: Tensor
    _ways: dict[int, tuple[Way, Way]] = field(default_factory=dict)

    def spread(self, packed: Tensor, parts: int = 1) -> Tensor:
        """Return the cells [parts · R, w / h] of packed tokens [m, parts · w], part after part, zeros where there is no
        token."""
        there, back = self._way(parts)
        cells: Tensor = _Moved.apply(packed.reshape(-1, packed.shape[-1] // (parts * self.heads)), there, back)
        return cells

    def gather(self, cells: Tensor) -> Tensor:
        """Return the packed tokens [m, w] of cells [R, w / h]."""
        there, back = self._way(1)
        packed: Tensor = _Moved.apply(cells, back, there)
        return packed.view(-1, self.heads * cells.shape[-1])

    def sort(self, rows: Tensor) -> Tensor:
        """Return one row a sample [n, w] in order of rectangles."""
        return _Moved.apply(rows, (self.samples, None), (self.ranks, None))

    def unsort(self, rows: Tensor) -> Tensor:
        """The inverse."""
        return _Moved.apply(rows, (self.ranks, None), (self.samples, None))

    def _way(self, parts: int) -> tuple[Way, Way]:
        """From packed tokens to cells, and back. A token's heads are rows of its own, the first part's first."""
        if parts not in self._ways:
            token, head = np.divmod(self.place, self.heads)
            rows = ((token * parts + np.arange(parts)[:, None]) * self.heads + head).ravel()
            holes = np.tile(self.hole, parts)
            there = np.flatnonzero(~holes)
            cells = np.empty(len(there), np.int64)
            cells[rows[there]] = there
            device = self.samples.device
            put = [torch.from_numpy(values).to(device) for values in (rows, np.flatnonzero(holes), cells)]
            self._ways[parts] = (put[0], put[1] if len(put[1]) else None), (put[2], None)
        return self._ways[parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The packing of one microbatch; made by `pack`.

    starts: int64 [n], the first packed token of each sample. lengths: int64 [n], each at least 1. positions: int64 [m],
    number of each token in its sample.
    """

    starts: Tensor
    lengths: Tensor
    positions: Tensor
    _grids: dict[int, Grid] = field(default_factory=dict)

    def grid(self, heads: int) -> Grid:
        """The rectangles for so many heads."""
        if heads not in self._grids:
            self._grids[heads] = _lay_out(self.starts, self.lengths, heads)
        return self._grids[heads]


def pack(tokens: int, starts: Tensor) -> Packing:
    """Describe samples that start at `starts` (int64 [n], rising, the first 0) among so many tokens."""
    ends = torch.cat([starts[1:], starts.new_tensor([tokens])])
    lengths = ends - starts
    positions = torch.arange(tokens, device=starts.device) - torch.repeat_interleave(starts, lengths)
    return Packing(starts=starts, lengths=lengths, positions=positions)


def _lay_out(starts: Tensor, lengths: Tensor, heads: int) -> Grid:
    device = starts.device
    first, length = starts.cpu().numpy(), lengths.cpu().numpy()
    groups = _alike(length, heads) if device.type == "cpu" else [np.arange(len(length))]
    head = np.arange(heads)[:, None]
    rectangles, places, holes = [], [], []
    for group in groups:
        columns = -(-int(length[group].max()) // LANES) * LANES
        column = np.arange(columns)
        absent = column >= length[group][:, None]
        token = first[group][:, None] + np.where(absent, 0, column)
        places.append((token[:, None, :] * heads + head).ravel())
        absent = np.repeat(absent, heads, axis=0)[:, None, :]
        holes.append(absent.ravel())
        some = torch.from_numpy(absent).to(device) if absent.any() else None
        rectangles.append(Rectangle(rows=len(group) * heads, columns=columns, absent=some))
    sample = np.concatenate(groups)
    return Grid(
        heads=heads,
        rectangles=tuple(rectangles),
        place=np.concatenate(places),
        hole=np.concatenate(holes),
        samples=torch.from_numpy(sample).to(device),
        ranks=torch.from_numpy(np.argsort(sample)).to(device),
    )


def _alike(lengths: np.ndarray, heads: int) -> Sequence[np.ndarray]:
    """Group samples into rectangles: lengths differ by a quarter at most, or by less than 8 tokens."""
    if lengths.min() == lengths.max():
        return _limited(np.arange(len(lengths)), int(lengths[0]), heads)
    _, exponents = np.frexp(lengths)  # lengths < 2^exponent
    grain = np.maximum(8, 2 ** np.maximum(exponents - 3, 0))
    rounded = -(-lengths // grain) * grain
    found = np.unique(rounded).tolist()
    return [part for longest in found for part in _limited(np.flatnonzero(rounded == longest), longest, heads)]


def _limited(samples: np.ndarray, longest: int, heads: int) -> list[np.ndarray]:
    most = max(1, CELLS // (heads * longest**2))
    return [samples[start : start + most] for start in range(0, len(samples), most)]


Way = tuple[Tensor, Tensor | None]
"""Which row goes to each place, and the places that get zeros instead."""


class _Moved(torch.autograd.Function):
    """Rows to other places, and their gradient back: copies, where autograd's own for indexing would add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: Way, back: Way) -> Tensor:
        ctx.back = back
        return _move(rows, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _move(gradient, ctx.back), None, None


def _move(rows: Tensor, way: Way) -> Tensor:
    index, empty = way
    moved = rows.index_select(0, index)
    return moved if empty is None else moved.index_fill_(0, empty, 0.0)
