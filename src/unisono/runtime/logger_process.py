"""The process in which the loggers of a supervised run live.

The supervisor starts no thread and never blocks, because it forks and watches; logging tools do both. So it sends
events through an unnamed socket, and never waits for room in it. The process ends when the socket is closed, after
everything has been written: also where the supervisor was killed.

Owns the process and both ends of the socket. `tracking/delivery.py` decides what is recorded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

from unisono.config.recipe import Recipe
from unisono.processes.forking import describe_end, fork
from unisono.runtime.channel import CHUNK_BYTES, Channel
from unisono.runtime.signals import ASKING
from unisono.tracking import events
from unisono.tracking.delivery import FLUSH_SECONDS, Deliveries

CLOSE_SECONDS = 120.0
"""Time for the tools to write or send what is left, when the run has ended."""
MOST_WAITING_BYTES = 64 << 20


class LoggerProcess:
    """Passes events to loggers in another process. Without it, the run goes on.

    Args:
        warn: called when a logger, or all of them, are switched off.
    """

    def __init__(self, recipe: Recipe, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._waiting = bytearray()
        self._is_off = False
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel = Channel(self._socket)
        self._process = fork(_serve, (theirs, self._socket, recipe), "loggers", hold=ASKING)
        theirs.close()
        self._socket.setblocking(False)

    def observe(self, event: events.Event) -> None:
        """Pass an event on, or keep it until there is room."""
        if self._is_off:
            return
        line = {"event": type(event).__name__, "fields": dataclasses.asdict(event)}
        self._waiting += json.dumps(line).encode() + b"\n"
        self._send()
        if not self._is_off and len(self._waiting) > MOST_WAITING_BYTES:
            self._switch_off("the loggers accept no more events")
        self._hear()

    def close(self) -> None:
        """Wait until all is recorded, at most CLOSE_SECONDS."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._waiting and not self._is_off and time.monotonic() < deadline:
            select.select([], [self._socket], [], 0.1)
            self._send()
        if not self._is_off:
            self._socket.shutdown(socket.SHUT_WR)
        while self._process.is_alive() and time.monotonic() < deadline:
            self._process.join(0.05)
            self._hear()
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            if not self._is_off:
                self._switch_off(f"the loggers did not end within {CLOSE_SECONDS:.0f} s")
        self._hear()
        if self._process.exitcode and not self._is_off:
            self._switch_off(f"the process of the loggers {describe_end(self._process.exitcode)}")
        self._channel.close()

    def _send(self) -> None:
        """Send what there is room for."""
        try:
            while self._waiting:
                sent = self._socket.send(self._waiting[:CHUNK_BYTES])
                del self._waiting[:sent]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self._process.join(1.0)
            code = self._process.exitcode
            self._switch_off(f"the process of the loggers {describe_end(code) if code is not None else 'has gone'}")

    def _hear(self) -> None:
        """Pass on the warnings of the loggers."""
        for message in self._channel.drain():
            self._warn(message["warning"])

    def _switch_off(self, reason: str) -> None:
        self._is_off = True
        self._waiting.clear()
        self._warn(
            f"{reason}: training goes on without loggers. metrics.jsonl has everything; resume the run, and the "
            "loggers get the events that they miss."
        )


def _serve(end: socket.socket, other_end: socket.socket, recipe: Recipe) -> None:
    """Run the loggers in this process, until the other end is closed."""
    code = os.EX_SOFTWARE
    try:
        other_end.close()
        for signum in ASKING:  # a terminal sends them to all; this process ends when the supervisor has
            signal.signal(signum, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
        channel = Channel(end)
        deliveries = Deliveries(recipe, lambda message: channel.send({"warning": message}))
        rest = b""
        while True:
            if not select.select([end], [], [], FLUSH_SECONDS)[0]:
                deliveries.flush()
                continue
            content = end.recv(CHUNK_BYTES)
            if not content:
                break
            *lines, rest = (rest + content).split(b"\n")
            for line in lines:
                told = json.loads(line)
                deliveries.observe(getattr(events, told["event"])(**told["fields"]))
        deliveries.close()
        code = os.EX_OK
    except Exception:  # noqa: BLE001 - the exit code informs the supervisor, this text the reader
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no clean-up of what was inherited from the parent
