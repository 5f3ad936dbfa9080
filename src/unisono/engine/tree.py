"""The fixed binary tree in which contributions are added.

The tree itself is `nodes.py`: node (0, i) is microbatch i's contribution, and a missing right child is not added
(−0.0 + 0.0 would be +0.0). Whoever adds what, the sums are the same, because the tree is.

Owns the sums of tensors and a worker's pending buffers. Does not communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unisono.nodes import Node


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


class Tree:
    """A worker's part of a step's tree: adds contributions as they come, in log2 buffers that are used again.

    Contributions come in rising order of number, as `write(buffer, add)` calls: with `add` false they overwrite
    the buffer, else they are added to it, so that no contribution needs a buffer of its own before it is added.
    """

    def __init__(self, new_buffer: Callable[[], Tensor]) -> None:
        self._new_buffer = new_buffer
        self._free: list[Tensor] = []
        self._pending: list[tuple[Node, Tensor]] = []

    def add(self, number: int, write: Callable[[Tensor, bool], None]) -> None:
        """Add microbatch `number`'s contribution."""
        node = Node(0, number)
        if self._pending and self._pending[-1][0].is_left_of(node):
            left, buffer = self._pending.pop()
            write(buffer, True)
            self._pending.append((left.parent, buffer))
            self._free += _merge(self._pending)
        else:
            buffer = self._free.pop() if self._free else self._new_buffer()
            write(buffer, False)
            self._pending.append((node, buffer))

    @property
    def pending(self) -> list[tuple[Node, Tensor]]:
        """The complete nodes so far, from left to right."""
        return list(self._pending)

    def clear(self) -> None:
        """Forget all nodes; keep their buffers for the next step."""
        self._free += [buffer for _, buffer in self._pending]
        self._pending.clear()


def _merge(stack: list[tuple[Node, Tensor]], into: Tensor | None = None) -> list[Tensor]:
    """Add siblings at the end of the stack, in place (at its beginning into `into`, where that is given); return the
    values no longer needed."""
    spare: list[Tensor] = []
    while len(stack) > 1 and stack[-2][0].is_left_of(stack[-1][0]):
        _, right = stack.pop()
        node, left = stack.pop()
        stack.append((node.parent, torch.add(left, right, out=left if stack or into is None else into)))
        spare.append(right)
    return spare
