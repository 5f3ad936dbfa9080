"""How the workers of a group exchange a few words before an exchange connects them.

Owns the two ways: sockets with which one process has connected its own workers, so that no other process can speak
there; and a store of torch.distributed, where another program has started the workers.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist

from unisono.errors import LostPeerError

JOIN_SECONDS = 60.0  # for a worker that was ready before the meeting began


class Meeting(Protocol):
    """Where the workers of one group meet."""

    def gather(self, what: str, word: str) -> list[str]:
        """Return what every worker passed under the name `what`, in order of rank. All workers call this, with the same
        names in the same order.

        Raises:
            LostPeerError, or a RuntimeError of a store: another worker has ended, or did not come in time.
        """
        ...

    def close(self) -> None:
        """Leave. The others notice it."""
        ...


class StoreMeeting:
    """A `Meeting` at a store of torch.distributed."""

    def __init__(self, store: dist.Store, rank: int, workers: int) -> None:
        self.store, self._rank, self._workers = store, rank, workers

    def gather(self, what: str, word: str) -> list[str]:
        self.store.set(f"{what}-{self._rank}", word)
        return [one.decode() for one in self.store.multi_get([f"{what}-{other}" for other in range(self._workers)])]

    def close(self) -> None:
        return


class SocketMeeting:
    """A `Meeting` at worker 0, which has a socket to each of the others, in order of rank; these have one to it.
    A worker that ends, or leaves, closes its sockets, and so all others leave at once."""

    def __init__(self, descriptors: Sequence[int], rank: int) -> None:
        self._rank = rank
        self._ends = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for end in self._ends:
            end.settimeout(JOIN_SECONDS)
        self._files = [end.makefile("rb") for end in self._ends]

    def gather(self, what: str, word: str) -> list[str]:
        try:
            if self._rank > 0:
                self._send(0, word)
                everyone: list[str] = self._receive(0)
                return everyone
            everyone = [word, *(self._receive(number) for number in range(len(self._files)))]
            for number in range(len(self._files)):
                self._send(number, everyone)
            return everyone
        except OSError as error:
            raise LostPeerError(f"another worker has gone: {error or type(error).__name__} ({what})") from error

    def close(self) -> None:
        for end, file in zip(self._ends, self._files, strict=True):
            file.close()
            end.close()

    def _send(self, number: int, words: Any) -> None:
        self._ends[number].sendall(json.dumps(words).encode() + b"\n")

    def _receive(self, number: int) -> Any:
        line = self._files[number].readline()
        if not line.endswith(b"\n"):
            raise LostPeerError("another worker has gone: it has left the meeting")
        return json.loads(line)
