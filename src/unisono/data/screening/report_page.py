"""The review of the data as one HTML page: what came in, what stayed, why the rest went, and what that changed.

Owns the page's numbers and sentences; `report_page.html`, a template for Jinja2, owns its looks. The Jinja2 environment
escapes everything that comes from the data, and spells out invisible characters, so this holds on the whole page. The
page holds no scripts and loads nothing. The same review always gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.data.screening import review
from unisono.data.screening.review import EDGES, NO_CLASS, STAYED, Review
from unisono.data.screening.rules import UNSEEN

if TYPE_CHECKING:
    from jinja2 import Template

SPLITS = ("train", "validation", "test")
CLASSES_AT_MOST = 30
"""Rows in a table of classes: the others are counted in one line."""

_WIDTH, _HEIGHT, _FOOT, _HEAD = 720, 150, 22, 14

Row = dict[str, Any]


def render(
    found: Review,
    *,
    title: str,
    limit: str = "",
    facts: Sequence[tuple[str, str]] = (),
    mended: str = "",
    remarks: Sequence[str] = (),
) -> str:
    """Return the page.

    Args:
        found: the review of all parts, added up.
        title: the page's heading.
        limit: after what texts are cut (encode.max_tokens): "256 tokens"; empty: they are not.
        facts: names and values for the end of the page: files, settings, hashes.
        mended: a sentence on what the rules changed in texts; empty: they changed nothing.
        remarks: sentences for the beginning of the page.
    """
    splits = _find_splits(found)
    return _load_template().render(
        title=title,
        tiles=_count_tiles(found, splits, limit),
        summary=_summarise(found, splits, mended),
        split_names=splits,
        splits=[_show_split(found, split) for split in splits],
        reasons=_show_reasons(found, splits),
        examples=_show_examples(found, splits),
        classes=[{"split": split, "rows": _show_classes(found, split)} for split in splits],
        lengths=_show_lengths(found, splits, limit),
        remarks=[remark[:1].upper() + remark[1:] for remark in remarks],
        facts=facts,
    )


@cache
def _load_template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_spell_out,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("report_page.html")


def _spell_out(value: Any) -> Any:
    """Return a value for the page: invisible characters, and those that UTF-8 cannot hold, are written by number."""
    from markupsafe import Markup

    if not isinstance(value, str) or isinstance(value, Markup):  # a template macro's output was treated here before
        return value
    seen = UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", value)
    return seen.encode("utf-8", "backslashreplace").decode()


def _count_tiles(found: Review, splits: Sequence[str], limit: str) -> list[tuple[str, str]]:
    came, stayed = _total(found, splits, review.CLASSES_IN), _total(found, splits, review.CLASSES)
    tiles = [
        (f"{came:,}", "record came in" if came == 1 else "records came in"),
        (f"{stayed:,}", f"stayed: {_percent(stayed, came)}"),
        (f"{came - stayed:,}", f"set aside: {_percent(came - stayed, came)}"),
    ]
    if limit:
        cut, samples = _total(found, splits, review.CUT), _total(found, splits, review.TOKENS)
        tiles.append((_percent(cut, samples), f"of the texts are cut after {limit}"))
    return tiles


def _summarise(found: Review, splits: Sequence[str], mended: str) -> str:
    change, label, split = max(_find_changes(found, splits), default=(0.0, "", ""))
    balance = "The shares of the classes are as they came in."
    if change >= 0.0005:
        name = label or "records without a known class"
        balance = f"The share that changed most is that of {name} in {split}, by {100 * change:.1f} percentage points."
    reasons = _sum_reasons(found, splits)
    most = f" The most frequent reason is: {reasons[0][0]} ({reasons[0][1]:,})." if reasons else ""
    return f"{balance}{most} {mended}".strip()


def _show_split(found: Review, split: str) -> Row:
    came, stayed = (sum(found.take(what, split).values()) for what in (review.CLASSES_IN, review.CLASSES))
    gone = came - stayed
    cells = [f"{came:,}", f"{stayed:,}", f"{gone:,}", _percent(stayed, came)]
    return {"name": split, "cells": cells, "stayed": _share(stayed, came), "gone": _share(gone, came)}


def _show_reasons(found: Review, splits: Sequence[str]) -> list[Row]:
    reasons = _sum_reasons(found, splits)
    most = max((number for _, number in reasons), default=0)
    rows = []
    for reason, total in reasons:
        cells = [f"{found.counts[review.RECORDS, split, reason]:,}" for split in splits]
        rows.append({"name": reason, "cells": [*cells, f"{total:,}"], "share": _share(total, most)})
    return rows


def _show_examples(found: Review, splits: Sequence[str]) -> list[tuple[str, list[review.Example]]]:
    examples = []
    for reason, total in _sum_reasons(found, splits):
        if shown := found.examples.get(reason):
            examples.append((f"{reason}: the first {len(shown)}" if total > len(shown) else reason, shown))
    return examples


def _show_classes(found: Review, split: str) -> list[Row]:
    before, after = found.take(review.CLASSES_IN, split), found.take(review.CLASSES, split)
    came, stayed = sum(before.values()), sum(after.values())
    ordered = sorted(before, key=lambda label: (label == NO_CLASS, -before[label], label))
    shares = [(_share(before[label], came), _share(after.get(label, 0), stayed)) for label in ordered]
    widest = max(map(max, shares), default=0.0)
    rows: list[Row] = []
    for label, (was, now) in list(zip(ordered, shares, strict=True))[:CLASSES_AT_MOST]:
        cells = [f"{before[label]:,}", f"{after.get(label, 0):,}", f"{100 * was:.1f}%", f"{100 * now:.1f}%"]
        bars = (_share(was, widest), _share(now, widest))
        rows.append({"name": label, "cells": [*cells, _sign(now - was)], "bars": bars})
    if rest := ordered[CLASSES_AT_MOST:]:
        sums = [sum(counts.get(label, 0) for label in rest) for counts in (before, after)]
        cells = [*(f"{number:,}" for number in sums), "", "", ""]
        rows.append({"name": f"{len(rest):,} more", "cells": cells, "bars": None})
    return rows


def _show_lengths(found: Review, splits: Sequence[str], limit: str) -> list[Row]:
    drawings = []
    for split in splits:
        before, after = found.take(review.CHARACTERS_IN, split), found.take(review.CHARACTERS, split)
        drawings.append(_draw(f"{split}: records by characters", before, after))
        tokens = found.take(review.TOKENS, split)
        told = f"{split}: samples by tokens"
        cut, samples = sum(found.take(review.CUT, split).values()), sum(tokens.values())
        if cut:
            told += f"; {cut:,} of {samples:,} texts were cut after {limit} (encode.max_tokens)"
        elif limit:
            told += f"; no text is longer than {limit} (encode.max_tokens), so none was cut"
        number, _, unit = limit.partition(" ")
        drawings.append(_draw(told, {}, tokens, int(number.replace(",", "")) if unit.startswith("token") else 0))
    return [drawing for drawing in drawings if drawing]


def _draw(told: str, before: Mapping[str, int], after: Mapping[str, int], limit: int = 0) -> Row:
    """Return a histogram over the bins of EDGES: all records behind the kept ones; a line at the limit."""
    edges = [int(edge) for edge in EDGES]
    filled = [edges.index(int(edge)) for edge in {**before, **after}]
    if not filled:
        return {}
    first, last = min(filled), max(filled)
    step = _WIDTH / (last - first + 1)
    most = max([*before.values(), *after.values()])
    floor = _HEAD + _HEIGHT
    bars, names = [], []
    for number in range(first, last + 1):
        left, edge = (number - first) * step, str(edges[number])
        for name, counts, inset in (("was", before, 1.0), ("stay", after, 1.0 if not before else step / 5)):
            if count := counts.get(edge, 0):
                height = max(_HEIGHT * count / most, 1)
                place = {"x": f"{left + inset:.1f}", "y": f"{floor - height:.1f}", "height": f"{height:.1f}"}
                told_bin = f"{edges[number]:,} to {edges[number + 1] - 1:,}: {count:,}"
                bars.append({"name": name, "width": f"{max(step - 2 * inset, 1):.1f}", "told": told_bin, **place})
        if (number - first) % max(1, -(-(last - first + 1) // 12)) == 0:
            names.append((f"{left + 1:.1f}", f"{edges[number]:,}"))
    x = ""
    if limit and edges[first] <= limit < edges[last + 1]:
        within = max(number for number in range(first, last + 1) if edges[number] <= limit)
        part = (limit - edges[within]) / (edges[within + 1] - edges[within])
        x = f"{(within - first + part) * step:.1f}"
    size = {"width": _WIDTH, "height": floor + _FOOT, "floor": floor, "top": _HEAD}
    return {"told": told, "most": f"{most:,}", "bars": bars, "edges": names, "limit": x, **size}


def _find_splits(found: Review) -> list[str]:
    there = {split for _, split, _ in found.counts}
    return [split for split in SPLITS if split in there] + sorted(there - set(SPLITS))


def _sum_reasons(found: Review, splits: Iterable[str]) -> list[tuple[str, int]]:
    """Return the reasons with their counts over all splits, the most frequent first."""
    sums: dict[str, int] = {}
    for split in splits:
        for reason, number in found.take(review.RECORDS, split).items():
            sums[reason] = sums.get(reason, 0) + number
    return sorted(((reason, n) for reason, n in sums.items() if reason != STAYED), key=lambda one: (-one[1], one[0]))


def _find_changes(found: Review, splits: Iterable[str]) -> list[tuple[float, str, str]]:
    """Return by how much each class's share changed, with the class and the split."""
    changes = []
    for split in splits:
        before, after = found.take(review.CLASSES_IN, split), found.take(review.CLASSES, split)
        came, stayed = sum(before.values()), sum(after.values())
        for label, number in before.items():
            change = _share(after.get(label, 0), stayed) - _share(number, came)
            changes.append((round(abs(change), 9), label, split))  # of two classes, both change by the same
    return changes


def _total(found: Review, splits: Iterable[str], what: str) -> int:
    return sum(sum(found.take(what, split).values()) for split in splits)


def _share(number: float, of_all: float) -> float:
    return number / of_all if of_all else 0.0


def _percent(number: float, of_all: float) -> str:
    """A share with one decimal; 0.0% means exactly none, 100.0% exactly all."""
    told = f"{100 * _share(number, of_all):.1f}%"
    if number and told == "0.0%":
        return "<0.1%"
    return ">99.9%" if number != of_all and told == "100.0%" else told


def _sign(change: float) -> str:
    told = f"{100 * change:+.1f}"
    return "0.0" if told in ("+0.0", "-0.0") else told.replace("-", "\N{MINUS SIGN}")
