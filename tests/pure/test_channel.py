"""Messages between supervisor and worker: whole or not at all, in order, with a file now and then."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from unisono.errors import LostPeerError
from unisono.runtime.channel import CHUNK_BYTES, MOST_DESCRIPTORS, Channel, pair

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, other = pair()
    yield one, other
    one.close()
    other.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A channel, and an end that may send anything."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel(other)
    yield one, channel
    one.close()
    channel.close()


def test_messages_arrive_in_order_both_ways(ends: Ends) -> None:
    for sender, receiver in (ends, ends[::-1]):
        messages = [{"event": "X", "fields": {"text": "line\nbreak – ü", "number": number}} for number in range(50)]
        for message in messages:
            sender.send(message)
        assert [receiver.receive() for _ in range(20)] == [(message, []) for message in messages[:20]]
        assert receiver.drain() == messages[20:]
        assert receiver.drain() == []


def test_a_line_in_pieces_is_delivered_when_it_is_whole(raw: tuple[socket.socket, Channel]) -> None:
    end, channel = raw
    line = json.dumps({"text": "ü" * 5}, ensure_ascii=False).encode() + b"\n"
    for byte in line[:-1]:
        end.sendall(bytes([byte]))
        assert channel.drain() == []
    end.sendall(b'\n{"next": 1}\n{"half')
    assert channel.drain() == [{"text": "ü" * 5}, {"next": 1}]
    end.sendall(b'": 2}\n')
    assert channel.receive() == ({"half": 2}, [])


def test_what_was_drained_in_part_is_received_whole(raw: tuple[socket.socket, Channel]) -> None:
    end, channel = raw
    end.sendall(b'{"a": 1}\n{"b"')
    assert channel.receive() == ({"a": 1}, [])
    assert channel.drain() == []
    end.sendall(b": 2}\n")
    assert channel.drain() == [{"b": 2}]


def test_an_unfinished_line_is_never_delivered(raw: tuple[socket.socket, Channel]) -> None:
    end, channel = raw
    end.sendall(b'{"whole": 1}\n{"event": "StepDone"')
    end.close()
    assert channel.drain() == [{"whole": 1}]
    assert channel.drain() == []
    with pytest.raises(LostPeerError, match="gone"):
        channel.receive()


def test_an_unfinished_line_that_would_be_whole_json_is_not_delivered(raw: tuple[socket.socket, Channel]) -> None:
    end, channel = raw
    end.sendall(b'{"a": 1}')
    end.close()
    assert channel.drain() == []


def test_long_messages(ends: Ends) -> None:
    """Longer than a chunk, and than what a socket holds."""
    one, other = ends
    message = {"trace": "x" * (5 * CHUNK_BYTES), "more": list(range(50_000))}
    for receive in (lambda: other.receive()[0], lambda: collect(other)):
        thread = threading.Thread(target=one.send, args=(message,))
        thread.start()
        assert receive() == message
        thread.join()


def collect(channel: Channel) -> object:
    """Drain until something has come."""
    while not (found := channel.drain()):
        pass
    (message,) = found
    return message


def test_a_file_goes_along(ends: Ends) -> None:
    one, other = ends
    for number in range(3):  # one after another, as groups of workers come
        reading, writing = os.pipe()
        one.send({"rank": number}, [reading])
        os.close(reading)
        message, (received,) = other.receive()
        assert message == {"rank": number}
        os.write(writing, b"through")
        assert os.read(received, 99) == b"through"
        os.close(received)
        os.close(writing)
        one.send({"without": number})
        assert other.receive() == ({"without": number}, [])


def test_a_file_with_a_long_message(ends: Ends) -> None:
    one, other = ends
    reading, writing = os.pipe()
    message = {"text": "x" * (5 * CHUNK_BYTES)}
    thread = threading.Thread(target=one.send, args=(message, [reading]))
    thread.start()
    found, (received,) = other.receive()
    thread.join()
    assert found == message and os.fstat(received).st_ino == os.fstat(reading).st_ino
    for descriptor in (reading, writing, received):
        os.close(descriptor)


def test_more_files_than_one_message_of_a_socket_takes(ends: Ends) -> None:
    """They come in order, and no program that is executed inherits them."""
    one, other = ends
    files = [os.pipe() for _ in range(2)]
    asked = [files[number % 2][0] for number in range(2 * MOST_DESCRIPTORS + 3)]
    one.send({"rank": 0}, asked)
    one.send({"rank": 1}, asked[:1])
    (first, found), (second, last) = other.receive(), other.receive()
    assert (first, second) == ({"rank": 0}, {"rank": 1}) and not any(map(os.get_inheritable, found))
    assert [os.fstat(file).st_ino for file in found + last] == [os.fstat(file).st_ino for file in asked + asked[:1]]
    for file in [*found, *last, *files[0], *files[1]]:
        os.close(file)


def test_files_for_which_there_is_no_room_are_missed(ends: Ends) -> None:
    """The system drops them without an error."""
    one, other = ends
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    one.send({"rank": 0}, [0] * 9)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 3, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            other.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for file in other._descriptors:
            os.close(file)
    assert raised.value.errno == errno.EMFILE


def test_who_is_gone_is_told_nothing(ends: Ends) -> None:
    one, other = ends
    other.close()
    one.send({"event": "late"})
    one.send({"seat": "late"}, [0])
    one.send({"text": "x" * (5 * CHUNK_BYTES)})
    assert one.drain() == []
    with pytest.raises(LostPeerError):
        one.receive()


def test_nothing_is_sent_after_the_end(ends: Ends) -> None:
    one, other = ends
    one.close()
    one.send({"event": "late"})
    one.send({"seat": "late"}, [0])
    assert other.drain() == []


def test_last_words_are_heard(ends: Ends) -> None:
    one, other = ends
    one.send({"event": "RunEnded"})
    one.close()
    assert other.drain() == [{"event": "RunEnded"}]


def test_a_worker_that_is_killed_in_the_middle_of_a_message(ends: Ends) -> None:
    one, other = ends
    pid = os.fork()
    if not pid:
        one.send({"event": "StepDone", "step": 1})
        threading.Timer(0.05, os._exit, (9,)).start()
        one.send({"event": "StepDone", "text": "x" * 10_000_000})  # does not fit: it waits here for its end
        os._exit(0)
    one.close()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert other.drain() == [{"event": "StepDone", "step": 1}]
    assert other.drain() == []


def test_a_descriptor_comes_with_its_own_message() -> None:
    one, other = pair()
    reading, writing = os.pipe()
    one.send({"written": True})
    one.send({"rank": 0}, [reading])
    assert other.receive() == ({"written": True}, [])
    message, (descriptor,) = other.receive()
    assert message == {"rank": 0}
    os.write(writing, b"x")
    assert os.read(descriptor, 1) == b"x"
