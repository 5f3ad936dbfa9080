"""Hashes of files that are computed once a host, whatever the number of workers.

Owns what this process knows, and how the first worker of a run passes it on to the others. A hash is known for a file
as it was: device, inode, size, and the times at which content and inode changed. If one differs, it is unknown.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unisono.config.small_files import read_small

FRESH_SECONDS = 0.1
"""A file changed so lately may change again without a new time: the clock of files has steps of some milliseconds."""

_known: dict[str, str] = {}


def identify(what: str, paths: Iterable[str | Path]) -> str:
    """A key for what is computed from these files as they are now; "" where they cannot be told from later ones."""
    marks = []
    for path in paths:
        try:
            found = Path(path).stat()
        except OSError:
            return ""
        if time.time() - found.st_mtime < FRESH_SECONDS:
            return ""
        marks.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
    return json.dumps([what, marks])


def find(key: str) -> str | None:
    """The hash that was kept under a key."""
    return _known.get(key)


def keep(key: str, sha256: str) -> None:
    """Keep a hash under a key that was made before the files were read."""
    if key:
        _known[key] = sha256


def forget() -> None:
    """Forget all: each run verifies what it reads."""
    _known.clear()


@contextmanager
def unnamed_file() -> Iterator[Path]:
    """The path of an empty file in memory, for all processes of this user on this host; nothing is left of it when this
    process ends, however it ends."""
    descriptor = os.memfd_create("unisono-hashes")
    try:
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


def pass_on(path: Path) -> None:
    """Write what is known to a file, for other workers of this run on this host. They read it after a meeting."""
    path.write_text(json.dumps(_known), encoding="utf-8")


def take_over(path: Path) -> None:
    """Know what another worker of this run knew, and nothing else."""
    _known.clear()
    if path.is_file():
        with suppress(ValueError):  # empty, or written in part by a worker that was lost: then nothing is known
            _known.update(json.loads(read_small(path)))
