"""Messages between a process and its worker, when the other end goes away."""

from __future__ import annotations

import socket

import pytest

from unisono.parallel.messages import receive


@pytest.mark.parametrize("unread", [b"", b"an outcome that nobody read"])
@pytest.mark.parametrize("begun", [b"", b"half a head"])
def test_an_end_that_is_gone_is_the_end_of_messages(unread: bytes, begun: bytes) -> None:
    """A process that dies with something unread resets the connection; its worker must end as quietly as otherwise."""
    worker, parent = socket.socketpair()
    worker.sendall(unread)
    parent.sendall(begun)
    parent.close()
    with worker:
        assert receive(worker) is None
