"""Files of facts, such as recipes and manifests: read whole, where they are what they should be.

Owns the limit. Readers of data have their own.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_BYTES = 64 * 2**20


def read_small(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """The text of a small file, as `read_small_bytes`.

    Raises:
        ValueError: it is not UTF-8 as well.
    """
    return read_small_bytes(path, most_bytes).decode()


def read_small_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The bytes of a small file. A pipe or a device would keep the reader waiting, or fill the memory.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
        ValueError: its name holds the character NUL.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"larger than {most_bytes:,} bytes", str(path))
    return content
