"""Rules that need one record alone: they judge it, repair it and mask in it.

Owns the order of these rules, their reasons, and what counts as an invisible character or a personal detail. The regex
package has the scripts of letters, phonenumbers the phone numbers that exist. Does not compare records (`screen.py`,
`near_duplicates.py`), and keeps no state: the same record, settings and versions always give the same answer, in any
process.

A regular expression runs only after the cheapest test that excludes most texts. It takes time in proportion to the
text: each repetition is bounded, or anchored to its beginning.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from unisono.config.sections import Screen
from unisono.data.ingest.labels import find_class, number_classes
from unisono.data.ingest.read import Record
from unisono.errors import DataError, RecipeError

EMPTY = "empty text"
UNLABELLED = "no label"
UNKNOWN = "unknown label"
MOJIBAKE = "mojibake"
INVISIBLE = "invisible characters"
MAIL = "mail address"
CARD = "card number"
PHONE = "phone number"
SHORT = "too short"
LONG = "too long"
SCRIPT = "wrong script"
LINES = "repeated lines"
REASONS = (EMPTY, UNLABELLED, UNKNOWN, MOJIBAKE, INVISIBLE, MAIL, CARD, PHONE, SHORT, LONG, SCRIPT, LINES)
"""In the order in which they are checked; a fault of reading comes before all of them."""
PERSONAL = frozenset({MAIL, CARD, PHONE})

UNSEEN = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # control characters except tab, line ends, form feed
    "\xad\u061c\u180e\u200b\u202a-\u202e\u2060-\u206f\ufeff"  # soft hyphen, no width, direction overrides
    "\u115f\u1160\u3164\uffa0\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff"  # fillers, annotations, no characters
    "\U000e0000-\U000e0fff]"  # tags, in which whole sentences can be hidden
)
"""Without joiners (U+200C, U+200D), direction marks (U+200E, U+200F) and variation selectors, which Persian, Hindi,
Hebrew and emoji are written with."""

_MAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]++@(?:[\w-]++\.)+[^\W\d_]{2,}(?:[\w.+%-]*+(?=@))?")
"""The text between an address and another @ is masked with it, or it would afterwards be an address itself."""
_CARD_RUN = re.compile("[0-9](?:[ \xa0\u2010-\u2013-]?[0-9]){12,}")
_DIGITS = re.compile("[0-9]+")
_CARD_BEGINS = "23456"  # Mastercard, JCB, Diners, American Express, Visa, Maestro, Discover, UnionPay
_CARD_DIGITS = range(13, 20)  # ISO/IEC 7812-1
_SOME_DIGITS = re.compile(r"\d\D{0,4}\d\D{0,4}\d")
_PLUSES = "+\uff0b"  # one begins an international number
_NUMBER = re.compile(r"[+\uff0b(]{0,2}\d(?:[^\w\n]{0,3}\d){4,}")


class Examiner:
    """A pure function from a record to the repaired record and the reason against it. Can be pickled.

    Args:
        screen: the rules.
        labels: the known classes; with none given, every class is known.

    Raises:
        DataError: a rule needs a package that is not installed.
    """

    def __init__(self, screen: Screen, labels: Sequence[str]) -> None:
        self._known = number_classes(labels)
        self._treatments = _choose_treatments(screen)
        self._rules = _choose_rules(screen)

    def examine(self, record: Record) -> tuple[Record, str]:
        """Return the record, perhaps repaired and masked, and the first reason against it; "" if it is kept.

        Whatever the reason, the text is treated first: masked details are masked in the quarantine as well.
        """
        text, reason = record.text, ""
        if self._treatments:
            text, reason = self.treat(text)
            if text != record.text:
                record = replace(record, text=text)
        if record.fault:
            return record, record.fault
        if not text or text.isspace():
            return record, EMPTY
        if record.label is None:
            return record, UNLABELLED
        if self._known and find_class(self._known, record.label) is None:
            return record, UNKNOWN
        if reason:
            return record, reason
        for reason, breaks in self._rules:
            if breaks(text):
                return record, reason
        return record, ""

    def treat(self, text: str) -> tuple[str, str]:
        """Return a text repaired and masked as the settings say, and the first reason to refuse it. New texts are
        treated alike: a model should read the same kind of text that it learned from."""
        reason = ""
        for found, treatment in self._treatments:
            other = treatment(text)
            if other is None:
                reason = reason or found
            else:
                text = other
        return text, reason


def find_versions(screen: Screen) -> dict[str, str]:
    """Return the versions, besides this package's, on which the result of these settings depends."""
    versions = {}
    if screen.mojibake != "keep":
        versions["ftfy"] = str(_import_ftfy().__version__)
    if screen.phone != "keep":
        versions["phonenumbers"] = str(_import_phonenumbers().__version__)
    if screen.scripts:
        import regex  # it has Unicode tables of its own

        versions["regex"] = regex.__version__
    if screen.mail != "keep" or "refuse" in (screen.near_duplicates, screen.contradicted):
        versions["unicode"] = unicodedata.unidata_version
    return versions


def describe_treatments(screen: Screen) -> str:
    """Return a sentence on what these settings change in texts; empty if nothing."""
    done = [
        told
        for told, wanted in (
            ("mojibake is mended", screen.mojibake == "mend"),
            ("invisible characters are taken out", screen.invisible == "strip"),
            ("mail addresses are masked", screen.mail == "mask"),
            ("card numbers are masked", screen.card == "mask"),
            ("phone numbers are masked", screen.phone == "mask"),
        )
        if wanted
    ]
    return f"In the texts {', '.join(done)}." if done else ""


def mask_mail(text: str) -> str:
    """Put [mail] in the place of mail addresses."""
    return _MAIL.sub("[mail]", text) if "@" in text else text


def mask_cards(text: str) -> str:
    """Put [card] in the place of numbers of payment cards: groups of digits, 13 to 19 in all, with a correct check
    digit."""
    return _CARD_RUN.sub(_mask_run, text)


def mask_phones(text: str, region: str = "") -> str:
    """Put [phone] in the place of phone numbers that exist: international ones that begin with +, and those that are
    written as in `region`, a code of ISO 3166 such as US; empty: none."""
    if not (_SOME_DIGITS.search(text) if region else any(plus in text for plus in _PLUSES)):
        return text
    numbers = _import_phonenumbers()
    while True:  # without the one before it, something else may be a number
        found = numbers.PhoneNumberMatcher(
            text, region or None, leniency=numbers.Leniency.VALID, max_tries=len(text) + 1
        )
        masked, end = [], 0
        for one in found:
            masked += [text[end : one.start], "[phone]"]
            end = one.end
        if not masked:
            return text
        text = "".join(masked) + text[end:]


def mask_all(text: str) -> str:
    """Mask personal details of every kind, for readers who should see none: every number of five digits is masked."""
    return _NUMBER.sub("[number]", mask_cards(mask_mail(text)))


def is_card(digits: str) -> bool:
    """Whether this is the number of a payment card: its length, its first digit, and Luhn's sum (ISO/IEC 7812-1)."""
    if len(digits) not in _CARD_DIGITS or digits[0] not in _CARD_BEGINS:
        return False
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


def _mask_run(match: re.Match[str]) -> str:
    """Mask the cards in a run of groups of digits; of those that begin at the same group, the longest."""
    run, masked, end = match[0], [], 0
    groups = [group.span() for group in _DIGITS.finditer(run)]
    for first, (start, _) in enumerate(groups):
        if start < end or run[start] not in _CARD_BEGINS:
            continue
        digits, stop = "", 0
        for begin, close in groups[first : first + _CARD_DIGITS.stop]:
            digits += run[begin:close]
            if len(digits) >= _CARD_DIGITS.stop:
                break
            if is_card(digits):
                stop = close
        if stop:
            masked += [run[end:start], "[card]"]
            end = stop
    return "".join(masked) + run[end:]


def _choose_treatments(screen: Screen) -> tuple[tuple[str, Callable[[str], str | None]], ...]:
    """Return the functions that repair, strip and mask, each with its reason to refuse: a None result is a refusal."""
    treatments: list[tuple[str, Callable[[str], str | None]]] = []
    if screen.mojibake != "keep":
        _import_ftfy()
        treatments.append((MOJIBAKE, _mend if screen.mojibake == "mend" else partial(_refuse_change, _mend)))
    if screen.invisible == "strip":
        treatments.append((INVISIBLE, _strip))
    elif screen.invisible == "refuse":
        treatments.append((INVISIBLE, partial(_refuse_invisible, share=screen.invisible_share)))
    if screen.phone != "keep":
        _check_region(screen.phone_region)
    for reason, mask, wanted in (
        (MAIL, mask_mail, screen.mail),
        (CARD, mask_cards, screen.card),
        (PHONE, partial(mask_phones, region=screen.phone_region), screen.phone),
    ):
        if wanted != "keep":
            treatments.append((reason, mask if wanted == "mask" else partial(_refuse_change, mask)))
    return tuple(treatments)


def _choose_rules(screen: Screen) -> tuple[tuple[str, Callable[[str], bool]], ...]:
    """Return the rules on treated texts with their reasons; each returns whether a text breaks it."""
    rules: list[tuple[str, Callable[[str], bool]]] = []
    if screen.min_characters:
        rules.append((SHORT, partial(_is_shorter, limit=screen.min_characters)))
    if screen.max_characters:
        rules.append((LONG, partial(_is_longer, limit=screen.max_characters)))
    if screen.scripts:
        rules.append((SCRIPT, _choose_letters(screen.scripts, screen.script_share)))
    if screen.repeated_lines_share < 1:
        rules.append((LINES, partial(_repeats_itself, most=screen.repeated_lines_share)))
    return tuple(rules)


def _choose_letters(scripts: Sequence[str], least: float) -> Callable[[str], bool]:
    import regex

    wanted = regex.compile("[" + "".join(rf"\p{{Script={script}}}" for script in scripts) + "]+")
    letters = regex.compile(r"[\p{L}--[\p{Script=Common}\p{Script=Inherited}]]+", regex.VERSION1)
    ascii_share = 1.0 if wanted.match("a") else 0.0
    return partial(_is_foreign, wanted=wanted, letters=letters, ascii_share=ascii_share, least=least)


def _check_region(region: str) -> None:
    """Raise RecipeError for a region that has no phone numbers."""
    allowed = _import_phonenumbers().SUPPORTED_REGIONS
    if region and region not in allowed:
        raise RecipeError(
            f"screen.phone_region = {region!r}: no such region. Allowed are {', '.join(sorted(allowed))}; or leave it "
            "empty for international numbers alone."
        )


def _refuse_change(change: Callable[[str], str], text: str) -> str | None:
    return text if change(text) == text else None


def _refuse_invisible(text: str, share: float) -> str | None:
    if not UNSEEN.search(text):
        return text
    return text if len(text) - len(_strip(text)) <= share * len(text) else None


def _strip(text: str) -> str:
    return UNSEEN.sub("", text)


def _mend(text: str) -> str:
    return text if text.isascii() else str(_import_ftfy().fix_encoding(text))


def _is_shorter(text: str, limit: int) -> bool:
    return len(text) < limit or len(text.strip()) < limit


def _is_longer(text: str, limit: int) -> bool:
    return len(text) > limit and len(text.strip()) > limit


def _is_foreign(text: str, wanted: Any, letters: Any, ascii_share: float, least: float) -> bool:
    """Too few of the text's letters are of the wanted scripts. Letters that several scripts share do not count, and a
    text without letters has none that are wrong."""
    if ascii_share >= least and text.isascii():
        return False
    found = "".join(letters.findall(text))
    if not found:
        return False
    share = ascii_share if found.isascii() else 1 - len(wanted.sub("", found)) / len(found)
    return share < least


def _repeats_itself(text: str, most: float) -> bool:
    """Too many of the lines that are not blank stood earlier in the text (Rae et al., 2021, section A.1.1)."""
    if "\n" not in text and "\r" not in text:
        return False
    lines = [line for whole in text.splitlines() if (line := whole.strip())]
    return len(lines) - len(set(lines)) > most * len(lines)


def _import_ftfy() -> ModuleType:
    return _import_extra("ftfy", extra="mend", key="screen.mojibake")


def _import_phonenumbers() -> ModuleType:
    return _import_extra("phonenumbers", extra="phone", key="screen.phone")


def _import_extra(package: str, *, extra: str, key: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError:
        raise DataError(
            f"{key} needs the package {package}, which is not installed. Install it with pip install "
            f"'unisono[{extra}]', or set {key} = \"keep\"."
        ) from None
