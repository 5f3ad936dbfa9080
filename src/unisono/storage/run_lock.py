"""A running run's claim on its folder, and what others may ask of it through that folder.

    .running      locked for as long as the run lives; holds {"host", "pid", "workers", "most_workers"}
    .wanted       {"workers": N}, put there by `unisono resize`
    .answer       what came of it

The lock is the kernel's, so it ends with the process, however that ends. Owns these files. Files are used rather than a
socket, because a folder has no port, needs no permission of its own, and is seen from other containers and hosts.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from unisono.errors import RecipeError, RunFolderError
from unisono.storage.files import write_text

RUNNING, WANTED, ANSWER = ".running", ".wanted", ".answer"
POLL_SECONDS = 0.05
DYING_SECONDS = 3.0  # for the workers of a killed supervisor, which have the lock too, to be gone
ANSWER_SECONDS = 600.0


class RunLock:
    """The hold of this process on a run folder, which must exist. Where it cannot be written, there is none, and nobody
    can ask for anything.

    Raises:
        RunFolderError: another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = -1
        deadline = time.monotonic() + DYING_SECONDS
        with suppress(OSError):
            while not self._take():
                if time.monotonic() > deadline:
                    holder = _read(folder / RUNNING)
                    raise RunFolderError(
                        f"{str(folder)!r} is being trained by process {holder.get('pid', '?')} on "
                        f"{holder.get('host', '?')}. Wait for it, stop it (kill -TERM), or use another --run-folder."
                    )
                time.sleep(POLL_SECONDS)
        for name in (WANTED, ANSWER):
            with suppress(OSError):
                (folder / name).unlink(missing_ok=True)

    def _take(self) -> bool:
        """Try to get the lock, on the file that is there."""
        path = self._folder / RUNNING
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        held = _lock(file)
        if held and path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            self._file = file
            return True
        os.close(file)  # somebody has it, or has removed it just now, letting go
        return False

    def tell(self, **facts: Any) -> None:
        """Say who holds the folder, and what can be asked."""
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **facts}).encode()
        with suppress(OSError):  # a full disk: it is for information
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text, 0)

    def wanted_workers(self) -> int | None:
        """The number of workers that somebody has asked for since; None: nobody has."""
        path = self._folder / WANTED
        if not path.exists():
            return None
        found = _read(path).get("workers")
        with suppress(OSError):
            path.unlink(missing_ok=True)
        return found if isinstance(found, int) and found > 0 else None

    def answer(self, text: str, *, done: bool) -> None:
        """Tell who asked."""
        with suppress(RunFolderError):
            write_text(self._folder / ANSWER, json.dumps({"done": done, "text": text}))

    def release(self) -> None:
        """Let go of the folder."""
        if self._file < 0:
            return
        for name in (WANTED, RUNNING):
            with suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1


def ask_for_workers(folder: Path, workers: int) -> str:
    """Ask the run in `folder` to go on with so many workers; wait, and return what it says.

    Raises:
        RunFolderError: no run is there, or it does not do so.
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
        if time.monotonic() > deadline or not _is_held(folder):
            raise RunFolderError(f"{str(folder)!r}: the run has ended, or does not answer.")
        time.sleep(POLL_SECONDS)
    found = _read(folder / ANSWER)
    (folder / ANSWER).unlink(missing_ok=True)
    if not found.get("done"):
        raise RunFolderError(f"{str(folder)!r}: {found.get('text')}")
    return str(found["text"])


def _holder(folder: Path) -> dict[str, Any]:
    if not _is_held(folder):
        raise RunFolderError(
            f"{str(folder)!r} is not being trained now. Name the folder of a run at work; a stopped one goes on with "
            "any number of workers: unisono train RECIPE --resume --workers N."
        )
    return _read(folder / RUNNING)


def _is_held(folder: Path) -> bool:
    try:
        file = os.open(folder / RUNNING, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    held = not _lock(file)
    os.close(file)
    return held


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks keeps nobody out
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
