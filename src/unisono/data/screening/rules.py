"""What one record is judged by, and what is mended in it: rules that need no other record.

Owns the order of these rules, their reasons, and what counts as an invisible character, a script, or a personal
detail. Does not compare records (`data/screen.py`, `data/near.py`), and keeps no state: the same record, settings and
versions always give the same answer, in any process.

Regular expressions stand behind the cheapest test that excludes most texts, and take time in proportion to the text:
what may repeat is bounded, or anchored to where it begins.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType

from unisono.config.sections import Screen
from unisono.data.ingest.read import Record
from unisono.errors import DataError

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
"""In the order in which they are looked for; a fault of reading comes before them all."""
PERSONAL = frozenset({MAIL, CARD, PHONE})

UNSEEN = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f"  # control characters but tab, line ends, form feed
    "\xad\u061c\u180e\u200b\u202a-\u202e\u2060-\u206f\ufeff"  # soft hyphen, no width, direction overrides
    "\u115f\u1160\u3164\uffa0\ufff9-\ufffb\ufdd0-\ufdef\ufffe\uffff"  # fillers, annotations, no characters
    "\U000e0000-\U000e0fff]"  # tags, in which whole sentences can be hidden
)
"""Without joiners (U+200C, U+200D), direction marks (U+200E, U+200F) and variation selectors, which Persian, Hindi,
Hebrew and emoji are written with."""

_MAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]++@(?:[\w-]++\.)+[^\W\d_]{2,}(?:[\w.+%-]*+(?=@))?")
"""What comes between an address and another @ goes with it, or it would be an address of its own afterwards."""
_CARD_RUN = re.compile("[0-9](?:[ \xa0\u2010-\u2013-]?[0-9]){12,}")
_DIGITS = re.compile("[0-9]+")
_CARD_BEGINS = "23456"  # Mastercard, JCB, Diners, American Express, Visa, Maestro, Discover, UnionPay
_CARD_DIGITS = range(13, 20)  # ISO/IEC 7812-1
_PHONE = re.compile(
    r"[+(0-9](?:"  # a set to begin with is looked for ten times as fast as the alternatives
    r"(?:(?<=\+)|(?<=0)(?<![0-9]0)0(?=[ 1-9]))[ (]?[1-9](?:[ ()./-]{0,2}[0-9]){6,14}"  # at most 15 digits
    r"|(?<=1)(?<![0-9]1)[ .-](?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}"
    r"|(?:(?<=\()[2-9][0-9]{2}\) ?|(?<=[2-9])(?<![0-9][2-9])[0-9]{2}[ .-])[2-9][0-9]{2}[ .-][0-9]{4}"
    r"|(?<=\()0[0-9]{1,4}\) ?[0-9](?:[ /.-]?[0-9]){5,9}"
    r"|(?<=0)(?<![0-9]0)(?![0-9]?[./-][0-9]{1,2}[./-][0-9]{2,4})[0-9](?:[ /.-]?[0-9]){7,10}"  # 01.02.2003 is a date
    r")(?![0-9])"
)
"""International, North American (two ways), national with the area in brackets, national. A match ends at a digit; one
that begins right there begins with + or a bracket, to which nothing before it matters: so one pass finds them all."""

_LETTERS = re.compile(r"[^\W\d_]+")
SCRIPTS = {
    "Arabic": "\u0600-\u06ff\u0750-\u077f\u0870-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "Armenian": "\u0530-\u058f\ufb13-\ufb17",
    "Bengali": "\u0980-\u09ff",
    "Cyrillic": "\u0400-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "Devanagari": "\u0900-\u097f\ua8e0-\ua8ff",
    "Ethiopic": "\u1200-\u139f\u2d80-\u2ddf\uab00-\uab2f",
    "Georgian": "\u10a0-\u10ff\u1c90-\u1cbf\u2d00-\u2d2f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Gujarati": "\u0a80-\u0aff",
    "Gurmukhi": "\u0a00-\u0a7f",
    "Han": "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Hangul": "\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff\uffa0-\uffdc",
    "Hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "Hiragana": "\u3040-\u309f",
    "Kannada": "\u0c80-\u0cff",
    "Katakana": "\u30a0-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "Khmer": "\u1780-\u17ff",
    "Lao": "\u0e80-\u0eff",
    "Latin": "A-Za-z\xaa\xba\xc0-\u024f\u0250-\u02af\u1d00-\u1dbf\u1e00-\u1eff\u2c60-\u2c7f\ua720-\ua7ff"
    "\uab30-\uab6f\ufb00-\ufb06\uff21-\uff3a\uff41-\uff5a",
    "Malayalam": "\u0d00-\u0d7f",
    "Myanmar": "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f",
    "Sinhala": "\u0d80-\u0dff",
    "Tamil": "\u0b80-\u0bff",
    "Telugu": "\u0c00-\u0c7f",
    "Thai": "\u0e00-\u0e7f",
    "Tibetan": "\u0f00-\u0fff",
}
"""The blocks of Unicode where each script's letters stand."""


class Examiner:
    """A pure function from a record to what becomes of it. Can be pickled.

    Args:
        screen: the rules.
        labels: the classes that are known; with none given, every class is.

    Raises:
        DataError: a rule needs a package that is not installed.
    """

    def __init__(self, screen: Screen, labels: Sequence[str]) -> None:
        self._known = frozenset(labels)
        self._treatments = _choose_treatments(screen)
        self._rules = _choose_rules(screen)

    def examine(self, record: Record) -> tuple[Record, str]:
        """Return the record, perhaps mended and masked, and the first reason against it; "" if it is kept.

        Whatever the reason, the text has been treated: what is to be masked is masked in the quarantine as well.
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
        if self._known and record.label not in self._known:
            return record, UNKNOWN
        if reason:
            return record, reason
        for reason, breaks in self._rules:
            if breaks(text):
                return record, reason
        return record, ""

    def treat(self, text: str) -> tuple[str, str]:
        """Return a text mended and masked as the settings say, and the first reason to refuse it. For new texts, too:
        a model should read what it learned from."""
        reason = ""
        for found, treatment in self._treatments:
            other = treatment(text)
            if other is None:
                reason = reason or found
            else:
                text = other
        return text, reason


def find_versions(screen: Screen) -> dict[str, str]:
    """Return the versions, besides this package's, that decide what these settings do to a record."""
    versions = {}
    if screen.mojibake != "keep":
        versions["ftfy"] = str(_import_ftfy().__version__)
    if screen.scripts or screen.mail != "keep" or "refuse" in (screen.near_duplicates, screen.contradicted):
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
    """Put [card] in the place of numbers of payment cards: groups of digits, 13 to 19 in all, with a right check
    digit."""
    return _CARD_RUN.sub(_mask_run, text)


def mask_phones(text: str) -> str:
    """Put [phone] in the place of phone numbers: international ones (+ or 00), North American ones in their usual
    groups, and national ones that begin with 0 and have 9 to 12 digits."""
    return _PHONE.sub("[phone]", text)


def mask_all(text: str) -> str:
    """Mask personal details of every kind."""
    return mask_phones(mask_cards(mask_mail(text)))


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
    """Return what mends, strips and masks, each with its reason to refuse: None in the place of a text refuses it."""
    treatments: list[tuple[str, Callable[[str], str | None]]] = []
    if screen.mojibake != "keep":
        _import_ftfy()
        treatments.append((MOJIBAKE, _mend if screen.mojibake == "mend" else partial(_refuse_change, _mend)))
    if screen.invisible == "strip":
        treatments.append((INVISIBLE, _strip))
    elif screen.invisible == "refuse":
        treatments.append((INVISIBLE, partial(_refuse_invisible, share=screen.invisible_share)))
    for reason, mask, wanted in (
        (MAIL, mask_mail, screen.mail),
        (CARD, mask_cards, screen.card),
        (PHONE, mask_phones, screen.phone),
    ):
        if wanted != "keep":
            treatments.append((reason, mask if wanted == "mask" else partial(_refuse_change, mask)))
    return tuple(treatments)


def _choose_rules(screen: Screen) -> tuple[tuple[str, Callable[[str], bool]], ...]:
    """Return the rules on treated texts with their reasons; each tells whether a text breaks it."""
    rules: list[tuple[str, Callable[[str], bool]]] = []
    if screen.min_characters:
        rules.append((SHORT, partial(_is_shorter, limit=screen.min_characters)))
    if screen.max_characters:
        rules.append((LONG, partial(_is_longer, limit=screen.max_characters)))
    if screen.scripts:
        letters = re.compile("[" + "".join(SCRIPTS[script] for script in screen.scripts) + "]+")
        ascii_share = 1.0 if "Latin" in screen.scripts else 0.0
        rules.append(
            (SCRIPT, partial(_is_foreign, letters=letters, ascii_share=ascii_share, least=screen.script_share))
        )
    if screen.repeated_lines_share < 1:
        rules.append((LINES, partial(_repeats_itself, most=screen.repeated_lines_share)))
    return tuple(rules)


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


def _is_foreign(text: str, letters: re.Pattern[str], ascii_share: float, least: float) -> bool:
    """Too few of the text's letters match `letters`. A text without letters has none that are wrong."""
    if ascii_share >= least and text.isascii():
        return False
    found = "".join(_LETTERS.findall(text))
    if not found:
        return False
    share = ascii_share if found.isascii() else 1 - len(letters.sub("", found)) / len(found)
    return share < least


def _repeats_itself(text: str, most: float) -> bool:
    """Too many of the lines that are not blank stood earlier in the text (Rae et al., 2021, section A.1.1)."""
    if "\n" not in text and "\r" not in text:
        return False
    lines = [line for whole in text.splitlines() if (line := whole.strip())]
    return len(lines) - len(set(lines)) > most * len(lines)


def _import_ftfy() -> ModuleType:
    try:
        import ftfy
    except ImportError:
        raise DataError(
            "screen.mojibake needs the package ftfy, which is not installed. Install it with pip install "
            "'unisono[mend]', or set screen.mojibake = \"keep\"."
        ) from None
    return ftfy
