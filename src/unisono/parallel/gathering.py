"""Results gathered: in the order of their items, or in the fixed tree.

Owns the results that wait for others. The result does not depend on which worker was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from unisono.determinism.nodes import Node

_MISSING = object()


class Ordered:
    """Results by number, returned in rising order."""

    def __init__(self) -> None:
        self.next = 0
        self._ready: dict[int, Any] = {}

    def put(self, values: Iterable[tuple[int, Any]]) -> None:
        """Take results by number."""
        self._ready.update(values)

    def drain(self) -> Iterator[Any]:
        """The next results, as far as they exist. None of them is held after it was returned."""
        while self.next in self._ready:
            self.next += 1
            yield self._ready.pop(self.next - 1)


class Combined:
    """Nodes of the fixed tree, combined as soon as both siblings exist.

    Where a leaf is missing (its task failed and was quarantined, or it is beyond the last), its sibling goes up
    unchanged.
    """

    def __init__(self, combine: Callable[[Any, Any], Any]) -> None:
        self._combine = combine
        self._nodes: dict[Node, Any] = {}

    def put(self, node: Node, value: Any) -> None:
        """Take a complete node."""
        while True:
            sibling = Node(node.level, node.index ^ 1)
            if sibling not in self._nodes:
                self._nodes[node] = value
                return
            other = self._nodes.pop(sibling)
            value = self._put_together(value, other) if node.index < sibling.index else self._put_together(other, value)
            node = node.parent

    def put_leaf(self, number: int, value: Any) -> None:
        """Take leaf `number`."""
        self.put(Node(0, number), value)

    def miss(self, number: int) -> None:
        """Note that leaf `number` is missing."""
        self.put(Node(0, number), _MISSING)

    def finish(self) -> tuple[Any, bool]:
        """The root over all leaves that exist, and whether there is one."""
        stack = sorted(self._nodes.items(), key=lambda one: one[0].index << one[0].level)
        result: Any = _MISSING
        for _, value in reversed(stack):  # a node without a right sibling goes up unchanged
            result = self._put_together(value, result)
        return result, result is not _MISSING

    def _put_together(self, left: Any, right: Any) -> Any:
        if left is _MISSING or right is _MISSING:
            return right if left is _MISSING else left
        return self._combine(left, right)
