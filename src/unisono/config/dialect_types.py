"""Types of the keys that say how text files are written: columns, characters, encodings.

Owns what is allowed under each, and what a value becomes. `sections.py` owns the keys.
"""

from __future__ import annotations

import codecs
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

NAMED = {"tab": "\t", "\\t": "\t", "space": " ", "comma": ",", "semicolon": ";", "pipe": "|"}
"""Delimiters that are hard to write in a shell, or to see."""
NO_TEXT = {"idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "utf_7", "mbcs", "oem"}


def _find_columns(value: Any) -> Any:
    """A name, or a tuple of two or more names."""
    if isinstance(value, str):
        return value
    names = tuple(value) if isinstance(value, list | tuple) else ()
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError("allowed is a column's name, or a list of different names")
    return names[0] if len(names) == 1 else names


def _find_delimiter(value: str) -> str:
    character = NAMED.get(value, value)
    if value != "auto" and (len(character) != 1 or character in '\r\n"'):
        raise ValueError(f"allowed are 'auto', one character, or {', '.join(name for name in NAMED if name.isalpha())}")
    return character


def _find_quote(value: str) -> str:
    if value not in ("auto", "none") and (len(value) != 1 or value in "\r\n\t" or not value.isascii()):
        raise ValueError("allowed are 'auto', 'none' or one ASCII character")
    return value


def _find_escape(value: str) -> str:
    if value and (len(value) != 1 or value in "\r\n" or not value.isascii()):
        raise ValueError("allowed is one ASCII character; empty: none")
    return value


def _find_encoding(value: str) -> str:
    try:
        known = value == "auto" or "a,\n".encode(value).decode(value) == "a,\n"
        codecs.getincrementaldecoder("utf-8" if value == "auto" else value)
    except (LookupError, UnicodeError):
        known = False
    if not known or value.lower().replace("-", "_") in NO_TEXT:
        raise ValueError("allowed are 'auto' and Python's names of text encodings: utf-8, cp1252, utf-16, gb18030 …")
    return value


ColumnNames: TypeAlias = Annotated[str | tuple[str, ...], BeforeValidator(_find_columns)]
Delimiter: TypeAlias = Annotated[str, AfterValidator(_find_delimiter)]
Quote: TypeAlias = Annotated[str, AfterValidator(_find_quote)]
Escape: TypeAlias = Annotated[str, AfterValidator(_find_escape)]
Encoding: TypeAlias = Annotated[str, AfterValidator(_find_encoding)]
Comment: TypeAlias = Annotated[str, Field(pattern=r"^(\S[^\r\n]*)?$")]
