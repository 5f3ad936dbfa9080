"""Each rule on a record alone: what it finds, what it lets pass, what it changes; in which order; and that nothing breaks it."""

from __future__ import annotations

import pickle
import re
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy import ends
from unisono.config.recipe import check
from unisono.config.sections import Screen
from unisono.data.ingest.read import Record
from unisono.data.screening import rules
from unisono.data.screening.rules import Examiner, find_versions, is_card, mask_all, mask_cards, mask_mail, mask_phones
from unisono.errors import DataError, RecipeError


def record(text: str, label: str | None = "x", fault: str = "") -> Record:
    return Record(file="f", row=1, text=text, label=label, fault=fault)


def examine(text: str, **settings: Any) -> tuple[str, str]:
    """What becomes of a text, and the reason against it."""
    examined, reason = Examiner(Screen(**settings), ()).examine(record(text))
    return examined.text, reason


SCRIPTS = [
    "Arabic", "Armenian", "Bengali", "Cyrillic", "Devanagari", "Ethiopic", "Georgian", "Greek", "Gujarati", "Gurmukhi",
    "Han", "Hangul", "Hebrew", "Hiragana", "Kannada", "Katakana", "Khmer", "Lao", "Latin", "Malayalam", "Myanmar",
    "Sinhala", "Tamil", "Telugu", "Thai", "Tibetan",
]  # fmt: skip

ALL: dict[str, Any] = {
    "min_characters": 3,
    "max_characters": 60,
    "scripts": ("Latin",),
    "invisible": "refuse",
    "repeated_lines_share": 0.3,
    "mojibake": "refuse",
    "mail": "refuse",
    "card": "refuse",
    "phone": "refuse",
}
MENDING: dict[str, Any] = {
    "invisible": "strip",
    "mojibake": "mend",
    "mail": "mask",
    "card": "mask",
    "phone": "mask",
    "scripts": ("Greek", "Han"),
    "repeated_lines_share": 0.0,
    "min_characters": 2,
}


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        (record("fine words"), ""),
        (record("", fault="not CSV", label=None), "not CSV"),
        (record(" \n\t", label=None), "empty text"),
        (record("fine", label=None), "no label"),
        (record("fine", label="z"), "unknown label"),
        (record("cafÃ© a\0 bob@example.org", label=None), "no label"),
        (record("cafÃ© a\0 bob@example.org"), "mojibake"),
        (record("a\0 bob@example.org 4111 1111 1111 1111"), "invisible characters"),
        (record("bob@example.org 4111 1111 1111 1111 +49 30 1234567"), "mail address"),
        (record("4111 1111 1111 1111 +49 30 1234567"), "card number"),
        (record("+49 30 1234567"), "phone number"),
        (record(" \n я \n "), "too short"),
        (record("я" * 61), "too long"),
        (record("я\nя\nя\nя"), "wrong script"),
        (record("a\nb\na\na"), "repeated lines"),
    ],
)
def test_the_first_broken_rule_is_the_reason(given_: Record, reason: str) -> None:
    """The order of REASONS: each case breaks its own rule and most of the later ones. Reorder two, and it fails."""
    assert Examiner(Screen(**ALL), ("x",)).examine(given_) == (given_, reason)
    assert reason in ("", "not CSV", *rules.REASONS)


def test_by_default_nothing_changes() -> None:
    for text in ("a", "я" * 10_000, "a\0\ufeff\n" * 9, "cafÃ© bob@example.org 4111 1111 1111 1111 +49 30 1234567"):
        assert examine(text) == (text, "")


def test_without_labels_every_class_is_known() -> None:
    assert Examiner(Screen(), ()).examine(record("a", label="any"))[1] == ""


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to bob.smith+x@mail.example.co.uk, or else", "write to [mail], or else"),
        ("<BOB@EXAMPLE.COM>; ", "<[mail]>; "),
        ("jürgen@müller.de", "[mail]"),
        ("a@b.cd@e.fg a@b.cd0e@f.gh", "[mail]@e.fg [mail]@f.gh"),
        ("@handle, a@b, a @ b.cd, x@1.2, user@localhost", "@handle, a@b, a @ b.cd, x@1.2, user@localhost"),
    ],
)
def test_mail_addresses(text: str, masked: str) -> None:
    assert mask_mail(text) == masked
    assert examine(text, mail="refuse") == (text, "mail address" if masked != text else "")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("4111 1111 1111 1111", "[card]"),  # test numbers of the card companies
        ("4111111111111111.", "[card]."),
        ("no 5500-0000-0000-0004!", "no [card]!"),
        ("378282246310005 and 4222222222222", "[card] and [card]"),
        ("4111 1111 1111 1111 123", "[card] 123"),
        ("12 4111 1111 1111 1111 5500 0000 0000 0004", "12 [card] [card]"),
        ("4222222222222 006", "[card]"),  # a right number of 13 digits begins one of 16
        ("5935 5819 4882 5136 5117", "[card] 5117"),  # two right numbers that overlap
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),
        ("94111111111111111", "94111111111111111"),
        ("978-3-16-148410-0 1700000000000000000", "978-3-16-148410-0 1700000000000000000"),
    ],
)
def test_card_numbers(text: str, masked: str) -> None:
    assert mask_cards(text) == masked
    assert examine(text, card="refuse") == (text, "card number" if masked != text else "")


@given(st.text("0123456789", min_size=12, max_size=18).filter(lambda digits: digits[0] in "23456"))
def test_one_check_digit_in_ten_is_right(digits: str) -> None:
    """Luhn: exactly one last digit fits, and changing one other digit breaks it."""
    fitting = [digits + last for last in "0123456789" if is_card(digits + last)]
    assert len(fitting) == 1
    other = fitting[0][:5] + str((int(fitting[0][5]) + 1) % 10) + fitting[0][6:]
    assert not is_card(other)


@pytest.mark.parametrize(
    ("region", "number"),
    [
        ("", "+49 (0)30 1234567"), ("", "+442079460958"), ("", "+1 201 555 0123"), ("", "+86 10 6552 9988"),
        ("DE", "0049 30 1234567"), ("DE", "030 1234567"), ("DE", "0151-12345678"), ("DE", "(030) 1234567"),
        ("DE", "0171/1234567"), ("DE", "+33 1 23 45 67 89"), ("GB", "020 7946 0958"), ("FR", "01 23 45 67 89"),
        ("US", "(201) 555-0123"), ("US", "201-555-0123"), ("US", "201.555.0123"), ("US", "1 (201) 555-0123"),
        ("CN", "138 0013 8000"), ("CN", "010-65529988"),
    ],
)  # fmt: skip
def test_phone_numbers(region: str, number: str) -> None:
    """In the usual spellings of several countries."""
    assert mask_phones(number, region) == "[phone]"
    assert mask_phones(f"Tel.: {number}, or {number}.", region) == "Tel.: [phone], or [phone]."
    assert examine(f"call {number}", phone="refuse", phone_region=region)[1] == "phone number"


@pytest.mark.parametrize("region", ["", "US", "DE", "GB", "CN"])
@pytest.mark.parametrize(
    "text",
    [
        "01.02.2003 12:00:00", "1/2/2003", "2003-02-01 10:11:12", "0.123456789", "1,000,000,000", "192.168.100.200",
        "1700000000", "12345-6789", "page 123-4567", "0123", "1234567890", "00000000000000000000",
        "6.00.2600.0000", "order id 00123456789",
    ],
)  # fmt: skip
def test_what_is_no_phone_number(text: str, region: str) -> None:
    """Versions, dates and order numbers have as many digits. Fails if digits alone made a phone number."""
    assert mask_phones(text, region) == text


def test_without_a_region_only_international_numbers_are_found() -> None:
    assert mask_phones("030 1234567 or +49 30 1234567") == "030 1234567 or [phone]"
    assert mask_phones("030 1234567 or +49 30 1234567", "DE") == "[phone] or [phone]"


def test_a_region_without_phones_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"screen\.phone_region = 'ZZ': no such region\. Allowed are AC, AD, "):
        Examiner(Screen(phone="mask", phone_region="ZZ"), ())
    Examiner(Screen(phone="keep", phone_region="ZZ"), ())


pieces = st.lists(
    st.sampled_from([
        *"0123456789+-. ()/@ab", "a@b.cd", "4111111111111111", "4111 1111 1111 1111", "+12345678", "(555) 234-5678",
        "0301234567", "01.02.2003", "00", "ü", "\u2011", "[mail]", "]", "\n",
    ]),
    max_size=30,
).map("".join)  # fmt: skip


@given(pieces)
def test_what_is_masked_has_nothing_left_to_mask(text: str) -> None:
    """Fails if a mask could join, or set free, what comes before and after it."""
    mask_german = partial(mask_phones, region="DE")
    for mask in (mask_mail, mask_cards, mask_phones, mask_german, mask_all):
        once = mask(text)
        assert mask(once) == once
    for key, mask in (("mail", mask_mail), ("card", mask_cards), ("phone", mask_german)):
        assert Examiner(Screen(**{key: "refuse"}, phone_region="DE"), ()).treat(mask(text)) == (mask(text), "")
    for mask in (mask_mail, mask_cards, mask_german):
        assert not set(re.findall(r"\d{5,}", mask_all(text))) & set(re.findall(r"\d{5,}", mask(text)))


anything = st.text(st.characters(), max_size=40) | pieces | st.text("Ã©â€™\x92\xa0 \ud800\udcff\0\ufffd", max_size=20)


@given(anything)
def test_examining_never_raises_and_is_idempotent(text: str) -> None:
    """On any text, lone surrogates among them. Examined again a record stays what it is, unless it is both mended and
    stripped: what is left can then look like mojibake for the first time."""
    for settings in (ALL, MENDING, {**MENDING, "mojibake": "keep"}, {**MENDING, "invisible": "keep"}):
        examiner = Examiner(Screen(**settings), ("x",))
        once, reason = examiner.examine(record(text))
        assert settings is MENDING or examiner.examine(once) == (once, reason)
        copy = pickle.loads(pickle.dumps(examiner))
        assert copy.examine(record(text)) == (once, reason)


def test_treatment_comes_before_judgement() -> None:
    """A text that stripping leaves empty is empty; a length is that of the masked text; a refused one is masked, too."""
    assert examine("\u200b\u200b", invisible="strip") == ("", "empty text")
    assert examine("bob@example.org", mail="mask", max_characters=6) == ("[mail]", "")
    assert examine("bob@example.org", mail="mask", min_characters=7) == ("[mail]", "too short")
    faulty, reason = Examiner(Screen(mail="mask"), ()).examine(record("x,bob@example.org", fault="3 fields, not 2"))
    assert (faulty.text, reason) == ("x,[mail]", "3 fields, not 2")
    assert examine("4111 1111 1111 1111 bob@example.org", card="refuse", mail="mask") == (
        "4111 1111 1111 1111 [mail]",
        "card number",
    )


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("a\0b\x1b[0m", "ab[0m"),
        ("\ufeffso\xadft\u200b\u202ewen", "softwen"),
        ("hid\U000e0041\U000e0042den", "hidden"),
        ("tab\tline\r\nform\f", "tab\tline\r\nform\f"),
        (
            "می\u200cخواهم क्\u200dष 👩\u200d👩\u200d👧 ❤\ufe0f \u200e\u200f",
            "می\u200cخواهم क्\u200dष 👩\u200d👩\u200d👧 ❤\ufe0f \u200e\u200f",
        ),
    ],
)
def test_invisible_characters(text: str, stripped: str) -> None:
    assert examine(text, invisible="strip") == (stripped, "")
    refused = examine(text, invisible="refuse", invisible_share=0.0)[1] == "invisible characters"
    assert refused == (text != stripped)


def test_few_invisible_characters_pass() -> None:
    assert examine("\0" + "a" * 99, invisible="refuse", invisible_share=0.01)[1] == ""
    assert examine("\0" + "a" * 98, invisible="refuse", invisible_share=0.01)[1] == "invisible characters"


@pytest.mark.parametrize(
    ("scripts", "text", "kept"),
    [
        (["Latin"], "Grüße, naïve Łódź! 123", True),
        (["Latin"], "половина half", False),  # 8 of 12 letters
        (["Latin", "Cyrillic"], "половина half", True),
        (["Cyrillic"], "plain ASCII", False),
        (["Cyrillic"], "2 + 2 = 4 :-)", True),  # no letter, so no wrong one
        (["Han", "Hiragana", "Katakana"], "日本語のテキスト", True),
        (["Han"], "ひらがなとカタカナ", False),
        (["Hangul"], "한국어 문장", True),
        (["Devanagari"], "हिन्दी में पाठ", True),
        (["Arabic"], "نص عربي", True),
        (["Hebrew"], "טקסט בעברית", True),
        (["Greek"], "ᏣᎳᎩ", False),  # which is Cherokee
        (["Cherokee"], "ᏣᎳᎩ", True),
        (["Katakana"], "データー", True),  # the mark of length is shared with Hiragana, and counts for neither
        (["Latin"], "Ⅷ ½ ² _ 7", True),  # no letter
    ],
)
def test_scripts(scripts: list[str], text: str, kept: bool) -> None:
    assert examine(text, scripts=scripts)[1] == ("" if kept else "wrong script")


def test_every_script_has_its_own_letters() -> None:
    """The commonest scripts are known by name, and no letter is of two."""
    owners: dict[str, str] = {}
    letters = "".join(filter(str.isalpha, map(chr, range(sys.maxunicode + 1))))
    for script in SCRIPTS:
        breaks: Any = Examiner(Screen(scripts=(script,)), ())._rules[0][1]
        found = "".join(breaks.keywords["wanted"].findall(letters))
        assert len(found) > 20, script
        for character in found:
            assert owners.setdefault(character, script) == script, hex(ord(character))


def test_repeated_lines() -> None:
    text = "buy\nnow\n buy \r\n\nnow\nok"  # two of five
    assert examine(text, repeated_lines_share=0.4)[1] == ""
    assert examine(text, repeated_lines_share=0.39)[1] == "repeated lines"
    assert examine("one line", repeated_lines_share=0.0)[1] == ""


def test_mojibake() -> None:
    assert examine("das cafÃ© in MÃ¼nchen", mojibake="mend") == ("das café in München", "")
    for fine in ("das Café in München", "ÄÖÜ ß", "“quoted” – naïve", "ação", "日本語"):
        assert examine(fine, mojibake="mend") == (fine, "")
        assert examine(fine, mojibake="refuse") == (fine, "")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the rules are made, not at the first text that needs it; and only if a rule needs it."""
    for package, extra, key, settings in (
        ("ftfy", "mend", "mojibake", ("mend", "refuse")),
        ("phonenumbers", "phone", "phone", ("mask", "refuse")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        Examiner(Screen(), ())
        for wanted in settings:
            told = rf"pip install 'unisono\[{extra}\]', or set screen.{key} = \"keep\""
            with pytest.raises(DataError, match=told):
                Examiner(Screen.model_validate({key: wanted}), ())
            with pytest.raises(DataError, match=told):
                find_versions(Screen.model_validate({key: wanted}))


def test_treatments_are_told() -> None:
    assert rules.describe_treatments(Screen(mail="refuse", mojibake="refuse")) == ""
    told = rules.describe_treatments(Screen(mail="mask", mojibake="mend"))
    assert told == "In the texts mojibake is mended, mail addresses are masked."


def test_versions_are_named_where_they_decide() -> None:
    assert find_versions(Screen(min_characters=3, invisible="strip", card="mask")) == {}
    assert set(find_versions(Screen(mojibake="mend"))) == {"ftfy"}
    assert set(find_versions(Screen(near_duplicates="refuse"))) == {"unicode"}
    assert set(find_versions(Screen(scripts=("Latin",), phone="mask"))) == {"regex", "phonenumbers"}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"scripts": ["Latyn"]}, "allowed are for instance Latin"),
        ({"scripts": ["Latin}|x{"]}, "match pattern"),
        ({"phone": "mask", "phone_region": "us"}, "match pattern"),
        ({"mail": "hide"}, "'keep', 'mask' or 'refuse'"),
        ({"min_characters": 9, "max_characters": 8}, "no text could be kept"),
        ({"script_share": 1.1}, "less than or equal to 1"),
    ],
)
def test_wrong_settings_are_explained(table: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match="screen") as found:
        check({"screen": table})
    assert told in str(found.value)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "1 ",
        "0",
        "a.",
        "a@",
        "@",
        "+1",
        "(",
        "(0",
        "0 ",
        "00 1",
        "4111 1111 1111 1112 ",
        "\n",
        "\0",
        "é",
        "a-",
        "@a.",
    ],
)
def test_time_grows_with_the_text_and_not_with_its_square(text: str) -> None:
    """A million characters made to be matched almost: hours, where a pattern starts over at every place. phonenumbers
    takes about 10 µs a digit, so it is given fewer."""
    for characters, settings in ((1_000_000, {"phone": "keep"}), (20_000, {"phone_region": "DE"})):
        examiner = Examiner(Screen(**{**MENDING, "mojibake": "keep", **settings}), ())
        with ends():
            examiner.examine(record("a@" + text * (characters // len(text))))


def test_new_texts_are_treated_like_those_learned_from() -> None:
    """Fails if prediction or evaluation on new data encoded texts that are not masked."""
    from unisono.config.recipe import Recipe
    from unisono.tasks.text.classifier import Classifier

    class Spy:
        def encode_marked(self, texts: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
            seen.extend(texts)
            return [np.ones(1, np.int32) for _ in texts], np.zeros(len(texts), bool)

    seen: list[str] = []
    recipe = Recipe(screen=Screen(mail="mask", invisible="strip"))
    classifier = Classifier(
        module=None, task=None, encoder=Spy(), labels=("x", "y"), recipe=recipe, dataset="",
        measure_model=lambda *_: {},  # type: ignore[arg-type]
    )  # fmt: skip
    source = classifier.encode(["to bob@example.org", "a\u200bb", ""], [1, 0, 1])
    assert seen == ["to [mail]", "ab", ""]
    assert source.labels is not None and source.labels.tolist() == [1, 0, 1]
