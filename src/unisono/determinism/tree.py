"""The fixed binary tree in which contributions are added.

The tree itself is in `nodes.py`: node (0, i) is microbatch i's contribution, and a missing right child is not added
(−0.0 + 0.0 would be +0.0). The sums are the same, whichever worker adds which nodes, because the tree is the same.

Owns the order of additions. Does not communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from unisono.determinism.nodes import Node

Value = TypeVar("Value")


class Tree(Generic[Value]):
    """A part of the tree: combines nodes as they come, from left to right.

    Args:
        combine: makes a node of its children, the left one first; it may overwrite both.

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
        """Remove all nodes."""
        self.pending.clear()


def additions(nodes: Sequence[Node]) -> list[int]:
    """Return how often, after each of these complete nodes, the last two values become one. They are given from left to
    right, and cover all microbatches."""
    tree: Tree[None] = Tree(lambda node, left, right: None)
    found: list[int] = []
    for node in nodes:
        waiting = len(tree.pending)
        tree.add(node, None)
        found.append(waiting + 1 - len(tree.pending))
    found[-1] += len(tree.pending) - 1  # a node without a right sibling goes up unchanged
    return found


def fold_nodes(pending: Sequence[tuple[Node, Tensor]], into: Tensor | None = None) -> Tensor:
    """Add complete nodes, given from left to right and covering all microbatches; return the root, as `fold_values`."""
    return fold_values([value for _, value in pending], additions([node for node, _ in pending]), into)


def fold_values(values: Sequence[Tensor], additions: Sequence[int], into: Tensor | None = None) -> Tensor:
    """Add the values of nodes in the order of `additions`; return the root.

    Sums overwrite their left part; with `into`, those that begin with the first node go there, so that this node stays
    unchanged. A single node is returned itself.
    """
    stack: list[Tensor] = []
    for value, count in zip(values, additions, strict=True):
        stack.append(value)
        for _ in range(count):
            right, left = stack.pop(), stack.pop()
            stack.append(torch.add(left, right, out=left if stack or into is None else into))
    return stack[0]
