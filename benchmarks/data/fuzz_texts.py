"""What must hold of texts, however odd: the checks of screening, of its review, and of tables that are written.

An input is texts: \\x1e stands between records, and the first byte of each chooses its class and how often the rest is
repeated. Like `fuzz_checks.py`, these checks return in silence or raise what they found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
from fuzz_checks import Choice, check_masked, check_screening, read_all

from unisono.config.sections import Data
from unisono.data.encoding.parts import add_reviews, write_part
from unisono.data.ingest.column_batch import ColumnBatch
from unisono.data.ingest.read import Record, read_texts, take_records
from unisono.data.screening import near_duplicates as near
from unisono.data.screening import review
from unisono.data.screening.decisions import Decisions, StagedBatch
from unisono.data.screening.report_page import render
from unisono.data.screening.review import Review
from unisono.data.screening.rules import PERSONAL, UNSEEN, Examiner, describe_treatments, mask_all
from unisono.data.screening.screen import SPLITS
from unisono.data.write import write_table

LABELS = ("", "a", "b", "<b>", "\u00e4\u202e", "a\0", "=c", "\ud800")
MOST, LONG = 2**12, 2**15  # characters: few texts are long, for those take long
SHEET_RECORDS = 3
TAGS = (
    "html head meta title style body header h1 h2 h3 div b span p table thead tr th tbody td details summary "
    "blockquote footer figure figcaption svg line rect text i"
)
DATA = Data()
_CELL_THAT_RUNS = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def make_records(content: bytes) -> list[tuple[str, str]]:
    """Return the texts of an input, each with its class."""
    found = []
    for entry in content.split(b"\x1e"):
        first = entry[0] if entry else 0
        text = entry[1:].decode("utf-8", "surrogateescape")
        most = LONG if first & 0b0011_1000 == 0b0011_1000 else MOST
        times = (1, 1, 7, most)[first >> 6]
        found.append(((text * times)[:most], LABELS[first & 7]))
    return found


def check_screen(content: bytes, folder: Path) -> None:
    """Rules and comparisons of texts."""
    _screen(Choice(content), folder)


def check_review(content: bytes, folder: Path) -> None:
    """What is told of screening, and texts in tables."""
    choice = Choice(content)
    decided = _screen(choice, folder)
    if not decided.count_kept("train"):
        return  # a preparation ends here
    decided.choose_labels(())
    paths = [folder / f"part-{number}" for number in range(len(decided.batches))]
    for path, batch in zip(paths, decided.batches, strict=True):
        write_part(path, decided.staged[batch.staged], batch.number, decided.fates(batch), _Letters())
    whole = add_reviews(paths)
    assert add_reviews(paths[::-1]).to_dict() == whole.to_dict(), "the order of parts changes the review"
    assert Review.from_dict(json.loads(json.dumps(whole.to_dict()))).to_dict() == whole.to_dict()
    _check_counts(whole, decided)
    texts = [text for one in decided.batches for text in _list_texts(decided, one)]
    _check_examples(whole, texts)
    page = render(whole, title=texts[0][:50], mended=describe_treatments(choice.screen))
    _check_page(page)
    _check_tables(texts, folder)


def _screen(choice: Choice, folder: Path) -> Decisions:
    """Screen the records of an input, and look at each text by itself."""
    column_batches: list[tuple[str, list[ColumnBatch]]] = []
    given: list[Record] = []
    listed = make_records(choice.rest)
    for start in range(0, len(listed), SHEET_RECORDS):
        some = listed[start : start + SHEET_RECORDS]
        columns = {"text": [text for text, _ in some], "label": [label for _, label in some]}
        column_batch = ColumnBatch(name=f"file {start % 2}", rows=len(some), columns=columns)
        column_batches.append((column_batch.name, [column_batch]))
        given += take_records(column_batch, DATA)
    splits = [SPLITS[number % 3 if choice.number & 1 else 0] for number in range(len(column_batches))]
    decided = check_screening(column_batches, splits, given, DATA, choice.screen, folder)
    texts = [record.text for record in given]
    sketches = near.sketch(texts)
    assert np.array_equal(sketches[:1], near.sketch(texts[:1])), "a sketch depends on other texts"
    examiner = Examiner(choice.screen, [label for label in LABELS if label.isalpha()])
    for record in given[:8]:
        check_masked(examiner.examine(record)[0].text, choice.screen)
    return decided


def _list_texts(decided: Decisions, batch: StagedBatch) -> list[str]:
    return decided.staged[batch.staged].batch(batch.number).column("text").to_pylist()


class _Letters:
    """An encoder that gives each text as many tokens as it has letters, or one."""

    vocabulary_size, padding = 2, 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.encode_marked(texts)[0]

    def encode_marked(self, texts: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        return [np.ones(max(len(text), 1), np.int32) for text in texts], np.zeros(len(texts), bool)

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def _check_counts(whole: Review, decided: Decisions) -> None:
    """Every record is counted once, under what became of it."""
    total, kept = len(decided.records.reasons), int(decided.records.kept.sum())
    for what, number in (
        (review.RECORDS, total),
        (review.CLASSES_IN, total),
        (review.CHARACTERS_IN, total),
        (review.CLASSES, kept),
        (review.CHARACTERS, kept),
        (review.TOKENS, kept),
    ):
        counted = sum(count for split in SPLITS for count in whole.take(what, split).values())
        assert counted == number, f"{what}: {counted} counted of {number}"


def _check_examples(whole: Review, texts: Sequence[str]) -> None:
    """Examples are beginnings of the texts, and show no personal detail of one that was refused for it."""
    for reason, shown in whole.examples.items():
        for one in shown:
            beginning = one.text.removesuffix("…") if len(one.text) > review.EXAMPLE_CHARACTERS else one.text
            wholes = [mask_all(text.strip()) if reason in PERSONAL else text.strip() for text in texts]
            assert any(text.startswith(beginning) for text in wholes), f"{reason}: {one.text!r}"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


def _check_page(page: str) -> None:
    """The page has the tags that it has of its own, and nothing that cannot be seen."""
    page.encode()
    tags = _Tags()
    tags.feed(page)
    tags.close()
    foreign = tags.found - set(TAGS.split())
    assert not foreign, f"tags came from the data: {foreign}"
    unseen = UNSEEN.search(page)
    assert not unseen, f"not to be seen: {unseen}"


def _is_with_quotes(cell: str, text: str) -> bool:
    """Whether a cell is the text, with single quotes added and nothing else."""
    rest = iter(text)
    wanted = next(rest, None)
    for character in cell:
        if character == wanted:
            wanted = next(rest, None)
        elif character != "'":
            return False
    return wanted is None


def _check_tables(texts: Sequence[str], folder: Path) -> None:
    """Tables hold the texts that were given; in CSV and TSV none runs."""
    table = pa.table({"label": pa.array(["x"] * len(texts)), "text": pa.array(texts, pa.string())})
    for suffix in (".jsonl", ".parquet", ".csv", ".tsv"):
        path = folder / f"table{suffix}"
        write_table(table, path, suffix)
        back = [record.text for record in read_all(path, DATA, 64)]
        assert read_texts(path, DATA).texts == tuple(back)
        if suffix in (".jsonl", ".parquet"):
            assert back == list(texts), f"{suffix}: other texts came back"
            continue
        assert len(back) == len(texts), f"{suffix}: {len(texts)} rows written, {len(back)} read"
        for cell, text in zip(back, texts, strict=True):
            flat = re.sub("[\t\r\n]", " ", text) if suffix == ".tsv" else text
            assert _is_with_quotes(cell, flat), f"{suffix}: {text!r} became {cell!r}"
            runs = _CELL_THAT_RUNS.match(cell) and not re.fullmatch(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?", cell)
            assert not runs, f"{suffix}: runs: {cell!r}"
