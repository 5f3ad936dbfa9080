"""Messages between a supervisor and a worker: lines of JSON over a pair of unnamed sockets.

Owns the framing. A line that a killed worker has left unfinished is never delivered.
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any

from unisono.errors import LostPeerError

Message = dict[str, Any]
CHUNK_BYTES = 1 << 16
_WITH = "with a descriptor"


class Channel:
    """One end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._rest = b""
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, message: Message, descriptor: int = -1) -> None:
        """Send a message, and a file descriptor with it. Where the other end is gone, or this one closed, nothing
        happens: the supervisor notices the end of a process itself."""
        if self._socket.fileno() < 0:
            return
        line = json.dumps(message | {_WITH: True} if descriptor >= 0 else message).encode() + b"\n"
        try:
            if descriptor < 0:
                self._socket.sendall(line)
            else:
                sent = socket.send_fds(self._socket, [line], [descriptor])
                self._socket.sendall(line[sent:])
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> tuple[Message, int]:
        """Wait for a message; return it, and the file descriptor that came with it, or −1.

        Raises:
            LostPeerError: the other end is gone.
        """
        while b"\n" not in self._rest:
            content, descriptors, _, _ = socket.recv_fds(self._socket, CHUNK_BYTES, 1)
            if not content:
                raise LostPeerError("the supervisor has gone")
            self._rest += content
            self._descriptors += descriptors
        line, _, self._rest = self._rest.partition(b"\n")
        message: Message = json.loads(line)
        return message, self._descriptors.pop(0) if message.pop(_WITH, False) else -1

    def drain(self) -> list[Message]:
        """Return what has arrived, without waiting."""
        while select.select([self._socket], [], [], 0)[0]:
            try:
                content = self._socket.recv(CHUNK_BYTES)
            except ConnectionResetError:
                content = b""
            if not content:
                break
            self._rest += content
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End it."""
        self._socket.close()


def pair() -> tuple[Channel, Channel]:
    """Return two connected ends."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(one), Channel(other)
