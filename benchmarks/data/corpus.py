"""Input of any size for the measurements of preparing: JSONL records made of real texts.

Owns what is in it. A record is a passage of an article of 20 Newsgroups, of some 200 to 2,000 characters, so that its
words are those of real texts; one in twenty repeats an earlier one, one in a thousand is empty. The same size gives
the same bytes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARTICLES = ROOT / "data" / "newsgroups" / "20newsgroups-train.tab"
REPEATS, EMPTIES = 0.05, 0.001
KEPT = 10_000  # of the records written, which may be repeated


def make_corpus(path: Path, size_bytes: int) -> int:
    """Write records until the file has this size; return how many. A file that is there is left as it is."""
    counted = path.with_suffix(".count")
    if path.exists() and counted.exists() and path.stat().st_size >= size_bytes:
        return int(counted.read_text())
    lines = ARTICLES.read_text(encoding="utf-8").split("\n")[3:]
    articles = [line.split("\t", 1) for line in lines if line]
    chosen = random.Random(0)
    written: list[str] = []
    size = count = 0
    with path.open("w", encoding="utf-8") as file:
        while size < size_bytes:
            draw = chosen.random()
            if draw < REPEATS and written:
                line = chosen.choice(written)
            else:
                label, text = chosen.choice(articles)
                passage = "" if draw > 1 - EMPTIES else _cut(text, chosen)
                line = json.dumps({"text": passage, "label": label}) + "\n"
                if len(written) < KEPT:
                    written.append(line)
                else:
                    written[chosen.randrange(KEPT)] = line
            file.write(line)
            size += len(line)
            count += 1
    counted.write_text(str(count))
    return count


def _cut(text: str, chosen: random.Random) -> str:
    """A passage from a random word on, with some words of another place in the middle: hardly any two are equal."""
    length = int(chosen.lognormvariate(6.6, 0.6))
    start, other = chosen.randrange(len(text)), chosen.randrange(len(text))
    return text[start : start + length // 2] + " " + text[other : other + length // 2]
