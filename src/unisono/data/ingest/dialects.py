"""Dialects: how a text file is written, decided once for all of it, from its beginning.

Owns what "auto" means for `data.encoding`, `data.delimiter` and `data.quote`, the `sep=` line of Excel, and the
messages about what is not certain. What is decided depends on `[data]` and on the file's first HEAD_BYTES alone, so
every part of a file is read in the same way, by any number of processes.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from unisono.config.sections import Data
from unisono.data.ingest.documents import is_document
from unisono.data.ingest.lines import BLOCK_BYTES, Stream
from unisono.errors import DataError

HEAD_BYTES = BLOCK_BYTES
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
DELIMITERS = ",;\t|"
SEPARATOR_LINE = re.compile(r'"?sep=([^\r\n])"?\r?')
BROKEN = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a text file is written."""

    encoding: str = "utf-8"
    utf8_seen: bool = True
    """Whether it is certain that a byte that is not UTF-8 is damage. Else it is a sign of another encoding."""
    delimiter: str = ","
    quote: str = ""
    """What encloses a field; empty: nothing."""
    quote_seen: bool = True
    """Whether it is certain that quotes are text, where `quote` is empty."""
    escape: str = ""
    comment: str = ""
    separator_line: bool = False
    """Whether the first line is Excel's `sep=;`."""
    document: bool = False
    """Whether it is one JSON document, and not JSON in lines."""
    note: str = ""
    """What a user should know about what was decided."""

    @property
    def streamed(self) -> bool:
        """Whether it can only be read from its beginning: a line's bytes do not show where a record begins."""
        return bool(self.document or self.quote or self.escape or self.encoding != "utf-8")


def take_head(stream: Stream) -> tuple[bytes, bool, Iterator[bytes]]:
    """Return the first HEAD_BYTES of a stream, whether they are all of it, and all of its blocks."""
    blocks: list[bytes] = []
    size, ended = 0, False
    while size <= HEAD_BYTES and not ended:
        block = stream.read(BLOCK_BYTES)
        blocks.append(block)
        size, ended = size + len(block), not block

    def read() -> Iterator[bytes]:
        while blocks:
            yield blocks.pop(0)
        while block := stream.read(BLOCK_BYTES):
            yield block

    return b"".join(blocks)[:HEAD_BYTES], size <= HEAD_BYTES, read()


def find_dialect(head: bytes, whole: bool, kind: str, told: str, data: Data, wanted: Sequence[str] = ()) -> Dialect:
    """Decide how a file is written, from its first bytes.

    Args:
        head: the first HEAD_BYTES of the file (unpacked).
        whole: whether that is all of it.
        told: the file's name in messages.
        wanted: the columns that are needed; none: those with the text and the class.

    Raises:
        DataError: what the recipe leaves to be found is not certain, or what it says contradicts the file.
    """
    encoding, utf8_seen = _find_encoding(head, whole, told, data)
    errors = "surrogateescape" if encoding == "utf-8" else "replace"  # reading refuses what cannot be decoded
    text = codecs.getincrementaldecoder(encoding)(errors).decode(head, whole).removeprefix("\ufeff")
    if kind == "jsonl":
        document = is_document(text, whole, wanted or (*data.texts, data.label))
        return Dialect(encoding=encoding, utf8_seen=utf8_seen, document=document)
    lines = text.split("\n")
    if not whole and len(lines) > 1:
        lines.pop()  # it may go on
    separator = SEPARATOR_LINE.fullmatch(lines[0])
    lines = lines[1:] if separator else lines
    lines = [line for line in lines if not (data.comment and line.startswith(data.comment))]
    delimiter = data.delimiter
    if delimiter == "auto":
        delimiter = separator[1] if separator else _find_delimiter(lines, kind, data, wanted)
    quote, quote_seen, note = '"', True, ""
    if data.quote != "auto":
        quote = "" if data.quote == "none" else data.quote
    elif kind == "tsv":
        quote = ""
        if not data.escape:
            quote, quote_seen, note = _find_quote(lines, delimiter, whole, told, data)
    if quote == delimiter:
        raise DataError(f"{told}: data.quote and data.delimiter are both {quote!r}. Give two different characters.")
    return Dialect(
        encoding=encoding,
        utf8_seen=utf8_seen,
        delimiter=delimiter,
        quote=quote,
        quote_seen=quote_seen,
        escape=data.escape,
        comment=data.comment,
        separator_line=separator is not None,
        note=note,
    )


# --- encoding


def _find_encoding(head: bytes, whole: bool, told: str, data: Data) -> tuple[str, bool]:
    """Return the encoding, and whether UTF-8 is certain."""
    given = data.encoding
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
    if given == "auto":
        if marked:
            return marked, True
        _refuse_zeros(head, told)
        return "utf-8", _is_utf8(head, whole, told)
    name = codecs.lookup(given).name.removesuffix("-sig")
    if marked and not marked.startswith(name):
        raise DataError(
            f"{told} begins with the byte-order mark of {marked.upper()}, but data.encoding = {given!r}. Set "
            "data.encoding = 'auto'."
        )
    if name != "utf-8" and len(b"\xc3\xa9".decode(name, "replace")) == 2 and not head.isascii():
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head, whole)
        except UnicodeDecodeError:
            return name, True
        raise DataError(f"{told} is UTF-8, but data.encoding = {given!r}. Set data.encoding = 'auto', or convert it.")
    return marked or name, True


def _refuse_zeros(head: bytes, told: str) -> None:
    """Raise DataError if every other byte of the first line is zero: UTF-16 without a mark."""
    line = head[:200].partition(b"\n\0" if head[1:2] == b"\0" else b"\0\n")[0]
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(line) > 3 and not any(line[first::2]) and all(line[1 - first :: 2]):
            raise DataError(f"{told} looks like UTF-16 without a byte-order mark. Set data.encoding = {name!r}.")


def _is_utf8(head: bytes, whole: bool, told: str) -> bool:
    """Whether the text is certain to be UTF-8; with nothing but ASCII it is so only at the file's end.

    Raises:
        DataError: it is another encoding: most of what is not ASCII is not UTF-8.
    """
    if head.isascii():
        return whole
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, whole)
    except UnicodeDecodeError as error:
        text = head.decode("utf-8", "surrogateescape")
        broken = len(BROKEN.findall(text))
        if sum(not character.isascii() for character in text) <= 2 * broken:
            raise DataError(tell_broken(told, head[error.start], head.count(b"\n", 0, error.start) + 1)) from None
    return True


def tell_broken(told: str, byte: int, line: int) -> str:
    """The message about a file that is not UTF-8; `line` counts from 1."""
    return (
        f"{told}: byte 0x{byte:02X} in line {line} is no UTF-8. If the file is from Windows, set data.encoding = "
        "'cp1252', else to its encoding; or convert it (iconv -f CP1252 -t UTF-8). If it is UTF-8 and damaged, set "
        "data.encoding = 'utf-8': such records are then quarantined."
    )


def check_utf8(blocks: Iterator[bytes], told: str, count_lines: Callable[[int], int]) -> Iterator[bytes]:
    """Pass blocks on. `count_lines`: returns how many lines end before a byte of them, by reading them again.

    Raises:
        DataError: a byte is not UTF-8, and so a sign of another encoding.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, kept = 0, b""
    for block in blocks:
        if kept or not block.isascii():
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                line = count_lines(offset - len(kept) + error.start) + 1
                raise DataError(tell_broken(told, (kept + block)[error.start], line)) from None
            kept = decoder.getstate()[0]
        offset += len(block)
        yield block
    if kept:
        raise DataError(tell_broken(told, kept[0], count_lines(offset) + 1))


def transcode(blocks: Iterator[bytes], encoding: str, told: str) -> Iterator[bytes]:
    """Blocks of text in `encoding` as blocks of UTF-8.

    Raises:
        DataError: bytes mean nothing in this encoding.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    ended = False
    while not ended:
        block = next(blocks, b"")
        ended = not block
        kept = decoder.getstate()[0]
        try:
            text = decoder.decode(block, ended)
        except UnicodeDecodeError as error:
            line += (kept + block)[: error.start].decode(encoding, "replace").count("\n")
            raise DataError(
                f"{told}: byte 0x{error.object[error.start]:02X} in line {line} means nothing in {encoding}. Set "
                "data.encoding to the file's encoding, or mend the file."
            ) from None
        line += text.count("\n")
        yield text.encode("utf-8", "surrogatepass")


# --- delimiter


def _split_header(line: str, delimiter: str, quote: str) -> list[str]:
    """The names of columns in a header line; none where this delimiter cannot cut it."""
    reader = csv.reader(
        [line.rstrip("\r")],
        delimiter=delimiter,
        quotechar=quote or None,
        quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
    )
    try:
        return [name.strip() for name in next(reader, [])]
    except csv.Error:
        return []


def _find_delimiter(lines: Sequence[str], kind: str, data: Data, wanted: Sequence[str]) -> str:
    """The usual one of the format, or the only other one by which the header has the columns that are wanted."""
    usual = "\t" if kind == "tsv" else ","
    quote = {"auto": '"', "none": ""}.get(data.quote, data.quote)
    some = [line for line in lines if line.rstrip("\r")]
    if not some:
        return usual
    if data.columns:  # no line names them: all must have as many fields
        counts = {one: {len(_split_header(line, one, quote)) for line in some[:100]} for one in DELIMITERS}
        found = [one for one in DELIMITERS if counts[one] == {len(data.columns)}]
        return found[0] if len(found) == 1 else usual
    names = {one: _split_header(some[0], one, quote) for one in DELIMITERS}
    for some_of_them in (wanted,) if wanted else ((*data.texts, data.label), data.texts):
        found = [one for one in DELIMITERS if set(some_of_them) <= set(names[one])]
        if found:
            return found[0] if len(found) == 1 else usual
    found = [one for one in DELIMITERS if len(names[one]) > 1]  # no column is as wanted: messages should name them
    return found[0] if len(found) == 1 else usual


# --- quotes in TSV


def _find_quote(lines: Sequence[str], delimiter: str, whole: bool, told: str, data: Data) -> tuple[str, bool, str]:
    """Whether the fields of a TSV file are enclosed in quotes, as pandas and Excel write them, or quotes are text.

    They enclose fields if only so the rows have the right number of fields, and all rows have it. They are text if a
    quote stands where none can, or if each line is a row anyway.

    Returns:
        The quote, or "". Whether that is certain. A note.

    Raises:
        DataError: some rows are right only with the one, others only with the other; or all are right with both, but
        not the same rows.
    """
    if not any(line.startswith('"') or f'{delimiter}"' in line for line in lines):
        return "", whole, ""
    width, place, helped, joined, spoilt, broken = len(data.columns), 0, 0, 0, False, False
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            taken, place = lines[place : reader.line_num], reader.line_num
            width = width or len(row)
            if row and len(row) != width:
                spoilt = True
            elif row and any(len(line.split(delimiter)) != width for line in taken):
                helped = helped or place - len(taken) + 1
            elif len(taken) > 1:
                joined = joined or place - len(taken) + 1
    except csv.Error as error:
        broken = whole or "unexpected end of data" not in str(error)
    if helped and not (spoilt or broken):
        return '"', True, ""
    remedy = "Set data.quote = '\"' if quotes enclose fields, or data.quote = 'none' if they are text."
    if helped:
        told = f"{told}: the row from line {helped} is whole only if quotes enclose fields, but other rows are not"
        raise DataError(f"{told}. {remedy}")
    if joined and not (spoilt or broken):
        raise DataError(f"{told}: from line {joined} on several lines are one row if quotes enclose fields. {remedy}")
    note = "" if broken else f"{told}: quotes are read as text; if they enclose fields, set data.quote = '\"'"
    return "", whole or broken, note
