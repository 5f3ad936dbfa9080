"""The lock of a running run on its folder, and requests that others make through that folder.

    .running      locked for as long as the run lives; holds {"host", "pid", "workers", "most_workers"}
        .wanted       {"workers": N}, written by `unisono resize`
        .answer       the result of the request

The lock (`file_lock.py`) ends with the process and its workers, however they end. Owns these files. Files are used
rather than a socket, because a folder has no port, needs no permission of its own, and is seen from other containers
and hosts.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from unisono.errors import RecipeError, RunFolderError
from unisono.storage.file_lock import HeldFile, Timeout, is_held
from unisono.storage.files import write_text

RUNNING, WANTED, ANSWER = ".running", ".wanted", ".answer"
POLL_SECONDS = 0.05
DYING_SECONDS = 3.0  # for the workers of a killed supervisor to end: they have the lock, too
ANSWER_SECONDS = 600.0


class RunLock:
    """This process's lock on a run folder, which must exist. Where the folder cannot be written, there is no lock, and
    no requests are possible.

    Raises:
        RunFolderError: another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: HeldFile | None
        try:
            self._held = HeldFile(folder / RUNNING, seconds=DYING_SECONDS, poll_seconds=POLL_SECONDS)
        except Timeout:
            holder = _read(folder / RUNNING)
            raise RunFolderError(
                f"{str(folder)!r} is being trained by process {holder.get('pid', '?')} on "
                f"{holder.get('host', '?')}. Wait for it, stop it (kill -TERM), or use another --run-folder."
            ) from None
        except OSError:
            self._held = None  # a folder that cannot be written, a file system without locks: no process is kept out
        for name in (WANTED, ANSWER):
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)

    def tell(self, **facts: Any) -> None:
        """Write which process holds the folder, and what can be requested."""
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **facts}).encode()
        if self._held is not None:
            with suppress(OSError):  # a full disk: it is for information
                os.ftruncate(self._held.descriptor, 0)
                os.pwrite(self._held.descriptor, text, 0)

    def wanted_workers(self) -> int | None:
        """The number of workers that was requested since the last call; None: no request."""
        path = self._folder / WANTED
        if not path.exists():
            return None
        found = _read(path).get("workers")
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return found if isinstance(found, int) and found > 0 else None

    def answer(self, text: str, *, done: bool) -> None:
        """Answer the request."""
        with suppress(RunFolderError):
            write_text(self._folder / ANSWER, json.dumps({"done": done, "text": text}))

    def release(self) -> None:
        """Release the folder."""
        if self._held is None:
            return
        with suppress(OSError):
            (self._folder / WANTED).unlink(missing_ok=True)
        self._held.release()
        self._held = None


def ask_for_workers(folder: Path, workers: int) -> str:
    """Request that the run in `folder` goes on with so many workers; wait, and return its answer.

    Raises:
        RunFolderError: no run is there, or it refuses.
        RecipeError: more workers than its recipe has microbatches.
    """
    holder = _holder(folder)
    most = int(holder.get("most_workers", workers))
    if not 1 <= workers <= most:
        raise RecipeError(
            f"`--workers {workers}`: the run has {most} microbatches, so 1 to {most} workers can share a step."
        )
    (folder / ANSWER).unlink(missing_ok=True)
    write_text(folder / WANTED, json.dumps({"workers": workers}))
    deadline = time.monotonic() + ANSWER_SECONDS
    while not (folder / ANSWER).exists():
        if time.monotonic() > deadline or not is_held(folder / RUNNING):
            raise RunFolderError(f"{str(folder)!r}: the run has ended, or does not answer.")
        time.sleep(POLL_SECONDS)
    found = _read(folder / ANSWER)
    (folder / ANSWER).unlink(missing_ok=True)
    if not found.get("done"):
        raise RunFolderError(f"{str(folder)!r}: {found.get('text')}")
    return str(found["text"])


def _holder(folder: Path) -> dict[str, Any]:
    if not is_held(folder / RUNNING):
        raise RunFolderError(
            f"{str(folder)!r} is not being trained now. Name the folder of a run that is being trained; a stopped "
            "one goes on with any number of workers: unisono train RECIPE --resume --workers N."
        )
    return _read(folder / RUNNING)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
