"""A review adds up to the same in any grouping and order; its page tells the numbers, and runs nothing that the data says."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unisono.data.screening import review
from unisono.data.screening.report_page import render
from unisono.data.screening.review import EDGES, EXAMPLE_CHARACTERS, EXAMPLES, Review

SPLITS = ("train", "validation", "test")
REASONS = ("", "duplicate", "mail address")
LABELS = ("sport", "food")


def make_part(rows: list[tuple[int, int, int, int, int]], input_split: int) -> Review:
    """A review of rows: split, reason, class, characters, tokens."""
    part = Review()
    splits, reasons, labels, characters, tokens = (
        np.array([row[place] for row in rows], np.int64) for place in range(5)
    )
    part.count_records(
        splits=splits.astype(np.int8), reasons=reasons.astype(np.int8), labels=labels.astype(np.int32), characters=characters,
        split_names=SPLITS, reason_names=REASONS, label_names=LABELS,
    )  # fmt: skip
    for number, split in enumerate(SPLITS):
        kept = tokens[(splits == number) & (reasons == 0)]
        part.count_tokens(split, kept, int(np.count_nonzero(kept >= 64)))
    for number, (split, reason, _, length, _) in enumerate(rows):
        if reason:
            part.show(
                REASONS[reason],
                "x" * length,
                place=(input_split, number),
                split=SPLITS[split],
                file="f",
                row=number,
                label=None,
            )
    return part


rows = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(-1, 1), st.integers(0, 300), st.integers(1, 64)),
    max_size=12,
)


@given(st.lists(rows, min_size=1, max_size=6), st.randoms())
def test_parts_add_up_in_any_grouping_and_order(
    parts: list[list[tuple[int, int, int, int, int]]], shuffler: random.Random
) -> None:
    """To the review of all the data at once. Fails if examples were kept by when they came, or a count was lost."""
    reviews = [make_part(part, input_split) for input_split, part in enumerate(parts)]
    whole = Review()
    for one in reviews:
        whole = whole + one
    queue = [Review.from_dict(json.loads(json.dumps(one.to_dict()))) for one in reviews]
    while len(queue) > 1:
        shuffler.shuffle(queue)
        queue.append(queue.pop() + queue.pop())
    assert queue[0] == whole
    assert json.dumps(queue[0].to_dict()) == json.dumps(whole.to_dict())
    assert render(queue[0], title="t", limit="64 tokens") == render(whole, title="t", limit="64 tokens")
    together = make_part([row for part in parts for row in part], 0)
    assert together.counts == whole.counts
    assert {reason: [one.text for one in shown] for reason, shown in together.examples.items()} == {
        reason: [one.text for one in shown] for reason, shown in whole.examples.items()
    }


def test_what_is_counted() -> None:
    found = make_part([(0, 0, 0, 5, 3), (0, 1, 0, 6, 0), (0, 0, 1, 100, 64), (0, 2, -1, 0, 0), (2, 0, 1, 1, 1)], 0)
    assert found.take(review.RECORDS, "train") == {"": 2, "duplicate": 1, "mail address": 1}
    assert found.take(review.CLASSES_IN, "train") == {"": 1, "food": 1, "sport": 2}
    assert found.take(review.CLASSES, "train") == {"food": 1, "sport": 1}
    assert found.take(review.CHARACTERS_IN, "train") == {"0": 1, "4": 1, "6": 1, "96": 1}
    assert found.take(review.CHARACTERS, "train") == {"4": 1, "96": 1}
    assert found.take(review.TOKENS, "train") == {"3": 1, "64": 1}
    assert found.take(review.CUT, "train") == {"": 1}
    assert found.take(review.RECORDS, "test") == {"": 1}
    assert found.take(review.RECORDS, "validation") == {}


def test_bins_are_fixed_and_cover_every_length() -> None:
    assert EDGES[:10].tolist() == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert (np.diff(EDGES) > 0).all() and EDGES[-1] > 2**38


def test_examples_are_the_first_and_short() -> None:
    found = Review()
    for number in (7, 3, 9, 1, 5, 2, 8):
        found.show(
            "too long", f"{number}" * 999, place=(0, number), split="train", file="f", row=number, label="y" * 999
        )
    shown = found.examples["too long"]
    assert [one.row for one in shown] == [1, 2, 3, 5, 7] and len(shown) == EXAMPLES
    assert all(len(one.text) == EXAMPLE_CHARACTERS + 1 and len(one.label) == EXAMPLE_CHARACTERS for one in shown)


def test_refused_personal_details_are_not_shown() -> None:
    """The page is shown to others. Fails if a detail at the cut were halved before it is masked."""
    found = Review()
    text = "a" * (EXAMPLE_CHARACTERS - 9) + " bob.smith@example.org, 4111 1111 1111 1111, +49 30 1234567"
    for number, reason in enumerate(("mail address", "card number", "phone number")):
        found.show(reason, text, place=(0, number), split="train", file="f", row=1, label=None)
        found.show(reason, text[150:], place=(1, number), split="train", file="f", row=1, label=None)
    texts = [one.text for shown in found.examples.values() for one in shown]
    assert len(texts) == 6 and not re.search("bob|4111|1234567", " ".join(texts))
    assert sum("[mail], [card], [number]" in text for text in texts) == 3
    kept = Review()
    kept.show("duplicate", text[150:], place=(0, 0), split="train", file="f", row=1, label=None)
    assert "bob.smith@example.org" in kept.examples["duplicate"][0].text


def test_no_half_of_a_personal_detail_is_shown() -> None:
    """Masks shorten a text, so what is cut must not be cut before."""
    review = Review()
    text = ("x" * 150 + "@example.org ") * 12 + "jane.doe" * 4 + "@example.org"
    review.show("mail address", text, place=(0, 0), split="train", file="f", row=1, label=None)
    assert review.examples["mail address"][0].text == " ".join(["[mail]"] * 13)


class Reader(HTMLParser):
    """Text and tags of a page; raises on a tag that closes none."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("meta", "line", "rect") or (tag == "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


EVIL = "<script>alert(1)</script> \" onload='x' &amp; </title></style> {{ 7 * 7 }} {% raw %} {# \0 \u202e \ud800"


def make_evil() -> Review:
    found = Review()
    found.count_records(
        splits=np.array([0, 0, 1]), reasons=np.array([0, 1, 0]), labels=np.array([0, 0, 1]), characters=np.array([3, 5, 900]),
        split_names=("train", EVIL), reason_names=("", EVIL), label_names=(EVIL, "b"),
    )  # fmt: skip
    found.count_tokens("train", np.array([2]), 1)
    found.show(EVIL, EVIL, place=(0, 0), split=EVIL, file=EVIL, row=3, label=EVIL)
    return found


def test_the_page_is_whole_and_runs_nothing() -> None:
    """Wherever the data's strings stand: class, reason, split, file, text, title, facts. Fails if one is not escaped."""
    page = render(make_evil(), title=EVIL, limit="2 tokens", facts=[(EVIL, EVIL)], mended=EVIL, remarks=[EVIL])
    page.encode()  # lone surrogates are spelt out
    read = Reader(page)
    assert read.open == []
    assert not read.tags & {"script", "link", "img", "iframe", "a", "object"}
    assert not [name for name in read.attributes if name.startswith("on") or name in ("src", "href")]
    assert not re.search(r"https?:|url\(|@import", page)
    assert "\0" not in page and "\u202e" not in page and "\\u202e" in page
    assert sum("<script>alert(1)</script>" in text for text in read.texts) > 8
    assert sum("{{ 7 * 7 }} {% raw %} {#" in text for text in read.texts) > 8  # the data are no template
    assert page == render(make_evil(), title=EVIL, limit="2 tokens", facts=[(EVIL, EVIL)], mended=EVIL, remarks=[EVIL])


def read_page(found: Review, limit: str = "") -> str:
    return " ".join(Reader(render(found, title="Reviews", limit=limit)).texts)


def test_the_page_answers() -> None:
    """How many came in and stayed, why others went, whether the balance changed, whether texts were cut."""
    rows = [(0, 0, 0, 10, 8)] * 60 + [(0, 1, 0, 10, 0)] * 20 + [(0, 0, 1, 90, 64)] * 20 + [(2, 0, 1, 7, 5)] * 1
    told = read_page(make_part(rows, 0), "64 tokens")
    assert "101 records came in 81 stayed: 80.2% 20 set aside: 19.8%" in told
    assert "The most frequent reason is: duplicate (20)." in told
    assert "The share that changed most is that of sport in train, by 5.0 percentage points." in told
    assert "sport 80 60 80.0% 75.0% −5.0" in told and "food 20 20 20.0% 25.0% +5.0" in told
    assert "train: samples by tokens; 20 of 80 texts were cut after 64 tokens (encode.max_tokens)" in told
    assert "test: samples by tokens; no text is longer than 64 tokens (encode.max_tokens), so none was cut" in told
    assert "24.7% of the texts are cut after 64 tokens" in told


def test_pages_of_little() -> None:
    """Nothing at all, nothing set aside, everything set aside, more classes than are shown."""
    assert "0 records came in" in read_page(Review())
    told = read_page(make_part([(0, 0, 0, 10, 8)] * 3, 0))
    assert "None was." in told and "The shares of the classes are as they came in." in told and "max_tokens" not in told
    assert "0 stayed: 0.0%" in read_page(make_part([(0, 1, 0, 10, 8)] * 3, 0))
    alone = Review()
    alone.count_tokens("test", np.array([3, 4]))
    assert "test: samples by tokens" in read_page(alone)
    many = Review()
    many.count_records(
        splits=np.zeros(100, np.int8), reasons=np.zeros(100, np.int8), labels=np.arange(100), characters=np.arange(100),
        split_names=("train",), reason_names=("",), label_names=[f"class {number}" for number in range(100)],
    )  # fmt: skip
    told = read_page(many)
    assert "70 more 70 70" in told and told.count("class ") < 40


def test_few_are_not_none() -> None:
    found = Review()
    reasons = np.zeros(100_000, np.int8)
    reasons[5] = 1
    found.count_records(
        splits=reasons, reasons=reasons, labels=reasons, characters=reasons,
        split_names=("train", "test"), reason_names=("", "duplicate"), label_names=("a", "b"),
    )  # fmt: skip
    assert "stayed: >99.9% 1 set aside: <0.1%" in re.sub(" +", " ", read_page(found))
