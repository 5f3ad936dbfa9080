"""Signals that ask a run to end, as the supervisor sees them: noted, never acted on in the handler.

Owns the handlers and their wake-up descriptor, and puts back what was there before. Owns as well what a signal does
before a run has handlers of its own, and after it: none is lost, and none changes the exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C; the machine is being reclaimed (kill, a scheduler, an instance that is taken away); the same from Slurm;
the terminal is closed."""


EX_INTERRUPTED = 130
_early: list[signal.Signals] = []  # noted, and not yet taken over by a run
_is_early = False  # the command line has not come to its run yet


def end_early() -> None:
    """For the command line, as its first act: until the run begins, a signal ends this process with the exit code that
    it has later. Nothing exists yet that would have to be cleaned up; an exception could be swallowed by an import.
    After the run, signals are ignored: the process is ending already."""
    global _is_early
    _is_early = True
    for signum in ASKING:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _end)


def _end(signum: int, frame: FrameType | None) -> None:
    if _is_early:
        with suppress(OSError):  # the terminal itself may be closed
            os.write(2, b"unisono: stopped before the first step; no run folder was left behind.\n")
        os._exit(EX_INTERRUPTED if signum == signal.SIGINT else os.EX_TEMPFAIL)


@contextmanager
def noted() -> Iterator[None]:
    """Within, in the main thread: signals are kept until the handlers of the run take them over. Those that none took
    over are sent again afterwards."""
    global _is_early
    _is_early = False
    before: dict[int, Any] = {}
    for signum in ASKING if in_main_thread() else ():
        handler = signal.getsignal(signum)
        if handler is not None and (signum != signal.SIGHUP or handler != signal.SIG_IGN):  # as nohup has it
            before[signum] = signal.signal(signum, lambda signum, frame: _early.append(signal.Signals(signum)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for missed in take_noted():
            os.kill(os.getpid(), missed)


def take_noted() -> list[signal.Signals]:
    """The signals that came before the run had handlers, in order; the caller now acts on them."""
    taken = _early[:]
    del _early[: len(taken)]
    return taken


def in_main_thread() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


class StopSignals:
    """Within: signals are collected in `asked`, in order; each makes `descriptor` readable. Only the main thread can
    set handlers, so elsewhere the main thread keeps its own."""

    def __init__(self) -> None:
        self.asked: list[signal.Signals] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.descriptor, self._wake = os.pipe()
        for end in (self.descriptor, self._wake):
            os.set_blocking(end, False)
        self._listens = in_main_thread()
        for signum in ASKING if self._listens else ():
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it
                self._before[signum] = signal.signal(signum, self._note)
        for signum in take_noted():
            self._note(signum, None)
        if self._listens:
            self._wakeup_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            signal.set_wakeup_fd(self._wakeup_before)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self.descriptor)
        os.close(self._wake)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.asked.append(signal.Signals(signum))
        if len(self.asked) == 1:
            with suppress(OSError):  # the terminal itself may be closed
                print("\nstopping after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)
