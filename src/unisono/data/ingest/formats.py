"""Which format a file has: by the recipe, or by its name.

Owns the names of formats. `delimited.py` and `parquet.py` own how each is read.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

from unisono.config.sections import Data
from unisono.data.ingest.compressed import SUFFIXES as COMPRESSED
from unisono.data.ingest.compressed import find_compression
from unisono.errors import DataError

Format: TypeAlias = Literal["csv", "tsv", "jsonl", "parquet", "folder", "dataset"]

SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}


def find_suffix_format(name: str, told: str, data: Data) -> Format:
    """Return the format of a file from its name without the suffix of a compression.

    Raises:
        DataError: the name does not show the format.
    """
    if data.format == "folder":
        raise DataError(f"{told} is a file, but data.format = 'folder'. Give a folder with one folder per class.")
    if data.format != "auto":
        return "jsonl" if data.format == "json" else data.format  # a file's beginning shows which of both it is
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in SUFFIXES:
        known, packed = ", ".join(SUFFIXES), ", ".join(COMPRESSED)
        raise DataError(
            f"{told}: known are {known} (text also with {packed}) and folders. Rename it, or set data.format."
        )
    return SUFFIXES[suffix]


def find_format(path: Path, data: Data) -> Format:
    """Return the format of an existing file or folder.

    Raises:
        DataError: there is no such file, or its name does not show its format.
    """
    if not path.exists():
        raise DataError(f"{str(path)!r}: no such file. Paths in a recipe are relative to its folder.")
    return "folder" if path.is_dir() else find_suffix_format(find_compression(path.name)[0], repr(str(path)), data)
