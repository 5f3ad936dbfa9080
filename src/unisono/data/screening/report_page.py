"""The review of the data as one HTML page: what came in, what stayed, why the rest went, and what that changed.

Owns the page's looks and sentences. Whatever comes from the data is escaped, and what could not be seen is spelt out;
the page holds no scripts and loads nothing. The same review always gives the same bytes.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from unisono.data.screening import review
from unisono.data.screening.review import EDGES, NO_CLASS, STAYED, Example, Review
from unisono.data.screening.rules import UNSEEN

SPLITS = ("train", "validation", "test")
CLASSES_AT_MOST = 30
"""Rows in a table of classes: the others are told in one line."""

_STYLE = """
:root{--page:#fcfcfb;--card:#fff;--ink:#1a1a19;--soft:#5f5e5a;--line:#e4e2dc;--stay:#2a78d6;--gone:#eb6834;--was:#c9c7bf}
@media(prefers-color-scheme:dark){:root{--page:#161615;--card:#1f1f1e;--ink:#f4f3ef;--soft:#a8a69e;--line:#363532;
--stay:#3987e5;--gone:#d95926;--was:#55534e}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:2rem 1.25rem 4rem;background:var(--page);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif;color-scheme:light dark}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.5rem 0 .5rem}h3{font-size:1rem;margin:1.5rem 0 .25rem}p{margin:.25rem 0 .75rem}
.soft,caption,figcaption{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;margin:1.25rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem}
.tile b{display:block;font-size:1.6rem;line-height:1.3;font-weight:600}.tile span{color:var(--soft)}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.25rem}
th,td{text-align:left;padding:.35rem .75rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:middle}
th{color:var(--soft);font-weight:500;white-space:nowrap}tbody th{color:var(--ink);white-space:normal;
overflow-wrap:anywhere;min-width:7rem}
.n{text-align:right;white-space:nowrap}
.bars{padding-right:0;width:38%;min-width:8rem}.fact{overflow-wrap:anywhere}
.bar{display:flex;height:.7rem;border-radius:.2rem;overflow:hidden;background:var(--line);margin:.12rem 0;gap:2px}
.bar.thin{height:.4rem;background:none}.bar i{display:block;height:100%}
.stay{background:var(--stay);fill:var(--stay)}.gone{background:var(--gone)}.was{background:var(--was);fill:var(--was)}
.key{display:inline-block;width:.7rem;height:.7rem;border-radius:.15rem;margin:0 .3rem 0 .9rem;vertical-align:-.05rem}
.key:first-child{margin-left:0}
details{margin:.4rem 0}summary{cursor:pointer}
blockquote{margin:.4rem 0 .6rem;padding:.5rem .75rem;background:var(--card);border:1px solid var(--line);
border-radius:.4rem}blockquote p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
blockquote footer{color:var(--soft);font-size:.85rem;overflow-wrap:anywhere}
figure{margin:.75rem 0 1.5rem;overflow-x:auto}
svg{display:block;width:100%;min-width:32rem;height:auto}svg text{fill:var(--soft);font-size:11px}
svg line{stroke:var(--line)}svg .limit{stroke:var(--gone);stroke-dasharray:4 3;stroke-width:1.5}
"""

_WIDTH, _HEIGHT, _FOOT, _HEAD = 720, 150, 22, 14


def render(
    found: Review, *, title: str, max_tokens: int = 0, facts: Sequence[tuple[str, str]] = (), mended: str = ""
) -> str:
    """Return the page.

    Args:
        found: the review of all parts, added up.
        title: the page's heading.
        max_tokens: encode.max_tokens, if it limits the tokens that were counted; 0: it limits something else.
        facts: names and values for the end of the page: files, settings, hashes.
        mended: a sentence on what the rules changed in texts; empty: none.
    """
    splits = _find_splits(found)
    parts = [
        _summarise(found, splits, title, max_tokens, mended),
        _show_splits(found, splits),
        _show_reasons(found, splits),
        _show_classes(found, splits),
        _show_lengths(found, splits, max_tokens),
    ]
    if facts:
        told = "".join(
            f"<tr><th>{_escape(name)}</th><td class=fact>{_escape(value)}</td></tr>" for name, value in facts
        )
        parts.append(f"<h2>Made from</h2><div class=wide><table><tbody>{told}</tbody></table></div>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _summarise(found: Review, splits: Sequence[str], title: str, max_tokens: int, mended: str) -> str:
    came, stayed = _total(found, splits, review.CLASSES_IN), _total(found, splits, review.CLASSES)
    tiles = [
        (f"{came:,}", "records came in"),
        (f"{stayed:,}", f"stayed: {_percent(stayed, came)}"),
        (f"{came - stayed:,}", f"were set aside: {_percent(came - stayed, came)}"),
    ]
    if max_tokens:
        full, samples = _total(found, splits, review.FULL), _total(found, splits, review.TOKENS)
        tiles.append((_percent(full, samples), f"of the samples fill encode.max_tokens = {max_tokens:,}"))
    shown = "".join(f"<div class=tile><b>{number}</b><span>{told}</span></div>" for number, told in tiles)
    change, label, split = max(_find_changes(found, splits), default=(0.0, "", ""))
    balance = "The shares of the classes are as they came in."
    if change >= 0.0005:
        name = _escape(label) if label else "records without a known class"
        points = f"{100 * change:.1f} percentage points"
        balance = f"The share that changed most is that of {name} in {_escape(split)}, by {points}."
    reasons = _sum_reasons(found, splits)
    most = f" The most frequent reason is: {_escape(reasons[0][0])} ({reasons[0][1]:,})." if reasons else ""
    told = f"{balance}{most} {_escape(mended)}".strip()
    return f"<header><h1>{_escape(title)}</h1><div class=tiles>{shown}</div><p>{told}</p></header>"


def _show_splits(found: Review, splits: Sequence[str]) -> str:
    rows = []
    for split in splits:
        came, stayed = (sum(found.take(what, split).values()) for what in (review.CLASSES_IN, review.CLASSES))
        gone = came - stayed
        bar = f"<div class=bar>{_bar('stay', stayed, came)}{_bar('gone', gone, came)}</div>"
        rows.append(_row(_escape(split), [f"{came:,}", f"{stayed:,}", f"{gone:,}", _percent(stayed, came)], bar))
    keys = _key("stay", "stayed") + _key("gone", "set aside")
    heads = ["split", "came in", "stayed", "set aside", "share that stayed"]
    return f"<h2>How many stayed</h2><p class=soft>{keys}</p>{_table(heads, rows)}"


def _show_reasons(found: Review, splits: Sequence[str]) -> str:
    reasons = _sum_reasons(found, splits)
    if not reasons:
        return "<h2>Why records were set aside</h2><p>None was.</p>"
    most = max(number for _, number in reasons)
    rows, examples = [], []
    for reason, total in reasons:
        cells = [f"{found.counts[review.RECORDS, split, reason]:,}" for split in splits]
        rows.append(_row(_escape(reason), [*cells, f"{total:,}"], f"<div class=bar>{_bar('gone', total, most)}</div>"))
        if shown := found.examples.get(reason):
            summary = f"{_escape(reason)}: the first {len(shown)}" if total > len(shown) else _escape(reason)
            quotes = "".join(map(_show_example, shown))
            examples.append(f"<details><summary>{summary}</summary>{quotes}</details>")
    heading = f"<h3>Examples</h3>{''.join(examples)}" if examples else ""
    return (
        "<h2>Why records were set aside</h2><p class=soft>A record counts for the first rule that it breaks, and "
        f"stands in quarantine.jsonl.</p>{_table(['reason', *splits, 'all'], rows)}{heading}"
    )


def _show_example(example: Example) -> str:
    label = f", class {_escape(example.label)}" if example.label else ""
    where = f"{_escape(example.file)}, row {example.row:,} ({_escape(example.split)}){label}"
    return f"<blockquote><p>{_escape(example.text)}</p><footer>{where}</footer></blockquote>"


def _show_classes(found: Review, splits: Sequence[str]) -> str:
    tables = []
    for split in splits:
        before, after = found.take(review.CLASSES_IN, split), found.take(review.CLASSES, split)
        came, stayed = sum(before.values()), sum(after.values())
        ordered = sorted(before, key=lambda label: (label == NO_CLASS, -before[label], label))
        shares = [(_share(before[label], came), _share(after.get(label, 0), stayed)) for label in ordered]
        widest = max(map(max, shares), default=0.0)
        rows = []
        for label, (was, now) in list(zip(ordered, shares, strict=True))[:CLASSES_AT_MOST]:
            name = _escape(label) if label else "<span class=soft>none, or unknown</span>"
            cells = [f"{before[label]:,}", f"{after.get(label, 0):,}", f"{100 * was:.1f}%", f"{100 * now:.1f}%"]
            bars = f"<div class='bar thin'>{_bar('was', was, widest)}</div>"
            bars += f"<div class='bar thin'>{_bar('stay', now, widest)}</div>"
            rows.append(_row(name, [*cells, _sign(now - was)], bars))
        if rest := ordered[CLASSES_AT_MOST:]:
            sums = [sum(counts.get(label, 0) for label in rest) for counts in (before, after)]
            rows.append(_row(f"{len(rest):,} more", [*(f"{number:,}" for number in sums), "", "", ""], ""))
        heads = ["class", "came in", "stayed", "share before", "share after", "points"]
        tables.append(f"<h3>{_escape(split)}</h3>{_table(heads, rows)}")
    keys = _key("was", "share of what came in") + _key("stay", "share of what stayed")
    return f"<h2>Is the balance of the classes changed?</h2><p class=soft>{keys}</p>{''.join(tables)}"


def _show_lengths(found: Review, splits: Sequence[str], max_tokens: int) -> str:
    keys = _key("was", "came in") + _key("stay", "stayed")
    parts = [f"<h2>How long the texts are</h2><p class=soft>{keys}; the scale of lengths is logarithmic</p>"]
    for split in splits:
        before, after = found.take(review.CHARACTERS_IN, split), found.take(review.CHARACTERS, split)
        parts.append(_draw(f"{split}: records by characters", before, after))
        tokens = found.take(review.TOKENS, split)
        told = f"{split}: samples by tokens"
        full, samples = sum(found.take(review.FULL, split).values()), sum(tokens.values())
        if full:
            told += f"; {full:,} of {samples:,} fill encode.max_tokens = {max_tokens:,}: longer texts were cut"
        elif max_tokens:
            told += f"; none reaches encode.max_tokens = {max_tokens:,}, so none was cut"
        parts.append(_draw(told, {}, tokens, max_tokens))
    return "".join(parts)


def _draw(told: str, before: Mapping[str, int], after: Mapping[str, int], limit: int = 0) -> str:
    """Draw a histogram over the bins of EDGES: what came in behind what stayed; a line at the limit."""
    edges = [int(edge) for edge in EDGES]
    filled = [edges.index(int(edge)) for edge in {**before, **after}]
    if not filled:
        return ""
    first, last = min(filled), max(filled)
    step = _WIDTH / (last - first + 1)
    most = max([*before.values(), *after.values()])
    floor = _HEAD + _HEIGHT
    marks = [f'<line x1="0" y1="{floor}" x2="{_WIDTH}" y2="{floor}"/>', f'<text x="0" y="10">{most:,}</text>']
    for number in range(first, last + 1):
        left, edge = (number - first) * step, str(edges[number])
        told_bin = f"{edges[number]:,} to {edges[number + 1] - 1:,}"
        for name, counts, inset in (("was", before, 1.0), ("stay", after, 1.0 if not before else step / 5)):
            if count := counts.get(edge, 0):
                height = max(_HEIGHT * count / most, 1)
                marks.append(
                    f'<rect class="{name}" x="{left + inset:.1f}" y="{floor - height:.1f}" '
                    f'width="{max(step - 2 * inset, 1):.1f}" height="{height:.1f}" rx="2"><title>{told_bin}: {count:,}'
                    "</title></rect>"
                )
        if (number - first) % max(1, -(-(last - first + 1) // 12)) == 0:
            marks.append(f'<text x="{left + 1:.1f}" y="{floor + 15}">{edges[number]:,}</text>')
    if limit and edges[first] <= limit < edges[last + 1]:
        place = max(number for number in range(first, last + 1) if edges[number] <= limit)
        x = (place - first + (limit - edges[place]) / (edges[place + 1] - edges[place])) * step
        marks.append(f'<line class="limit" x1="{x:.1f}" y1="{_HEAD}" x2="{x:.1f}" y2="{floor}"/>')
    head = f'<svg viewBox="0 0 {_WIDTH} {floor + _FOOT}" role="img" aria-label="{_escape(told)}">'
    return f"<figure><figcaption>{_escape(told)}</figcaption>{head}{''.join(marks)}</svg></figure>"


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
    """A share with one decimal; never 0.0% of some, nor 100.0% of not all."""
    told = f"{100 * _share(number, of_all):.1f}%"
    if number and told == "0.0%":
        return "&lt;0.1%"
    return "&gt;99.9%" if number != of_all and told == "100.0%" else told


def _sign(change: float) -> str:
    told = f"{100 * change:+.1f}"
    return "0.0" if told in ("+0.0", "-0.0") else told.replace("-", "\N{MINUS SIGN}")


def _key(name: str, told: str) -> str:
    return f'<span class="key {name}"></span>{told}'


def _table(heads: Sequence[str], rows: Iterable[str]) -> str:
    """A table of rows from `_row`; the first head is that of the names."""
    cells = "".join(f"<th class=n>{_escape(head)}</th>" for head in heads[1:])
    head = f"<thead><tr><th>{_escape(heads[0])}</th>{cells}<th></th></tr></thead>"
    return f"<div class=wide><table>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _row(name: str, cells: Iterable[str], bars: str) -> str:
    numbers = "".join(f"<td class=n>{cell}</td>" for cell in cells)
    return f"<tr><th>{name}</th>{numbers}<td class=bars>{bars}</td></tr>"


def _bar(name: str, number: float, of_all: float) -> str:
    return f'<i class={name} style="width:{100 * _share(number, of_all):.2f}%"></i>' if number else ""


def _escape(text: str) -> str:
    """Return text for HTML: markup is shown as it stands, and what is invisible by its number."""
    seen = UNSEEN.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return html.escape(seen.encode("utf-8", "backslashreplace").decode())
