"""Signals that ask a run to end, as the supervisor sees them: noted, never acted on in the handler.

Owns the handlers and their wake-up descriptor, and puts back what was there before.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C; the machine is being reclaimed (kill, a scheduler, an instance that is taken away); the same from Slurm;
the terminal is closed."""


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
