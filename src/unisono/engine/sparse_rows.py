"""Gradients that come as rows: of tables, embeddings of which a step touches a small part.

Each microbatch's rows travel as they are, and the owner of a part of the table adds them up in the tree, side by side:
an absent row counts as +0.0, and adding that changes no bit, since no row holds −0.0 (`contribution.py` ensures it).
So the sum of a row is that of a dense gradient, and rows that no step touches are neither zeroed, sent nor read.

Owns the rows' packing and their sum. `sparse_tables.py` updates the tables with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.determinism.nodes import Node
from unisono.determinism.tree import Tree, fold_nodes

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers as wide as a dtype, so that row numbers can travel among values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some rows of a table. numbers: int64 [n], rising. values: [n, width]."""

    numbers: Tensor
    values: Tensor

    @property
    def elements(self) -> int:
        """The number of elements that `pack` writes."""
        return len(self.numbers) + self.values.numel()

    def between(self, first: int, last: int) -> Rows:
        """The rows from number `first` up to number `last`, `last` excluded: views."""
        start, stop = torch.searchsorted(self.numbers, torch.tensor([first, last], device=self.numbers.device)).tolist()
        return Rows(numbers=self.numbers[start:stop], values=self.values[start:stop])


def rows_of(part: Tensor | None, like: Tensor) -> Rows:
    """A contribution's gradient of the table `like` as rows; None: there are none; of a dense one: all."""
    if part is None:
        return Rows(numbers=like.new_empty(0, dtype=torch.int64), values=like.new_empty(0, like.shape[1]))
    if part.is_sparse:
        return Rows(numbers=part.indices()[0], values=part.values())
    return Rows(numbers=torch.arange(len(part), device=part.device), values=part)


def pack(rows: Sequence[Rows], into: Tensor) -> None:
    """Write rows, microbatch after microbatch, their numbers before their values, to the beginning of a flat tensor."""
    position = 0
    for one in rows:
        count = len(one.numbers)
        into[position : position + count].view(INTEGERS[into.dtype]).copy_(one.numbers)
        position += count
        into[position : position + one.values.numel()].view_as(one.values).copy_(one.values)
        position += one.values.numel()


def unpack(content: Tensor, counts: Sequence[int], width: int) -> list[Rows]:
    """What `pack` has written, given the numbers of rows. Values are views."""
    found, position = [], 0
    for count in counts:
        numbers = content[position : position + count].view(INTEGERS[content.dtype]).to(torch.int64)
        values = content[position + count : position + count * (1 + width)].view(count, width)
        found.append(Rows(numbers=numbers, values=values))
        position += count * (1 + width)
    return found


def add_up(parts: Mapping[int, Rows], first: int, last: int) -> Rows:
    """The sum over all microbatches (by number) of the rows from `first` up to `last`, `last` excluded; new memory."""
    mine = {number: rows.between(first, last) for number, rows in sorted(parts.items())}
    some = next(iter(mine.values()))
    present = torch.zeros(last - first, dtype=torch.bool, device=some.numbers.device)
    for rows in mine.values():
        present[rows.numbers - first] = True
    numbers = present.nonzero().squeeze(1)
    places = torch.cumsum(present, 0) - 1

    def fill(rows: Rows | Tensor) -> Tensor:
        """All present rows: those that a microbatch did not touch are zero."""
        if isinstance(rows, Tensor):
            return rows
        return add(some.values.new_zeros(len(numbers), some.values.shape[1]), rows)

    def add(total: Tensor, rows: Rows | Tensor) -> Tensor:
        if isinstance(rows, Tensor):
            return total.add_(rows)
        return total.index_add_(0, places[rows.numbers - first], rows.values)

    tree: Tree[Rows | Tensor] = Tree(lambda node, left, right: add(fill(left), right))
    for number, rows in mine.items():
        tree.add(Node(0, number), rows)
    return Rows(numbers=numbers + first, values=fold_nodes([(node, fill(rows)) for node, rows in tree.pending]))


def squares_of_rows(values: Tensor) -> Tensor:
    """Sum of squares of each row, float64 [n]: products and sums of single elements, so nothing depends on how many
    rows there are."""
    squares = values * values
    while (width := squares.shape[1]) > 1:
        half = width // 2
        added = squares[:, :half] + squares[:, half : 2 * half]
        squares = torch.cat([added, squares[:, 2 * half :]], dim=1) if width % 2 else added
    return squares.squeeze(1).to(torch.float64)
