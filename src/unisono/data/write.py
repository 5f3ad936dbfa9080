"""Writing tables: CSV, TSV, JSONL, Parquet, by the file's name.

Owns the content of a cell. In CSV and TSV, a text that a spreadsheet would run as a formula is written with a single
quote before it (OWASP, CSV Injection), so that opening the predictions runs nothing that a record contains. So is what
follows a semicolon or a line end within a text: where the semicolon separates cells, it would be a cell of its own.
JSONL and Parquet hold every text unchanged. In JSONL a NaN is null, and an infinite number a text.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pyarrow as pa

from unisono.data.ingest.column_batch import list_values
from unisono.data.ingest.read import as_text
from unisono.errors import DataError
from unisono.storage.files import to_json

FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")

_BLANK = r"[^\S\t\r\n]|[\0\ufeff]"  # a spreadsheet reads on after these; \s has the no-break space
_SIGN = "[-=+@\uff1d\uff0b\uff0d\uff20]"  # the last four are = + - @ in full width
_NUMBER = r"[+-]?+(?:[0-9]++(?:\.[0-9]*+)?+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?+"
_RUN = re.compile(  # possessive, so that a text of many blanks or digits takes no longer than another one
    rf"(?:^|(?<=[;\t\n\r]))(?=(?:{_BLANK})*+\"*+(?:{_BLANK})*+{_SIGN})(?!(?:{_BLANK})*+{_NUMBER}[\s\0\ufeff]*+(?:;|\Z))"
    r"|^(?=[\t\r\n])"
)
"""Where a quote is written: before a formula, unless it is a number."""


def check_target(path: Path) -> None:
    """Raise DataError unless a table can be written there."""
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: no file can have the character NUL in its name. Give another one.")
    if path.suffix not in FORMATS:
        raise DataError(
            f"{str(path)!r}: cannot tell the format to write. Allowed are names that end in {', '.join(FORMATS)}."
        )
    if not path.resolve().parent.is_dir():
        raise DataError(f"{str(path)!r}: there is no folder {str(path.resolve().parent)!r}. Make it first.")


def write_table(table: pa.Table, path: Path, suffix: str) -> None:
    """Write a table in the format of `suffix`, one of FORMATS. Numbers are written so that they read back to the same
    bits; texts, too, except those that a spreadsheet would run."""
    if suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(table, path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix == ".jsonl":
            for values in _list_rows(table):
                named = dict(zip(table.column_names, values, strict=True))
                file.write(to_json(named, ensure_ascii=False, default=str) + "\n")
            return
        plain = suffix == ".csv"
        writer = csv.writer(file) if plain else None
        for row in [tuple(table.column_names), *_list_rows(table)]:
            cells = [_spell(cell) for cell in row]
            if writer:
                writer.writerow(cells)
            else:  # a TSV has no quoting: what would break a row becomes a space
                file.write(
                    "\t".join(cell.replace("\t", " ").replace("\n", " ").replace("\r", " ") for cell in cells) + "\n"
                )


def _list_rows(table: pa.Table) -> list[tuple[object, ...]]:
    """Values of each row; bytes are given as text."""
    columns = [
        [as_text(value)[0] if isinstance(value, bytes) else value for value in list_values(column)]
        for column in table.columns
    ]
    return list(zip(*columns, strict=True))


def _spell(cell: object) -> str:
    """Return the content of a CSV or TSV cell: never a text that begins like a formula, unless it is a number."""
    if cell is None:
        return ""
    return _RUN.sub("'", cell) if isinstance(cell, str) else str(cell)
