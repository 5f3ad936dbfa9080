"""Memory that a process and its child share, and which part of it is in use.

Owns the ranges. The memory has no name: it is mapped before the fork, and freed with the last process that maps it.
"""

from __future__ import annotations

import mmap
from bisect import insort

ALIGNMENT_BYTES = 64


class Arena:
    """Shared memory of a fixed size; one side takes ranges of it and gives them back, the other only reads them."""

    def __init__(self, size_bytes: int) -> None:
        self.memory = mmap.mmap(-1, size_bytes)
        self.view = memoryview(self.memory)
        self._free = [(0, size_bytes)]  # (offset, size), by offset, never touching

    def take(self, size_bytes: int) -> int:
        """Reserve a range of this size for the caller; return its offset, −1 if none is left."""
        needed = -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        for number, (offset, size) in enumerate(self._free):
            if size >= needed:
                self._free[number : number + 1] = [(offset + needed, size - needed)] if size > needed else []
                return offset
        return -1

    def give_back(self, offset: int, size_bytes: int) -> None:
        """Release a range that `take` returned."""
        size = -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        insort(self._free, (offset, size))
        place = self._free.index((offset, size))
        if place + 1 < len(self._free) and offset + size == self._free[place + 1][0]:
            size += self._free.pop(place + 1)[1]
        if place and sum(self._free[place - 1]) == offset:
            offset, size = self._free[place - 1][0], size + self._free[place - 1][1]
            self._free.pop(place)
            place -= 1
        self._free[place] = (offset, size)
