"""Labels: the one spelling of a class, whatever held it, and the order of classes.

Owns how a number, a boolean or a date becomes the name of a class, which texts are such a value written down, and how
names are sorted. `read.py` reads the values.

    integers and whole floats    1, 1.0, "1", "1.0", "1.00" → 1        other numbers   0.5, Decimal("0.50") → 0.5
    dates                        midnight of a day, in any form → 2024-05-01
    booleans                     true, True, TRUE → True; where other classes stand beside them, only if the same one is
                                 spelled in two ways. A class named `true` among other words keeps its name.

Other texts stay as they are: 01, 1e5 and 1.10 may be codes or versions.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterable
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc

from unisono.data.ingest.column_batch import Column, list_values

_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,3})?")
_MOMENT = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[T ]([0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:\.([0-9]+))?(Z|[+-][0-9]{2}:[0-9]{2})?"
)
_BOOLEANS = ("false", "true")


def list_labels(column: Column) -> list[object]:
    """Python values of a column of classes. Single-precision numbers come as their shortest text, so that 0.1 is 0.1
    as it is in a file."""
    if isinstance(column, pa.ChunkedArray) and pa.types.is_float32(column.type):
        known = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float32()), column)
        return list_values(known.cast(pa.string()))
    return list_values(column)


def spell_value(value: object) -> object:
    """A number or a date as text; any other value unchanged."""
    if isinstance(value, Decimal) and value.is_finite():
        return format(value.normalize(), "f")
    if isinstance(value, (datetime.date, datetime.datetime)):
        return str(value)
    return value


def spell_label(text: str) -> str:
    """The one spelling of a class's name, without the rule on booleans, which needs all classes."""
    text = text.strip()
    if not text.lstrip("-")[:1].isdigit():
        return text
    if found := _WHOLE.fullmatch(text):
        return "0" if found[1] == "-0" else found[1]
    if text == "-0":
        return "0"
    if found := _MOMENT.fullmatch(text):
        day, time, fraction, zone = found.groups("")
        time = f"{time}:00" if len(time) == 5 else time
        fraction = fraction.rstrip("0")
        if time == "00:00:00" and not fraction and not zone:
            return day
        return f"{day} {time}" + (f".{fraction:0<6}" if fraction else "") + zone.replace("Z", "+00:00")
    return text


def spell_booleans(names: Collection[str]) -> dict[str, str]:
    """The names of all classes → those that get another spelling, by name."""
    found = [name for name in names if name.casefold() in _BOOLEANS]
    twice = len({name.casefold() for name in found}) < len(found)
    return {name: name.capitalize() for name in found} if twice or len(found) == len(names) else {}


def number_classes(names: Iterable[str]) -> dict[str, int]:
    """The number of each class, by every spelling under which `find_class` looks for it."""
    known = list(names)
    return {_fold(name): number for number, name in enumerate(known)} | {name: n for n, name in enumerate(known)}


def find_class(numbers: dict[str, int], label: str) -> int | None:
    """The number of a label's class, from `number_classes`; None if it is none of them."""
    return numbers.get(label, numbers.get(_fold(label)))


def is_fraction(name: str) -> bool:
    """Whether a class's name is a number that is not whole."""
    return is_number(name) and ("." in name or "e" in name)


def is_number(name: str) -> bool:
    """Whether a class's name is a number."""
    return _NUMBER.fullmatch(name) is not None


def sort_labels(names: Iterable[str]) -> list[str]:
    """Names of classes in order: by value where all are numbers, else as texts."""
    found = list(names)
    if all(map(is_number, found)):
        return sorted(found, key=lambda name: (Decimal(name), name))
    return sorted(found)


def _fold(name: str) -> str:
    name = spell_label(name)
    return name.casefold() if name.casefold() in _BOOLEANS else name
