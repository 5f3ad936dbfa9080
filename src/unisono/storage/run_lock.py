"""The lock of a running run on its folder, and requests that others make through that folder.

    .running       locked for as long as the run lives; holds {"host", "pid", "workers", "most_workers"}
    .wanted-ID     {"workers": N}, written by `unisono resize`
    .answer-ID     the result of this request

The lock (`file_lock.py`) ends with the process and its workers, however they end. Owns these files. Each request has an
ID of its own, so that several at once get the answer that is theirs. Only regular files are read. Files are used
rather than a socket, because a folder has no port, needs no permission of its own, and is seen from other containers
and hosts.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisono.config.small_files import read_small
from unisono.errors import RecipeError, RunFolderError
from unisono.storage.file_lock import HeldFile, Timeout, is_held
from unisono.storage.files import write_text

RUNNING, WANTED, ANSWER = ".running", ".wanted-", ".answer-"
MOST_REQUEST_BYTES = 4096
POLL_SECONDS = 0.05
DYING_SECONDS = 3.0  # for the workers of a killed supervisor to end: they have the lock, too
ANSWER_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersRequest:
    """A request for another number of workers. name: its ID."""

    name: str
    workers: int


class RunLock:
    """This process's lock on a run folder, which must exist. Where the folder cannot be written, there is no lock, and
    no requests are possible.

    Raises:
        RunFolderError: another process has it, or something that is no lock has its name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        _refuse_odd(folder / RUNNING)
        self._held: HeldFile | None
        try:
            self._held = HeldFile(folder / RUNNING, seconds=DYING_SECONDS, poll_seconds=POLL_SECONDS)
        except Timeout:
            raise RunFolderError(_describe_holder(folder)) from None
        except OSError:
            self._held = None  # a folder that cannot be written, a file system without locks: no process is kept out
        if self._held is not None:
            with suppress(OSError):  # a file from before may have been readable for others, who could then lock it
                os.fchmod(self._held.descriptor, 0o600)
        _remove(folder, WANTED, ANSWER)

    def tell(self, **facts: Any) -> None:
        """Write which process holds the folder, and what can be requested."""
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), **facts}).encode()
        if self._held is not None:
            with suppress(OSError):  # a full disk: it is for information
                os.ftruncate(self._held.descriptor, 0)
                os.pwrite(self._held.descriptor, text, 0)

    def next_request(self) -> WorkersRequest | None:
        """The oldest request since the last call; None: there is none. One that cannot be read counts as none."""
        found: list[tuple[int, Path]] = []
        for path in self._folder.glob(f"{WANTED}*"):
            with suppress(OSError):
                found.append((path.lstat().st_mtime_ns, path))
        for _, path in sorted(found):
            workers = _read(path).get("workers")
            with suppress(OSError):
                path.unlink(missing_ok=True)
            if isinstance(workers, int) and workers > 0:
                return WorkersRequest(name=path.name.removeprefix(WANTED), workers=workers)
        return None

    def answer(self, request: WorkersRequest, text: str, *, done: bool) -> None:
        """Answer a request."""
        with suppress(RunFolderError):  # the asker sees the run's end
            write_text(self._folder / f"{ANSWER}{request.name}", json.dumps({"done": done, "text": text}))

    def release(self) -> None:
        """Release the folder."""
        if self._held is None:
            return
        _remove(self._folder, WANTED)
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
    name = uuid.uuid4().hex
    wanted, answer = folder / f"{WANTED}{name}", folder / f"{ANSWER}{name}"
    write_text(wanted, json.dumps({"workers": workers}))
    try:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not answer.exists():
            if time.monotonic() > deadline or not is_held(folder / RUNNING):
                raise RunFolderError(f"{str(folder)!r}: the run has ended, or does not answer.")
            time.sleep(POLL_SECONDS)
        found = _read(answer)
    finally:
        wanted.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
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


def _describe_holder(folder: Path) -> str:
    """Which process keeps others out of the folder, and what to do. A process that has ended is not blamed."""
    holder = _read(folder / RUNNING)
    pid, host = holder.get("pid"), holder.get("host", "?")
    if host == socket.gethostname() and isinstance(pid, int) and not _lives(pid):
        path = str(folder / RUNNING)
        return (
            f"{str(folder)!r} is locked, and process {pid}, which trained it, has ended: another process still has "
            f"{path!r} open. Find it with `fuser {path}` and end it, or use another --run-folder."
        )
    return (
        f"{str(folder)!r} is being trained by process {pid or '?'} on {host}. Wait for it, stop it (kill -TERM), or "
        "use another --run-folder."
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; no process number
        return True
    return True


def _refuse_odd(path: Path) -> None:
    """Refuse something in the lock's place that another user can have put there: it is never followed nor removed."""
    try:
        there = path.lstat()
    except OSError:
        return
    fault = ""
    if not stat.S_ISREG(there.st_mode):
        fault = "is a symbolic link" if stat.S_ISLNK(there.st_mode) else "is no regular file"
    elif os.geteuid() not in (0, there.st_uid):
        fault = f"belongs to another user (uid {there.st_uid})"
    if fault:
        raise RunFolderError(f"{str(path)!r} {fault}; a run keeps its lock there. Remove it, and start again.")


def _remove(folder: Path, *prefixes: str) -> None:
    for prefix in prefixes:
        for path in folder.glob(f"{prefix}*"):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads("" if path.is_symlink() else read_small(path, MOST_REQUEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
