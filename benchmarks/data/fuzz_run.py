"""One input through one check: what the fuzzer, a repeated finding and the tests have in common.

Owns the list of checks by target, and the folder in which an input is tried.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fuzz_checks import PLAIN, check_compressed, check_file, check_folder, check_parquet
from fuzz_inputs import PACKED
from fuzz_texts import check_review, check_screen

from unisono.errors import UserError

CHECKS: dict[str, Callable[[bytes, Path], None]] = {
    **{kind: partial(check_file, kind=kind) for kind in PLAIN},
    **{packing: partial(check_compressed, packing=packing) for packing in PACKED},
    "parquet": check_parquet,
    "folder": check_folder,
    "screen": check_screen,
    "review": check_review,
}
MEMORY = Path("/dev/shm")
SCRATCH = str(MEMORY) if MEMORY.is_dir() else None
"""Folders of inputs are made in memory where there is such a place."""


def run_check(target: str, content: bytes) -> bool:
    """Try an input; return whether it was refused. Raises what is found."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SCRATCH) as folder:
        try:
            CHECKS[target](content, Path(folder))
        except UserError:
            return True
    return False
