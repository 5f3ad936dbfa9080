"""A worker's part of a table (an embedding whose gradients come as rows), and two ways to update it.

*Densely*: every row, as if the gradient were a dense one; absent rows are zeros. *Lazily*: only the rows that the step
touched; the others keep weights and optimiser state, as with torch.optim.SparseAdam. Either way elements are laid in
memory so that kernels see whole vectors of them, and nothing depends on where shards are cut.

Owns where rows lie in a shard, and which rows a copy of the arrays lacks. The rules are in `kernels/update_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unisono.determinism.space import BLOCK, GRID, Segment, Shard, Space
from unisono.engine.arrays import WEIGHTS
from unisono.engine.sparse_rows import Rows, squares_of_rows

Named = Mapping[str, Tensor]
"""Arrays of my shard by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Rows from `first` on that a shard holds from column to column; only the first and last may be cut by its ends.

    place: where they lie in the shard.
    """

    first: int
    rows: int
    column: int
    columns: int
    place: slice

    def of(self, array: Tensor) -> Tensor:
        """[rows, columns] in an array of the shard."""
        return array[self.place].view(self.rows, self.columns)


class Table:
    """The part of one table that a shard holds.

    Attributes:
        index: the table's number among the parameters.
        group: number of its group.
        first, last: rows of which the shard holds something, up to `last`, `last` excluded.
        place: where the part lies in the shard, padding included.
    """

    def __init__(self, index: int, segment: Segment, shard: Shard, place: slice) -> None:
        self.index, self.group, self.place = index, segment.group, place
        self._width = segment.size // segment.shape[0]
        self._segment, self._shard = segment, shard
        self._offset = shard.start - segment.start  # of the shard's elements in the table
        self._start = max(self._offset, 0)
        self._stop = min(self._offset + shard.size, segment.size)
        self.first, self.last = self._start // self._width, max(-(-self._stop // self._width), 0)
        self.strips = tuple(self._cut())

    def _cut(self) -> Iterator[Strip]:
        width, start, stop = self._width, self._start, self._stop
        while start < stop:
            row, column = divmod(start, width)
            whole = (stop - start) // width if column == 0 else 0
            rows, columns = (whole, width) if whole else (1, min(width - column, stop - start))
            place = slice(start - self._offset, start - self._offset + rows * columns)
            yield Strip(first=row, rows=rows, column=column, columns=columns, place=place)
            start += rows * columns

    def add_squares(self, rows: Rows, squares: Tensor) -> None:
        """Add the squares of rows to those of the shard's blocks: a row counts where its first element lies."""
        first = -(-self._start // self._width)
        whole = rows.between(first, self.last)
        blocks = (self._segment.start + whole.numbers * self._width - self._shard.start) // BLOCK
        squares.index_add_(0, blocks, squares_of_rows(whole.values))

    def dense(self, rows: Rows, size: int) -> Iterator[tuple[slice, Tensor]]:
        """The gradient in dense chunks of `size` elements: where each lies in the shard, and its values."""
        scratch = rows.values.new_empty(size + 2 * self._width + BLOCK)
        for start in range(self.place.start, self.place.stop, size):
            place = slice(start, min(start + size, self.place.stop))
            begin, end = place.start + self._offset, place.stop + self._offset
            some = rows.between(row := begin // self._width, -(-end // self._width))
            values = scratch.zero_()[: (-(-end // self._width) - row) * self._width].view(-1, self._width)
            _put(values, some.numbers - row, some.values)
            yield place, scratch[begin - row * self._width : end - row * self._width]

    def update(self, rows: Rows, old: Named, new: Named, rule: Callable[[Tensor, dict[str, Tensor]], None]) -> None:
        """Run `rule(gradient, arrays)` on these rows only, all others stay unchanged."""
        for strip in self.strips:
            some = rows.between(strip.first, strip.first + strip.rows)
            if len(some.numbers):
                numbers = some.numbers - strip.first
                shape = (len(numbers), strip.columns)
                gradient = _padded(shape, some.values)
                _view(gradient, shape).copy_(some.values[:, strip.column : strip.column + strip.columns])
                values = {name: _padded(shape, array) for name, array in old.items()}
                for name, array in old.items():
                    _take(strip.of(array), numbers, _view(values[name], shape))
                rule(gradient, values)
                for name, array in new.items():
                    _put(strip.of(array), numbers, _view(values[name], shape))

    def copy_rows(self, numbers: Tensor, old: Named, new: Named) -> None:
        """Copy these rows (rising) from array to array."""
        for strip in self.strips:
            ends = torch.tensor([strip.first, strip.first + strip.rows], device=numbers.device)
            start, stop = torch.searchsorted(numbers, ends).tolist()
            some = numbers[start:stop] - strip.first
            for name, array in new.items():
                rows = array.new_empty(len(some), strip.columns)
                _take(strip.of(old[name]), some, rows)
                _put(strip.of(array), some, rows)


def _padded(shape: tuple[int, int], like: Tensor) -> Tensor:
    """Zeros for a matrix, padded to whole vectors."""
    return like.new_zeros(-(-shape[0] * shape[1] // GRID) * GRID)


def _view(padded: Tensor, shape: tuple[int, int]) -> Tensor:
    return padded[: shape[0] * shape[1]].view(shape)


def _take(table: Tensor, numbers: Tensor, into: Tensor) -> None:
    """Copy rows out of a table. On CPUs with NumPy, which takes a third of torch's time."""
    if table.device.type == "cpu":
        np.take(table.numpy(), numbers.numpy(), axis=0, out=into.numpy(), mode="clip")
    else:
        torch.index_select(table, 0, numbers, out=into)


def _put(table: Tensor, numbers: Tensor, rows: Tensor) -> None:
    """Overwrite rows of a table."""
    if table.device.type == "cpu":
        table.numpy()[numbers.numpy()] = rows.numpy()
    else:
        table.index_copy_(0, numbers, rows)


class Behind:
    """Which rows each copy of the arrays lacks: those that were updated since it was written.

    A copy without an entry lacks everything.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables
        self._rows: dict[int, list[Mapping[int, Tensor]]] = {}

    def catch_up(self, copy: int, old: Named, new: Named, touched: Mapping[int, Rows]) -> None:
        """Bring a copy, `new`, up to the content of `old`, except for rows that will be overwritten (table → rows). The
        copy then has no entry, until `commit`."""
        known = self._rows.pop(copy, None)
        for table in self._tables:
            if known is None:
                for name, array in new.items():
                    array[table.place].copy_(old[name][table.place])
            else:
                lacks = torch.zeros(table.last - table.first, dtype=torch.bool, device=new[WEIGHTS].device)
                for numbers in known:
                    lacks[numbers[table.index] - table.first] = True
                lacks[touched[table.index].numbers - table.first] = False
                table.copy_rows(lacks.nonzero().squeeze(1) + table.first, old, new)

    def commit(self, copy: int, touched: Mapping[int, Tensor]) -> None:
        """This copy is the newest, and the others lack these rows (table → numbers)."""
        most = sum(table.last - table.first for table in self._tables)
        for other, lacking in list(self._rows.items()):
            lacking.append(touched)
            if sum(len(numbers) for rows in lacking for numbers in rows.values()) > most:
                del self._rows[other]  # copying everything is cheaper
        self._rows[copy] = []


def tables_of(space: Space, shard: Shard) -> list[Table]:
    """The tables of which a shard holds something."""
    return [
        Table(index, segment, shard, place)
        for index, segment in enumerate(space.parameters)
        if segment.table and (place := shard.local(segment)) is not None
    ]
