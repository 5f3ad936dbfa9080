"""Processes that begin as fresh interpreters: they have nothing of their parent's memory, threads or devices.

Owns how one is started and watched. It inherits the named descriptors, under their numbers, and gets one value that
JSON can express.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_PROGRAM = (
    "import json, sys; told = json.loads(sys.argv[1]); sys.path[:] = told['path']; "
    "from {module} import main; main(told['value'])"
)


class SpawnedProcess:
    """A fresh interpreter that calls `main(value)` of a module. A `ChildProcess`.

    Signals that are blocked here are blocked there, until it unblocks them.
    """

    def __init__(self, module: str, value: Mapping[str, Any], descriptors: Collection[int]) -> None:
        path = [folder or str(Path.cwd()) for folder in sys.path]
        told = json.dumps({"path": path, "value": value})
        options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -O, -W, -X …
        # strings must have the same hashes in all workers: a task may go through a set
        hashes = os.environ.get("PYTHONHASHSEED", "random")
        variables = os.environ | {"PYTHONHASHSEED": "0" if hashes == "random" else hashes}
        self.sentinel, alive = os.pipe()
        weakref.finalize(self, os.close, self.sentinel)
        try:
            self._process = subprocess.Popen(
                [sys.executable, *options, "-c", _PROGRAM.format(module=module), told],
                env=variables,
                stdin=subprocess.DEVNULL,
                pass_fds=(*descriptors, alive),
            )
        finally:
            os.close(alive)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end, for at most this many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
