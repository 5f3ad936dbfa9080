"""Where files are: paths, patterns, folders, and URLs through fsspec.

Owns how a location becomes a list of files, how a file is opened, and the messages when that fails. Does not depend on
formats. Credentials come from the storage libraries' own variables and never appear in a message.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from unisono.config.recipe import is_url
from unisono.errors import DataError

MAGIC = re.compile(r"[*?\[]")
READ_AHEAD_BYTES = 2**20
VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "generation",
    "Content-MD5",
    "Digest",
    "LastModified",
    "last_modified",
    "Last-Modified",
)
"""Facts by which stores distinguish versions of an object, the best first."""
_CREDENTIALS = " Set the store's credentials (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A file that was found: where, how large, and which version of it."""

    location: str
    name: str
    """Its path within the folder or pattern that was given; of a single file, its name."""
    size: int
    version: str
    """Local: size and time of change. Remote: the store's own mark of the version, '' where it has none."""
    ranged: bool = True
    """Whether reading can begin at any byte."""


def is_folder(location: str) -> bool:
    """Whether a location is an existing folder. Raises DataError if a remote store does not answer."""
    if not is_url(location):
        return Path(location).is_dir()
    with explain(location):
        system, path = _connect(location)
        return not is_pattern(location) and not location.startswith("http") and system.isdir(path)


def is_pattern(location: str) -> bool:
    """Whether a location has wildcards, and is no existing file's name."""
    if is_url(location):
        return bool(re.search(r"[*]" if location.startswith("http") else MAGIC, location.partition("://")[2]))
    return bool(MAGIC.search(location)) and not Path(location).exists()


def find_files(location: str) -> list[SourceFile]:
    """Return the file at a location, or those that match a pattern, sorted by path.

    Raises:
        DataError: there is none.
    """
    if is_url(location):
        return _find_remote(location)
    if not is_pattern(location):
        path = Path(location)
        if not path.exists():
            raise DataError(f"{location!r}: no such file. Paths in a recipe are relative to its folder.{_near(path)}")
        return [_local(path, path.name)]
    path = Path(location)
    fixed = len(list(_until_magic(path.parts)))
    root = Path(*path.parts[:fixed])
    with explain(location):
        found = set(_match(root, path.parts[fixed:]))
        files = sorted((one for one in found if one.is_file()), key=lambda one: one.parts)
    if not files:
        only = " Only folders match; a pattern means files." if found else ""
        raise DataError(f"{location!r}: no file matches.{only or _near(path, root)}")
    return [_local(one, one.relative_to(root).as_posix()) for one in files]


def list_folder(location: str) -> list[SourceFile]:
    """Return the files below a folder, sorted by path. Hidden files are left out.

    Links to folders are followed; a folder that several lead to is read once, under its own name if it lies below
    `location`.
    """
    if is_url(location):
        with explain(location):
            system, root = _connect(location)
            system.invalidate_cache()
            found = system.find(root, detail=True)
        files = [_remote(system, path, info, path[len(root) :].lstrip("/")) for path, info in found.items()]
    else:
        with explain(location):
            files = [_local(path, path.relative_to(location).as_posix()) for path in _walk_files(Path(location))]
    visible = [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
    return sorted(visible, key=lambda file: file.name.split("/"))


def find_version(file: str) -> str:
    """Return the version of a file as it is now, as in `SourceFile.version`."""
    if not is_url(file):
        return _local(Path(file), "").version
    system, path = _connect(file)
    system.invalidate_cache(path)
    return _version(system.info(path))


@contextmanager
def open_file(location: str, *, ranged: bool = True) -> Iterator[BinaryIO]:
    """Open a file for reading in blocks; errors while it is opened or read become DataErrors."""
    with explain(location):
        if is_url(location):
            system, path = _connect(location)
            options: dict[str, Any] = {"block_size": READ_AHEAD_BYTES, "cache_type": "readahead"}
            with system.open(path, "rb", **(options if ranged else {"block_size": 0})) as file:
                yield file
        else:
            with Path(location).open("rb") as file:
                yield file


def read_heads(folder: str, files: Sequence[tuple[str, int]], limit: int) -> list[bytes]:
    """Return the first `limit` bytes of files in a folder, by name and size; remote ones are fetched side by side."""
    with explain(folder):
        if is_url(folder):
            system, root = _connect(folder)
            paths = [f"{root.rstrip('/')}/{name}" for name, size in files if size]  # an empty file has no range
            fetched = iter(system.cat_ranges(paths, 0, limit, on_error="raise"))
            return [bytes(next(fetched)) if size else b"" for _, size in files]
        heads = []
        for name, _ in files:
            with (Path(folder) / name).open("rb") as file:
                heads.append(file.read(limit))
        return heads


@contextmanager
def explain(location: str) -> Iterator[None]:
    """Turn what goes wrong at a location into a DataError that names it."""
    told = tell(location)
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{told}: no such file. Check its name, and that it was not removed meanwhile.") from None
    except ImportError as error:
        raise DataError(f"{told}: {error}. Install what reads it: pip install 'unisono[remote]'.") from None
    except PermissionError as error:
        raise DataError(f"{told}: access is denied: {error}.{_CREDENTIALS if is_url(location) else ''}") from None
    except OSError as error:
        raise DataError(f"{told}: cannot be read: {error.strerror or error}.") from None
    except Exception as error:
        if not is_url(location) or isinstance(error, (AssertionError, MemoryError)):
            raise
        kind = type(error).__name__  # botocore, aiohttp …: each store's library has errors of its own
        hint = _CREDENTIALS if "Credentials" in kind else " Is the server up? Try again."
        raise DataError(f"{told}: cannot be read: {kind}: {error}.{hint}") from None


def tell(location: str) -> str:
    """A location as messages show it: quoted, and without credentials."""
    return repr(hide_secrets(location))


def hide_secrets(location: str) -> str:
    """A URL without user, password and query (in which signed URLs carry their signature); a path as it is."""
    if not is_url(location):
        return location
    scheme, separator, rest = location.partition("://")
    place, slash, path = rest.partition("/")
    path = path.partition("?")[0] if scheme.startswith("http") else path
    return scheme + separator + place.rpartition("@")[2] + slash + path


def _connect(location: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise ImportError("fsspec is not installed") from None
    try:
        system, path = url_to_fs(location)
    except ValueError as error:  # an unknown protocol
        raise DataError(
            f"{tell(location)}: {error}. Allowed are paths, s3://, https:// and what fsspec knows."
        ) from None
    return system, path


def _find_remote(location: str) -> list[SourceFile]:
    with explain(location):
        system, path = _connect(location)
        if not is_pattern(location):
            system.invalidate_cache(path)
            name = hide_secrets(location).rstrip("/").rpartition("/")[2]
            return [_remote(system, path, system.info(path), name)]
        system.invalidate_cache()
        found = system.glob(path, detail=True)
        files = {path: info for path, info in sorted(found.items()) if info["type"] == "file"}
        root = path[: MAGIC.search(path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        if not files:
            there = [str(one).rpartition("/")[2] for one in system.ls(root, detail=False)] if system.isdir(root) else []
            raise DataError(f"{tell(location)}: no file matches.{_guess(path.rpartition('/')[2], there)}")
        return [_remote(system, path, info, path[len(root) :].lstrip("/")) for path, info in files.items()]


def _remote(system: Any, path: str, info: dict[str, Any], name: str) -> SourceFile:
    if info.get("type") == "directory":
        raise FileNotFoundError(path)
    http = "http" in system.protocol or "https" in system.protocol
    size = info.get("size")
    return SourceFile(
        location=path if http else system.unstrip_protocol(path),
        name=name,
        size=size or 0,
        version=_version(info),
        ranged=size is not None and (not http or _has_ranges(system, path, size)),
    )


def _version(info: dict[str, Any]) -> str:
    version = next((f"{key}={info[key]}" for key in VERSIONS if info.get(key)), "")
    return f"{version} size={info.get('size')}" if version else ""


def _has_ranges(system: Any, path: str, size: int) -> bool:
    """Whether a web server sends a part of a file on request; only a request shows it."""
    try:
        with system.open(path, "rb", block_size=1, cache_type="none", size=size) as file:
            file.seek(1)
            return len(file.read(1)) == 1
    except (AttributeError, ValueError):  # no seek, or the whole file came
        return False


def _local(path: Path, name: str) -> SourceFile:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise DataError(
            f"{str(path)!r} is no regular file (a pipe or a device has no end). Save its content as a file."
        )
    version = f"{facts.st_size} {facts.st_mtime_ns}"
    return SourceFile(location=str(path), name=name, size=facts.st_size, version=version)


def _until_magic(parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        if MAGIC.search(part):
            return
        yield part


def _match(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Paths below `folder` that fit the pattern's parts; ** is any number of folders. Hidden names need a dot."""
    if not parts:
        yield folder
    elif parts[0] == "**":
        for below in _walk_folders(folder):
            yield from _match(below, parts[1:] or ["*"])
    elif folder.is_dir():
        for name in os.listdir(folder):  # noqa: PTH208 - names are matched before there is any path
            if fnmatch.fnmatchcase(name, parts[0]) and (not name.startswith(".") or parts[0].startswith(".")):
                yield from _match(folder / name, parts[1:])


def _walk_folders(root: Path) -> Iterator[Path]:
    """`root` and all visible folders below, each once: real folders first, then those that links lead to."""
    visited: set[tuple[int, int]] = set()
    waiting, links = [root], deque[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        facts = folder.stat()
        if (facts.st_dev, facts.st_ino) in visited:
            continue
        visited.add((facts.st_dev, facts.st_ino))
        yield folder
        for path in sorted(folder.iterdir(), reverse=True):
            if not path.name.startswith(".") and _is_folder(path):
                (links if path.is_symlink() else waiting).append(path)


def _walk_files(root: Path) -> Iterator[Path]:
    for folder in _walk_folders(root):
        yield from (path for path in folder.iterdir() if _is_file(path))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _near(path: Path, folder: Path | None = None) -> str:
    folder = folder or path.parent
    try:
        names = sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))
    except OSError:
        return f" There is no folder {str(folder)!r}."
    return _guess(path.name, names)


def _guess(name: str, there: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, there, n=3, cutoff=0.5) or list(there[:3])
    return f" Near it: {', '.join(map(repr, near))}." if near else " Its folder is empty."
