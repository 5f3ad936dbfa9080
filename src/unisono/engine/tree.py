"""The fixed binary tree in which contributions are added.

The tree itself is `nodes.py`: node (0, i) is microbatch i's contribution, and a missing right child is not added
(−0.0 + 0.0 would be +0.0). Whoever adds what, the sums are the same, because the tree is.

Owns the order of additions. Does not communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from unisono.nodes import Node

Value = TypeVar("Value")


class Tree(Generic[Value]):
    """A part of the tree: puts nodes together as they come, from left to right.

    Args:
        combine: makes a node of its children, the left one first; both are its to overwrite.

    Attributes:
        pending: the nodes that wait for a sibling, from left to right.
    """

    def __init__(self, combine: Callable[[Node, Value, Value], Value]) -> None:
        self._combine = combine
        self.pending: list[tuple[Node, Value]] = []

    def add(self, node: Node, value: Value) -> None:
        """Add the node that follows the last one."""
        while self.pending and self.pending[-1][0].is_left_of(node):
            left, held = self.pending.pop()
            node = left.parent
            value = self._combine(node, held, value)
        self.pending.append((node, value))

    def clear(self) -> None:
        """Forget all nodes."""
        self.pending.clear()


def fold_nodes(pending: Sequence[tuple[Node, Tensor]], into: Tensor | None = None) -> Tensor:
    """Add complete nodes, given from left to right and covering all microbatches; return the root.

    Sums overwrite their left part; with `into`, those that begin with the first node go there, so that it stays as it
    is. A single node is returned itself.
    """

    def combine(node: Node, left: Tensor, right: Tensor) -> Tensor:
        return torch.add(left, right, out=left if node.index or into is None else into)

    tree = Tree(combine)
    for node, value in pending:
        tree.add(node, value)
    *lefts, (_, root) = tree.pending
    for node, left in reversed(lefts):  # what lacks its right sibling goes up as it is
        root = combine(node, left, root)
    return root
