"""Compressed files, unpacked while they are read.

Owns which compressions there are, the messages about a damaged file, and the limit on how far a file may unpack.
Does not depend on the content.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from io import DEFAULT_BUFFER_SIZE
from pathlib import PurePosixPath

from unisono.data.ingest.lines import Stream
from unisono.errors import DataError

SUFFIXES = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst"}
ARCHIVES = {
    ".zip": "unzip {name}",
    ".tar": "tar -xf {name}",
    ".tgz": "tar -xf {name}",
    ".7z": "7z x {name}",
    ".rar": "unrar x {name}",
}
FREE_BYTES = 64 * 2**20
"""The limit on expansion applies above this size: small files of equal lines are no attack."""


def find_compression(name: str) -> tuple[str, str]:
    """Return a file name without the suffix of its compression, and the compression ('' for none).

    Raises:
        DataError: it is an archive of files.
    """
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    inner = path.with_suffix("") if suffix in SUFFIXES else path
    archive = ARCHIVES.get(inner.suffix.lower())
    if archive:
        unpack = archive.format(name=path.name)
        raise DataError(f"{name!r} is an archive of files. Unpack it first ({unpack}); {', '.join(SUFFIXES)} are read.")
    return (inner.name, SUFFIXES[suffix]) if suffix in SUFFIXES else (name, "")


class _Counted:
    """A raw file that counts how much of it was read."""

    def __init__(self, file: Stream) -> None:
        self._file = file
        self.bytes = 0
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.bytes += len(block)
        return block

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


class _Members:
    """The content of the members of a bz2 or xz file, one after the other; zeros may stand between and after them.

    Python's own readers take a member with a damaged beginning for garbage after the last one, and drop it in silence.
    """

    def __init__(self, file: _Counted, begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]) -> None:
        self._file = file
        self._begin = begin
        self._member = begin()

    def read(self, size: int, /) -> bytes:
        while True:
            if self._member.eof:
                packed = self._member.unused_data.lstrip(b"\0")
                while not packed:
                    if not (block := self._file.read(DEFAULT_BUFFER_SIZE)):
                        return b""
                    packed = block.lstrip(b"\0")
                self._member = self._begin()
            else:
                packed = self._file.read(DEFAULT_BUFFER_SIZE) if self._member.needs_input else b""
                if self._member.needs_input and not packed:
                    raise EOFError
            if content := self._member.decompress(packed, size):
                return content


class Unpacked:
    """The content of a compressed file, as a stream."""

    def __init__(self, file: Stream, compression: str, name: str, max_expansion: float) -> None:
        self._packed = _Counted(file)
        self._name = name
        self._limit = max_expansion
        self._bytes = 0
        with _Damage(name):
            self._stream = _open(self._packed, compression)

    def read(self, size: int, /) -> bytes:
        """Return the next bytes, at most `size`; none at the end.

        Raises:
            DataError: the file is damaged, cut off, or unpacks to more than data.max_expansion times its size.
        """
        with _Damage(self._name):
            block = bytes(self._stream.read(size))
        self._bytes += len(block)
        if self._bytes > max(FREE_BYTES, self._limit * self._packed.bytes):
            raise DataError(
                f"{self._name}: unpacks to more than data.max_expansion = {self._limit:g} times its size. "
                "If the file can be trusted, raise data.max_expansion, or unpack it first."
            )
        return block


class _Damage:
    """Raises what goes wrong in unpacking as a DataError."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, EOFError) or (isinstance(error, OSError) and "runcated" in str(error)):
            raise DataError(f"{self._name}: cut off: the compressed file ends too early. Fetch it again.") from None
        if isinstance(error, (OSError, zlib.error, lzma.LZMAError)) and not _is_system(error):
            raise DataError(
                f"{self._name}: damaged, or not compressed as its name says: {error}. Fetch it again, or rename it."
            ) from None


def _is_system(error: Exception) -> bool:
    """Whether the operating system or the network failed, and not the unpacking."""
    return isinstance(error, OSError) and error.errno is not None


def _open(file: _Counted, compression: str) -> Stream:
    raw: object = file
    if compression == "gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[call-overload]
    if compression == "bz2":
        return _Members(file, bz2.BZ2Decompressor)
    if compression == "xz":
        return _Members(file, lzma.LZMADecompressor)
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
