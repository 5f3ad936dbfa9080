"""Messages between a supervisor and a worker: lines of JSON over a pair of unnamed sockets.

Owns the framing. A line that a killed worker has left unfinished is never delivered.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
from collections.abc import Sequence
from typing import Any

from unisono.errors import LostPeerError

Message = dict[str, Any]
CHUNK_BYTES = 1 << 16
MOST_DESCRIPTORS = 253  # in one message of a socket: SCM_MAX_FD of Linux
_WITH = "descriptors"


class Channel:
    """One end."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._rest = b""
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message, and file descriptors with it. Where the other end is gone, or this one closed, nothing
        happens: the supervisor notices the end of a process itself."""
        if self._socket.fileno() < 0:
            return
        line = json.dumps(message | {_WITH: len(descriptors)} if descriptors else message).encode() + b"\n"
        try:
            for begin in range(0, len(descriptors), MOST_DESCRIPTORS):  # each part travels with a byte of the line
                socket.send_fds(self._socket, [line[:1]], descriptors[begin : begin + MOST_DESCRIPTORS])
                line = line[1:]
            self._socket.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            return

    def receive(self) -> tuple[Message, list[int]]:
        """Wait for a message; return it, and the file descriptors that came with it. No program that is executed
        inherits them.

        Raises:
            LostPeerError: the other end is gone.
            OSError: EMFILE; this process may not have so many descriptors.
        """
        while b"\n" not in self._rest:
            content, descriptors, _, _ = socket.recv_fds(self._socket, CHUNK_BYTES, MOST_DESCRIPTORS)
            if not content:
                raise LostPeerError("the supervisor has gone")
            self._rest += content
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            self._descriptors += descriptors
        line, _, self._rest = self._rest.partition(b"\n")
        message: Message = json.loads(line)
        count = message.pop(_WITH, 0)
        if len(self._descriptors) < count:  # the system has dropped the others
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        found, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        return message, found

    def drain(self) -> list[Message]:
        """Return what has arrived, without waiting."""
        arrivals = select.poll()  # select takes no descriptor above 1023
        arrivals.register(self._socket, select.POLLIN)
        while arrivals.poll(0):
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
