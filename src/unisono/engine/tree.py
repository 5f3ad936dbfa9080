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


def fold_nodes(pending: Sequence[tuple[Node, Tensor]], into: Tensor | None = None) -> Tensor:
    """Add complete nodes, given from left to right and covering all microbatches; return the root.

    Sums overwrite their left part; with `into`, those that begin with the first node go there, so that it stays as it
    is. A single node is returned itself.
    """
    stack: list[tuple[Node, Tensor]] = []
    for node, value in pending:
        stack.append((node, value))
        _merge(stack, into)
    while len(stack) > 1:  # what lacks its right sibling goes up as it is
        _, right = stack.pop()
        node, left = stack.pop()
        stack.append((node, torch.add(left, right, out=left if stack or into is None else into)))
    return stack[0][1]


class Tree(Generic[Value]):
    """A worker's part of a step's tree: puts contributions together as they come, in rising order of number.

    Args:
        combine: makes a node of its children, from left to right; both are its to overwrite.

    Attributes:
        pending: the complete nodes so far, from left to right.
    """

    def __init__(self, combine: Callable[[Node, Value, Value], Value]) -> None:
        self._combine = combine
        self.pending: list[tuple[Node, Value]] = []

    def add(self, number: int, value: Value) -> None:
        """Add microbatch `number`'s contribution."""
        node = Node(0, number)
        while self.pending and self.pending[-1][0].is_left_of(node):
            left, held = self.pending.pop()
            node = left.parent
            value = self._combine(node, held, value)
        self.pending.append((node, value))

    def clear(self) -> None:
        """Forget all nodes."""
        self.pending.clear()


def _merge(stack: list[tuple[Node, Tensor]], into: Tensor | None) -> None:
    """Add siblings at the end of the stack, in place (at its beginning into `into`, where that is given)."""
    while len(stack) > 1 and stack[-2][0].is_left_of(stack[-1][0]):
        _, right = stack.pop()
        node, left = stack.pop()
        stack.append((node.parent, torch.add(left, right, out=left if stack or into is None else into)))
