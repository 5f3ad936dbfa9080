"""Small file systems for a test.

Owns the mount namespace of a process that was forked for it.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000  # sched.h
MS_REC, MS_PRIVATE = 0x4000, 0x40000  # sys/mount.h
FORBIDDEN = 77
"""Exit code of a process that may not do so."""


def mount_small(place: Path, size: str) -> None:
    """Mount a file system of this size at `place`, seen by this process and its children only; where the kernel forbids
    it, end this process."""
    libc = ctypes.CDLL(None)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS):
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
            os._exit(FORBIDDEN)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    private = libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    if private or libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, f"size={size}".encode()):
        os._exit(FORBIDDEN)
