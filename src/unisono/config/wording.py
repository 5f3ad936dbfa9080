"""What may stand in a message, a log or a kept recipe: locations without credentials, texts without control characters,
numbers with their noun.

Owns what counts as a credential in a URL, and which characters a terminal would obey or hide.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import islice
from typing import Any

MASK = "***"
"""Stands in a kept recipe where a URL had credentials."""

_WITHIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*://[^\s'\"<>]+")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_USER = re.compile(r"[^/?#]*@|[^/:@?#]*:(?![0-9]{1,5}(?:[/?#]|$))[^@]*@")
"""Also of a secret with a slash in it, as S3's have; but a port is no password."""
_WEB_QUERY = re.compile(r"\?.*", re.DOTALL)
_QUERY = re.compile(r"\?[\w.~%$-]+=.*", re.DOTALL)  # elsewhere a question mark is a wildcard too
_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*://)")
_OBEYED = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e0fff]"
)


def hide_secrets(location: str, mark: str = "") -> str:
    """A URL without user, password and query (in which signed URLs carry their signature); anything else as it is.

    Args:
        mark: stands in their places.
    """
    return "::".join(_hide(part, mark) for part in _CHAIN.split(location)) if "://" in location else location


def _hide(part: str, mark: str) -> str:
    found = _SCHEME.fullmatch(part)
    if found is None or found[1] == "hf":  # there an @ begins a revision
        return part
    scheme, rest = found.groups()
    if user := _USER.match(rest):
        rest = (f"{mark}@" if mark else "") + rest[user.end() :]
    query = _WEB_QUERY if scheme.startswith("http") else _QUERY
    return f"{scheme}://{query.sub(f'?{mark}' if mark else '', rest)}"


def hide_all_secrets(text: str) -> str:
    """A text with every URL in it as `hide_secrets` shows it: libraries put whole URLs into their errors."""
    return _WITHIN.sub(lambda found: hide_secrets(found[0]), text) if "://" in text else text


def mask_secrets(value: Any) -> Any:
    """Plain values (dicts, lists, texts, numbers) with MASK in the place of credentials in URLs."""
    if isinstance(value, dict):
        return {key: mask_secrets(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mask_secrets(part) for part in value)
    return hide_secrets(value, MASK) if isinstance(value, str) else value


def readable(text: str) -> str:
    """A text for a terminal: characters that it would obey or hide are spelled out, except line ends and tabs."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def count(number: int, one: str, several: str = "") -> str:
    """A number with its noun: 1 row, 2 rows."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def name_some(names: Collection[str], most: int = 10) -> str:
    """The first names, quoted, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(repr, islice(names, most))) + more
