"""The fixed binary tree in which everything is combined: its places, and which of them a range covers.

Node (0, i) is leaf i (a microbatch's contribution, a task's result); node (l, i) is made of nodes (l − 1, 2i) and
(l − 1, 2i + 1); a node without a right sibling goes up unchanged. The tree depends on the leaves' numbers alone, so the
result is the same, whichever worker combines which nodes.

Owns the places. Sums of tensors are in `tree.py`, results of any kind in `parallel/gathering.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """A place in the tree: it covers the leaves index · 2^level … (index + 1) · 2^level − 1."""

    level: int
    index: int

    @property
    def parent(self) -> Node:
        return Node(self.level + 1, self.index // 2)

    def is_left_of(self, other: Node) -> bool:
        """Whether `other` is the right sibling."""
        return self.level == other.level and self.index % 2 == 0 and other.index == self.index + 1


def nodes(leaves: range) -> list[Node]:
    """The fewest complete nodes that cover a contiguous range, from left to right: at most 2 · log2(M)."""
    found: list[Node] = []
    at, stop = leaves.start, leaves.stop
    while at < stop:
        size = min(at & -at or stop, 1 << (stop - at).bit_length() - 1)  # the largest node that begins here and fits
        found.append(Node(size.bit_length() - 1, at // size))
        at += size
    return found


def fold(values: Iterable[Any]) -> Any:
    """Add all leaves 0 … M − 1 of one kind (floats, say) as the tree does."""
    level = list(values)
    while len(level) > 1:
        pairs = [a + b for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0]
