"""A lock on a file, by filelock: the kernel's, so it ends with the processes that hold it, however they end.

Ensures that workers which are forked meanwhile hold it as well, and that no file is left behind. filelock releases the
lock in forked processes; workers, which end with their parent, keep it through a copy of the descriptor, so that no
other process gets the lock while workers of a killed process are still ending. Processes that a task forks may outlive
the holder, so they do not keep it. A program that is executed does not inherit it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from unisono.processes import forking

__all__ = ["HeldFile", "Timeout", "hold", "is_held"]

_FOREVER = -1.0
_copies: set[int] = set()  # descriptors of the locks that this process holds


def _keep_or_close() -> None:
    """In a forked process: keep the locks only where it ends with its parent; what it forks itself does not keep
    them."""
    if forking.ends_with_this_one:
        forking.ends_with_this_one = False
        return
    while _copies:
        os.close(_copies.pop())


os.register_at_fork(after_in_child=_keep_or_close)


class HeldFile:
    """A lock on a file, which is created, with mode 0600, if it does not exist.

    Args:
        path: its folder must exist.
        seconds: how long to wait for another holder; −1: until it releases the lock.

    Raises:
        Timeout: another process has it, or another object of this one.
        OSError: the file cannot be made, or its file system has no locks.
    """

    def __init__(self, path: Path, *, seconds: float = _FOREVER, poll_seconds: float = 0.05) -> None:
        self.path = path
        self.descriptor = -1
        self._lock = FileLock(
            path,
            mode=0o600,
            timeout=seconds,
            poll_interval=poll_seconds,
            thread_local=False,
            fallback_to_soft=False,  # a soft lock, which is only a file, would outlive its process
            on_acquired=self._copy,
        )
        self._lock.acquire()

    def _copy(self, descriptor: int) -> None:
        self.descriptor = os.dup(descriptor)
        _copies.add(self.descriptor)

    def release(self) -> None:
        """Remove the file and release the lock, in all processes."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._lock.release()
        if self.descriptor in _copies:  # in a process that a task has forked, it is closed already
            _copies.remove(self.descriptor)
            os.close(self.descriptor)
        self.descriptor = -1


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock while a block runs; wait for it before."""
    held = HeldFile(path)
    try:
        yield
    finally:
        held.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock. False where the file does not exist, or its file system has no locks."""
    if not path.exists():
        return False
    probe = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        probe.acquire(blocking=False)
    except Timeout:
        return True
    except OSError:
        return False
    probe.release()
    return False
