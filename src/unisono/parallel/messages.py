"""Messages between a process and its worker: numbers, and values whose large buffers lie in memory that both share.

Owns their form. Each value is packed by itself, as it is at that moment; a value that cannot be sent or rebuilt does
not affect the others.
"""

from __future__ import annotations

import socket
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from unisono.parallel.arena import Arena
from unisono.parallel.wire import Packer, unpack

_HEAD = struct.Struct("<QQQQQQ")  # batch; lengths of numbers, chunks, ranges, freed; bytes of the body


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A received message.

    chunks: the facts about the body that `wire.unpack` needs.
    ranges: where the buffers of the values are in the sender's arena: offset, size, offset, size …
    freed: ranges of the receiver's own arena that the sender no longer needs.
    """

    id: int
    numbers: array
    chunks: array
    ranges: array
    freed: array
    body: bytes

    def open(self, buffers: list[Any]) -> list[Any]:
        """Make the values again; their arrays lie in the given buffers, one for each range."""
        return unpack(self.body, self.chunks, buffers)

    @property
    def size_bytes(self) -> int:
        return len(self.body) + sum(self.ranges[1::2])


class Parcel:
    """A message to be sent."""

    def __init__(self, arena: Arena) -> None:
        ranges = self._ranges = array("Q")
        self._arena = arena

        def keep(content: memoryview) -> bool:
            offset = arena.take(content.nbytes)
            if offset >= 0:
                arena.view[offset : offset + content.nbytes] = content
                ranges.extend((offset, content.nbytes))
            return offset >= 0

        self._packer = Packer(keep)
        self.size_bytes = 0

    def add(self, value: object) -> None:
        """Pack a value. If it cannot be sent, its error is raised, and the message is unchanged."""
        before = len(self._ranges)
        try:
            self._packer.add(value)
        except BaseException:
            for offset, length in pairs(self._ranges[before:]):
                self._arena.give_back(offset, length)
            del self._ranges[before:]
            raise

    def close(self, id_: int, numbers: array, freed: array) -> list[memoryview]:
        """The message as bytes."""
        body, chunks = self._packer.finish()
        self.size_bytes = len(body) + sum(self._ranges[1::2])
        head = _HEAD.pack(id_, len(numbers), len(chunks), len(self._ranges), len(freed), len(body))
        lists = numbers.tobytes() + chunks.tobytes() + self._ranges.tobytes() + freed.tobytes()
        return [memoryview(head + lists), body]


def parse(content: bytearray) -> Iterator[Message]:
    """The messages that have arrived complete; they are removed from the content."""
    begin = 0
    while len(content) - begin >= _HEAD.size:
        head = _HEAD.unpack_from(content, begin)
        end = begin + _HEAD.size + _count_bytes(head)
        if len(content) < end:
            break
        with memoryview(content) as view:
            message = _cut(head, view[begin + _HEAD.size : end])
        begin = end
        yield message
    if begin:
        del content[:begin]


def receive(end: socket.socket) -> Message | None:
    """Wait for a message; None if the other end is closed."""
    packed = _receive(end, _HEAD.size)
    if packed is None:
        return None
    head = _HEAD.unpack(packed)
    content = _receive(end, _count_bytes(head))
    return None if content is None else _cut(head, memoryview(content))


def pairs(ranges: array) -> Iterator[tuple[int, int]]:
    """Offset and size of each range."""
    return zip(ranges[::2], ranges[1::2], strict=True)


def _count_bytes(head: tuple[int, ...]) -> int:
    return 8 * sum(head[1:5]) + head[5]


def _cut(head: tuple[int, ...], content: memoryview) -> Message:
    with content:
        numbers = array("Q")
        numbers.frombytes(content[: 8 * sum(head[1:5])])
        body = bytes(content[8 * sum(head[1:5]) :])
    a, b, c = head[1], head[1] + head[2], head[1] + head[2] + head[3]
    return Message(
        id=head[0], numbers=numbers[:a], chunks=numbers[a:b], ranges=numbers[b:c], freed=numbers[c:], body=body
    )


def _receive(end: socket.socket, size: int) -> bytearray | None:
    """Exactly this number of bytes; None if the other end is closed."""
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        try:
            count = end.recv_into(view[done:])
        except ConnectionResetError:  # it ended without reading what was sent to it
            return None
        if not count:
            return None
        done += count
    return content
