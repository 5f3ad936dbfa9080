"""Folders that are whole or absent, and files that match their SHA-256.

Owns temporary names, fsync, rename, checksums. Does not depend on what the files hold.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from unisono.config.small_files import read_small
from unisono.errors import DamagedError, RunFolderError

if TYPE_CHECKING:
    from torch import Tensor

PART, OLD = ".part", ".old"
"""Endings of names: of what is being written, and of a folder that is being replaced. Both names begin with a dot."""


@contextmanager
def whole_folder(folder: Path, at: Callable[[str], None] = lambda phase: None) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on success fsync it and rename it there, replacing an older one; else
    remove it. `at` is called with "sync" and "rename" before these happen.

    Raises:
        RunFolderError: the disk is full, or the place cannot be written.
    """
    parent = folder.parent
    temporary = _name_part(folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.glob(f".{glob.escape(folder.name)}*{PART}"):  # by a writer that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        at("sync")
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        at("rename")
        old = parent / f".{folder.name}{OLD}"
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        try:
            temporary.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        sync(parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _unwritable(folder, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder; for others it disappears at once and wholly. An unfinished removal leaves a leftover."""
    hidden = _name_part(folder)
    with suppress(OSError):  # it stays, whole
        folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what a killed writer of folders left in `parent`; a folder that it was about to replace comes back."""
    for path in parent.glob(f".*{PART}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in parent.glob(f".*{OLD}"):
        replaced = parent / path.name[1:].removesuffix(OLD)
        if replaced.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(replaced)


def boot_id() -> str:
    """An identifier of this start of the machine; a new one each time where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return uuid.uuid4().hex


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a new, empty file beside `path`; on success fsync it and rename it there; else remove it. Its
    name cannot be known before, so it is no other file, nor a link to one.

    durable: false leaves out the fsync. The file is then whole or absent for all readers while the machine is up, and
    may have any content after a power loss; see `boot_id`.

    Raises:
        RunFolderError: the disk is full, or the place cannot be written.
    """
    temporary = _name_part(path)
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        yield temporary
        if durable:
            sync(temporary)
        temporary.rename(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # the place itself may be gone, and the error says so
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def to_json(value: object, **options: Any) -> str:
    """JSON that every reader takes. JSON has no NaN and no infinite numbers, which Python's `json` writes all the same:
    NaN becomes null, an infinite number the text "Infinity" or "-Infinity"."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {_without_nan(name): _without_nan(one) for name, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list | tuple) else value


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; equal tensors give equal bytes. Those that share memory are copied: the format
    allows none of that."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        whole = storage.nbytes() == value.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = value if whole else value.clone()
    path.touch()
    mode = path.stat().st_mode  # as umask says; safetensors lets only the owner read what it makes
    save_file(apart, path, metadata={"format": "pt"})
    path.chmod(mode)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        DamagedError: the file is not readable as such.
    """
    from safetensors.torch import load_file

    if path.exists() and not path.is_file():  # a pipe would keep the reader waiting
        raise DamagedError(f"{str(path)!r} is no regular file. Restore it as it was written.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{str(path)!r} is damaged: {error}. Restore it as it was written.") from error


def seal(folder: Path, name: str, facts: dict[str, Any]) -> None:
    """Write `facts` as JSON file `name`; under "files" size and SHA-256 of every other file, under "sha256" that of all
    these facts."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
    }
    sealed = {**facts, "files": files}
    text = json.dumps({**sealed, "sha256": facts_sha256(sealed)}, indent=1, sort_keys=True)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def open_sealed(folder: Path, name: str) -> dict[str, Any]:
    """Read the facts back, after comparing them with their own SHA-256, and every file with its size and SHA-256.

    Raises:
        DamagedError: names the first file that is missing, truncated or altered.
    """
    path = folder / name
    try:
        facts: dict[str, Any] = json.loads(read_small(path))
        sha256, files = facts.pop("sha256"), dict(facts["files"])
        known = {file: (int(entry["bytes"]), str(entry["sha256"])) for file, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(
            f"{str(path)!r} is missing or damaged ({error}). Delete the folder {str(folder)!r}."
        ) from error
    if facts_sha256(facts) != sha256:
        raise DamagedError(f"{str(path)!r} is altered: its SHA-256 is not {sha256}. Delete the folder {str(folder)!r}.")
    remedy = f"Delete the folder {str(folder)!r}; an older one beside it is used then."
    for file, (size_bytes, file_sha) in known.items():
        check_file(folder / file, size_bytes, file_sha, remedy)
    return facts


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def facts_sha256(facts: object) -> str:
    """SHA-256 of plain values, whatever the order of their names."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_file(path: Path, size_bytes: int, sha256: str, remedy: str) -> None:
    """Raise DamagedError unless a file has this size and SHA-256."""
    if not path.is_file():
        fault = "is no regular file" if path.exists() else "is missing"
    elif path.stat().st_size < size_bytes:
        fault = f"is truncated: {path.stat().st_size} bytes, not {size_bytes}"
    elif path.stat().st_size > size_bytes or file_sha256(path) != sha256:
        fault = "is damaged: its SHA-256 is not the one that was recorded"
    else:
        return
    raise DamagedError(f"{str(path)!r} {fault}. {remedy}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileStamp:
    """What the system notes when a file is written: another stamp may mean other bytes, the same one means the same."""

    device: int
    inode: int
    size_bytes: int
    written_ns: int
    changed_ns: int

    @staticmethod
    def of(path: Path) -> FileStamp:
        """The stamp of the file at a path."""
        return FileStamp.from_stat(path.stat())

    @staticmethod
    def from_stat(found: os.stat_result) -> FileStamp:
        """The stamp in what the system says of a file."""
        return FileStamp(
            device=found.st_dev,
            inode=found.st_ino,
            size_bytes=found.st_size,
            written_ns=found.st_mtime_ns,
            changed_ns=found.st_ctime_ns,
        )


class WatchedFile:
    """An open file, of which one can ask whether its bytes are still those with this SHA-256. It is the open file that
    counts, also where another one has its name now."""

    def __init__(self, path: Path, stamp: FileStamp, sha256: str) -> None:
        self._path = path
        self._file = path.open("rb")
        self._stamp = stamp
        self._sha256 = sha256

    def __reduce__(self) -> tuple[type[WatchedFile], tuple[Path, FileStamp, str]]:
        """A spawned worker opens the file anew."""
        return WatchedFile, (self._path, self._stamp, self._sha256)

    def changed(self) -> bool:
        """Whether the bytes have changed. They are read only where the stamp is another one."""
        if not self.touched():
            return False
        now = FileStamp.from_stat(os.fstat(self._file.fileno()))
        self._file.seek(0)
        changed = hashlib.file_digest(self._file, "sha256").hexdigest() != self._sha256
        if not changed:
            self._stamp = now
        return changed

    def touched(self) -> bool:
        """Whether the stamp is another one: written, linked, renamed or only touched."""
        return FileStamp.from_stat(os.fstat(self._file.fileno())) != self._stamp


def sync(path: Path) -> None:
    """Write a file or a folder to the disk, not only to the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name_part(path: Path) -> Path:
    """A name that nobody has used yet, for what becomes `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{PART}")


def _unwritable(path: Path, error: Exception) -> RunFolderError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
    remedy = "the disk is full" if full else str(error)
    return RunFolderError(f"{str(path)!r} cannot be written: {remedy}; nothing half-written was left.")
