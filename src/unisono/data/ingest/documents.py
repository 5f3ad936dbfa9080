"""JSON documents: one array of objects, or an object with one such array, in any number of lines.

Owns how a document is told from JSON in lines, and how its objects are read one after the other in bounded memory.
`delimited.py` owns JSONL and what becomes of the objects.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from unisono.errors import DataError

SCAN = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
SPACE = re.compile(r"[ \t\r\n]*")
ARRAY = re.compile(r"\s*\[\s*\{")
ENVELOPE = re.compile(r'\{\s*"([^"\\]*)"\s*:\s*\[\s*\{')
REMEDY = "Give an array of objects, an object with one such array, or an object per line (JSONL)"


def is_document(text: str, whole: bool, wanted: Sequence[str]) -> bool:
    """Whether a file that begins with `text` is a JSON document, and not an object per line.

    `whole`: that is all of it. `wanted`: names of columns that a record may have.
    """
    text = text.lstrip()
    if not text.startswith("{"):
        return ARRAY.match(text) is not None
    line, newline, rest = text.partition("\n")
    line, rest = line.rstrip(), rest.lstrip()
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        envelope = ENVELOPE.match(text)
        if not newline:  # a first line of more than HEAD_BYTES
            return not whole and envelope is not None and envelope[1] not in wanted
        goes_on = {"{": '"', ",": '"', "[": "[{"}.get(line[-1:], "")
        return bool(rest) and rest[0] in goes_on
    known = any(name.partition(".")[0] in row for name in wanted)
    return whole and not rest and not known and sum(map(_is_table, row.values())) == 1


def _is_table(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def cut_document(blocks: Iterator[bytes], told: str, limit: int) -> Iterator[tuple[Any, str]]:
    """The elements of a document's array, each with its text, in order. An element may be no object.

    Raises:
        DataError: it is damaged, an element is larger than `limit` bytes and cannot be skipped, or there is not one
            array of objects.
    """
    text = _Document(blocks, told, limit)
    if text.peek() == "[":
        yield from text.elements()
    else:
        text.take("{")
        found = ""
        while text.peek() != "}":
            key, _ = text.value()
            text.take(":")
            if text.peek() == "[" and text.begins_table():
                if found:
                    raise DataError(f"{told}: two arrays of objects, under {found!r} and {key!r}. {REMEDY}.")
                found = str(key)
                yield from text.elements()
            else:
                text.value()
            if text.peek() != "}":
                text.take(",")
        text.take("}")
        if not found:
            raise DataError(f"{told}: a JSON document without an array of objects. {REMEDY}.")
    if text.peek():
        raise DataError(f"{told}: more follows the JSON document, in line {text.line}. {REMEDY}.")


class _Document:
    """The text of a document, read as far as it is needed."""

    def __init__(self, blocks: Iterator[bytes], told: str, limit: int) -> None:
        self._blocks = blocks
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._told = told
        self._limit = limit
        self._text = ""
        self._place = 0
        self._line = 1

    @property
    def line(self) -> int:
        """The number of the line, from 1, at which reading is."""
        return self._line + self._text.count("\n", 0, self._place)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self._place = SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        if (found := self.peek()) != character:
            missing = f"no {character!r}" if found else "it is cut off"
            raise DataError(f"{self._told}: damaged JSON: {missing} in line {self.line}. {REMEDY}.")
        self._place += 1

    def begins_table(self) -> bool:
        """Whether an object stands behind the bracket that is next."""
        while True:
            place = SPACE.match(self._text, self._place + 1).end()  # type: ignore[union-attr]
            if place < len(self._text) or not self._more():
                return self._text[place : place + 1] == "{"

    def value(self) -> tuple[Any, str]:
        """The next value, whatever it is, and its text."""
        self.peek()
        while True:
            try:
                value, end = SCAN(self._text, self._place)
            except RecursionError:
                raise DataError(f"{self._told}: line {self.line} is nested too deep. Flatten it.") from None
            except (ValueError, StopIteration):
                end = -1
            # a number may go on after the end of what was read
            if end == len(self._text) and not isinstance(value, str | dict | list) and self._more():
                continue
            if end >= 0:
                text, self._place = self._text[self._place : end], end
                return value, text
            if len(self._text) - self._place > self._limit:
                raise DataError(
                    f"{self._told}: the value from line {self.line} is damaged, or larger than data.max_record_bytes "
                    f"= {self._limit}. Mend it, or raise the limit."
                )
            if not self._more():
                raise DataError(f"{self._told}: damaged JSON: the value from line {self.line} is not whole. {REMEDY}.")

    def elements(self) -> Iterator[tuple[Any, str]]:
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def _more(self) -> bool:
        """Read on, as much as is held; False at the end."""
        self._line = self.line
        self._text, self._place = self._text[self._place :], 0
        parts, size = [self._text], 0
        for block in self._blocks:
            parts.append(self._decoder.decode(block))
            size += len(block)
            if size >= len(self._text):
                break
        self._text = "".join(parts)
        return size > 0
