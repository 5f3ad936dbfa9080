"""Sketches depend on their own text alone and follow the curve; decisions on arrays are those of comparing all pairs."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.data.screening import near_duplicates as near
from unisono.data.screening.near_duplicates import (
    BANDS,
    IN_SPLIT,
    IN_TRAIN,
    ROWS,
    STAYS,
    find_contradicted,
    find_near_duplicates,
    sketch,
)

texts = st.lists(st.text(st.characters(), max_size=30) | st.text("ab c!", max_size=30), max_size=8)


@given(texts, st.randoms())
def test_a_sketch_depends_on_its_own_text_alone(some: list[str], shuffler: random.Random) -> None:
    """Neither on order nor on company; lone surrogates and empty texts have one, too."""
    rows = dict(zip(some, sketch(some), strict=True))
    shuffler.shuffle(some)
    again = sketch([*some, "and others", *some])
    assert again.dtype == np.uint64 and again.shape == (2 * len(some) + 1, BANDS)
    for number, text in enumerate(some):
        assert np.array_equal(again[number], rows[text])
        assert np.array_equal(again[len(some) + 1 + number], rows[text])


def test_groups_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that end, or lie across, a group: fails if a window could reach into the next text."""
    some = ["x" * length for length in range(40)] + ["the quick brown fox " * times for times in range(9)]
    whole = sketch(some)
    monkeypatch.setattr(near, "_TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(near, "_LETTERS_AT_ONCE", 50)
    assert np.array_equal(sketch(some), whole)
    assert np.array_equal(np.concatenate([sketch([text]) for text in some]), whole)


def test_sketches_are_what_they_were() -> None:
    """A dataset made elsewhere, or earlier, was screened by the same bits. Changing them means a new screen.VERSION."""
    some = [
        "",
        "?!",
        "short",
        "The quick brown fox jumps over the lazy dog.",
        "Größe, “zitiert”; здравствуй, мир",
        "日本語のテキストです" * 3,
    ]
    digest = hashlib.sha256(sketch(some).astype("<u8").tobytes()).hexdigest()
    assert digest == "2355e02eb4a6e20994d50d2ae628c82776ab5a58769b40717211ee62f50a1567"


def test_case_punctuation_and_spaces_are_evened_out() -> None:
    same = sketch(["Hello, World: it's fine", "hello world\n\tit s   FINE!!", "«HELLO» world… it’s fine"])
    assert (same == same[0]).all()
    other = sketch(["!!!", "???", "hello world it s fin", "hello world it is fine"])
    assert len(np.unique(np.concatenate([same[:1], other]), axis=0)) == 5


def shingles(text: str) -> set[str]:
    spelled = near._spell(text).decode("utf-16-le")
    return {spelled[start : start + near.SHINGLE] for start in range(max(1, len(spelled) - near.SHINGLE + 1))}


@pytest.mark.parametrize(("words", "tolerance"), [(60, 0.1), (400, 0.05)])
def test_texts_are_found_as_often_as_the_curve_says(words: int, tolerance: float) -> None:
    """Fails if bins were not independent, if few of them were borrowed wrongly, or if rows or bands changed."""
    draw = random.Random(1)
    known = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    pairs, expected = [], []
    for _ in range(600):
        first = draw.choices(known, k=words)
        rate = draw.choice((0.02, 0.04, 0.08))
        second = [draw.choice(known) if draw.random() < rate else word for word in first]
        pairs += [" ".join(first), " ".join(second)]
        one, two = shingles(pairs[-2]), shingles(pairs[-1])
        expected.append(1 - (1 - (len(one & two) / len(one | two)) ** ROWS) ** BANDS)
    bands = sketch(pairs)
    found = (bands[::2] == bands[1::2]).any(axis=1)
    strata = np.digitize(expected, [0.2, 0.5, 0.8, 0.95])
    assert len(set(strata)) == 5
    for stratum in range(5):
        there = strata == stratum
        spread = 3 * 0.5 / np.sqrt(there.sum())
        assert abs(found[there].mean() - np.array(expected)[there].mean()) < tolerance + spread
    assert abs(found.mean() - np.mean(expected)) < tolerance


def test_unlike_texts_are_not_found() -> None:
    draw = random.Random(2)
    known = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    bands = sketch([" ".join(draw.choices(known, k=draw.randint(1, 40))) for _ in range(3000)])
    found = find_near_duplicates(bands, np.zeros(3000, np.int8), np.ones(3000, bool))
    assert (found == IN_SPLIT).sum() < 3000 * 0.02, "those of one or two words are equal now and then"


@pytest.mark.parametrize(
    ("alphabet", "letters", "shingles", "broken"),
    [("абвгдежзийклмнопрстуфхцчшщыьэюя", 240, 233, 8), ("".join(map(chr, range(0x4E00, 0x5200))), 120, 233, 9)],
)
def test_other_scripts_say_as_much_in_their_letters(alphabet: str, letters: int, shingles: int, broken: int) -> None:
    """Of 120 Chinese characters, as of 240 Russian letters, are 233 shingles, and one changed breaks 9 or 8 of them."""
    draw = random.Random(3)
    some = ["".join(draw.choices(alphabet, k=letters)) for _ in range(300)]
    other = list(some)
    for place in range(letters // 8, letters, letters // 4):
        other = [text[:place] + alphabet[5] + text[place + 1 :] for text in other]
    bands = sketch(some + other)
    found = (bands[:300] == bands[300:]).any(axis=1).mean()
    similarity = (shingles - 4 * broken) / (shingles + 4 * broken)
    assert abs(found - (1 - (1 - similarity**ROWS) ** BANDS)) < 0.1
    assert not find_near_duplicates(bands[:300], np.zeros(300, np.int8), np.ones(300, bool)).any()


def share(bands: np.ndarray, one: int, other: int) -> bool:
    return bool((bands[one] == bands[other]).any())


small = st.integers(0, 12).flatmap(
    lambda records: st.tuples(
        st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=records, max_size=records),
        st.lists(st.integers(0, 2), min_size=records, max_size=records),
        st.lists(st.booleans() | st.just(True), min_size=records, max_size=records),
        st.lists(st.integers(0, 2), min_size=records, max_size=records),
    )
)
Drawn = tuple[list[list[int]], list[int], list[bool], list[int]]


def arrays(drawn: Drawn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    bands, splits, kept, labels = drawn
    records = len(bands)
    shaped = np.array(bands, np.uint64).reshape(records, 3)
    return shaped, np.array(splits, np.int8), np.array(kept, bool), np.array(labels, np.int32)


@given(small)
def test_near_duplicates_are_those_of_comparing_all_pairs(drawn: Drawn) -> None:
    bands, splits, kept, _ = arrays(drawn)
    found = find_near_duplicates(bands, splits, kept)
    assert found.dtype == np.int8
    numbers = [number for number in range(len(kept)) if kept[number]]
    leaks = {
        one for one in numbers if splits[one] and any(share(bands, one, two) for two in numbers if not splits[two])
    }
    left = [number for number in numbers if number not in leaks]
    follow = {
        two for two in left if any(one < two and splits[one] == splits[two] and share(bands, one, two) for one in left)
    }
    for number in range(len(kept)):
        assert found[number] == (IN_TRAIN if number in leaks else IN_SPLIT if number in follow else STAYS)
    by_column = np.ascontiguousarray(bands.T).T
    assert np.array_equal(find_near_duplicates(by_column, splits, kept), found)


@given(small, st.integers(0, 12))
def test_what_is_added_at_the_end_changes_nothing_before(drawn: Drawn, cut: int) -> None:
    """Within a split: a larger file keeps what the smaller one kept."""
    bands, splits, kept, _ = arrays(drawn)
    splits[:] = 0
    found = find_near_duplicates(bands, splits, kept)
    assert np.array_equal(find_near_duplicates(bands[:cut], splits[:cut], kept[:cut]), found[:cut])


@given(small, st.randoms())
def test_order_changes_who_stays_but_not_who_has_a_near_duplicate(drawn: Drawn, shuffler: random.Random) -> None:
    """A group of near-duplicates keeps one at least in any order; leaks into test do not depend on order at all."""
    bands, splits, kept, _ = arrays(drawn)
    order = np.array(shuffler.sample(range(len(kept)), len(kept)), np.int64)
    found = find_near_duplicates(bands, splits, kept)
    other = np.empty_like(found)
    other[order] = find_near_duplicates(bands[order], splits[order], kept[order])
    assert np.array_equal(found == IN_TRAIN, other == IN_TRAIN)
    for one in np.flatnonzero(kept):
        group, grown = {int(one)}, True
        while grown:
            more = {int(two) for two in np.flatnonzero(kept) if any(share(bands, int(two), three) for three in group)}
            more = {two for two in more if splits[two] == splits[one] and found[two] != IN_TRAIN}
            grown = not more <= group
            group |= more
        for outcome in (found, other):
            assert outcome[one] == IN_TRAIN or any(outcome[two] == STAYS for two in group)


@given(small, st.integers(1, 4), st.sampled_from([0.0, 0.5, 0.7]))
def test_contradictions_are_those_of_comparing_all_pairs(drawn: Drawn, neighbours: int, least: float) -> None:
    bands, splits, kept, labels = arrays(drawn)
    found = find_contradicted(labels, bands, splits, kept, neighbours=neighbours, share=least)
    for one in range(len(kept)):
        votes = [
            [
                labels[two]
                for two in np.flatnonzero(kept)
                if two != one and splits[two] == splits[one] and bands[two, band] == bands[one, band]
            ]
            for band in range(3)
        ]
        everyone = [vote for band in votes for vote in band]
        against = sum(vote != labels[one] for vote in everyone)
        expected = kept[one] and max(map(len, votes)) >= neighbours and against > least * len(everyone)
        assert found[one] == expected


def test_a_wrong_label_among_near_duplicates_is_found() -> None:
    start = "your order has been shipped and will arrive within three working days from our store in "
    some = [start + place for place in ("rome", "oslo", "bern", "riga", "kyiv")] + ["something else altogether"] * 2
    labels = np.array([1, 1, 0, 1, 1, 0, 1], np.int32)
    splits, kept = np.zeros(7, np.int8), np.ones(7, bool)
    bands = sketch(some)
    found = find_contradicted(labels, bands, splits, kept, neighbours=3, share=0.5)
    assert found.tolist() == [False, False, True, False, False, False, False], "two alone are not judged"
    assert find_near_duplicates(bands, splits, kept & ~found).tolist() == [0, 1, 0, 1, 1, 0, 1]


def test_without_records() -> None:
    nothing = np.empty(0, np.int8)
    assert sketch([]).shape == (0, BANDS)
    assert find_near_duplicates(sketch([]), nothing, nothing.astype(bool)).shape == (0,)
    assert find_contradicted(nothing, sketch([]), nothing, nothing.astype(bool), neighbours=1, share=0.5).shape == (0,)
