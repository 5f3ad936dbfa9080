"""Lines of a stream of bytes, whatever it holds, in bounded memory.

Owns how a file is cut into lines, which of them belong to a range of bytes, byte-order marks, and lines that
are too long to be held. Does not own what a line means (`delimited.py`) or where bytes come from
(`locations.py`).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK_BYTES = 2**20
HEAD_BYTES = 1_000
"""What is kept of a line that is too long."""
MARK = codecs.BOM_UTF8


class Stream(Protocol):
    """The part of a binary file that reading in order needs."""

    def read(self, size: int, /) -> bytes: ...


class SeekableStream(Stream, Protocol):
    """The part that reading a range needs."""

    def seek(self, offset: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Long:
    """A line longer than the limit: its beginning, its size in bytes, and the number of quotes in the whole line."""

    head: bytes
    size: int
    quotes: int


def read_blocks(file: Stream) -> Iterator[bytes]:
    """The bytes of a stream from its current position, in blocks."""
    while block := file.read(BLOCK_BYTES):
        yield block


def strip_mark(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Blocks of a text file without the byte-order mark of UTF-8."""
    head, blocks = b"", iter(blocks)
    for block in blocks:
        head += block
        if len(head) >= len(MARK):
            break
    yield head.removeprefix(MARK)
    yield from blocks


def count_lines(blocks: Iterable[bytes], stop: int) -> int:
    """The newlines in the first `stop` bytes."""
    count = 0
    for block in blocks:
        if stop <= 0:
            break
        count += block.count(b"\n", 0, stop)
        stop -= len(block)
    return count


def own_blocks(file: SeekableStream, start: int, stop: int, *, first: bool) -> Iterator[bytes]:
    """The lines whose first byte lies in [start, stop), in blocks.

    `first`: a line begins at `start`. Without it, a line begins there only if the byte before ends a line.
    """
    skipping = not first
    file.seek(start - skipping)
    left = stop - start + skipping
    whole = True
    while left > 0 and (block := file.read(min(BLOCK_BYTES, left))):
        left -= len(block)
        if skipping:
            _, newline, block = block.partition(b"\n")
            if not newline:
                continue
            skipping = False
        if block:
            whole = block.endswith(b"\n")
            yield block
    while not skipping and not whole and (block := file.read(BLOCK_BYTES // 16)):
        end, newline, _ = block.partition(b"\n")
        whole = bool(newline)
        yield end + newline


def cut_lines(blocks: Iterable[bytes], limit: int, quote: bytes = b'"') -> Iterator[bytes | Long]:
    """Lines without their newline; one of more than `limit` bytes as Long. What follows the last newline is a line."""
    kept: list[bytes] = []
    size = quotes = 0
    for block in blocks:
        lines = block.split(b"\n")
        last = lines.pop()
        for line in lines:
            if kept or len(line) > limit:
                size += len(line)
                kept.append(line)
                yield _whole(kept, size, quotes, limit, quote)
                kept, size, quotes = [], 0, 0
            else:
                yield line
        if last:
            kept.append(last)
            size += len(last)
            if size > limit:  # from now on only its beginning is kept
                quotes += sum(part.count(quote) for part in kept)
                kept = [b"".join(kept)[:HEAD_BYTES]]
                quotes -= kept[0].count(quote)
    if kept:
        yield _whole(kept, size, quotes, limit, quote)


def _whole(kept: list[bytes], size: int, quotes: int, limit: int, quote: bytes) -> bytes | Long:
    line = b"".join(kept)
    return Long(line[:HEAD_BYTES], size, quotes + line.count(quote)) if size > limit else line


def decode(line: bytes) -> str:
    """Text of a line without its carriage return. A byte that is not UTF-8 becomes a lone surrogate."""
    return line.removesuffix(b"\r").decode("utf-8", "surrogateescape")


def decode_file(content: bytes) -> str:
    """Text of a whole file, without a byte-order mark."""
    return content.decode("utf-8-sig", "surrogateescape")


def escape(text: str) -> str:
    r"""Write what is not UTF-8 as `\xff` (a byte) or `\ud800` (half a character, as JSON can hold)."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def decode_head(head: bytes) -> str:
    """Text of a line's beginning, without the last character if it was cut."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    return decoder.decode(head[:HEAD_BYTES]) + "…"
