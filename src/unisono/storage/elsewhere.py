"""Where a run's results are kept when its own folder cannot be written any more.

Owns the choice of the place: beside the run folder, in the current folder, or in the system's folder for temporary
files, the first that can be written. Its name is new, and the same for all forked workers of a run.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from unisono.errors import RunFolderError

_OURS = uuid.uuid4().hex


def write_or_rescue(folder: Path, write: Callable[[Path], object]) -> tuple[Path, str]:
    """Call `write` with the run folder, or where it cannot be written with another one. Return the folder that it has
    written to, and why it is another one; "": it is not.

    Raises:
        RunFolderError: no place can be written; of the run folder.
    """
    try:
        write(folder)
    except RunFolderError as error:
        for place in _list_places(folder):
            try:
                place.mkdir(mode=0o700, exist_ok=True)
                write(place)
            except (OSError, RunFolderError):  # the first error is the one to report
                for made in (place / "checkpoints", place):
                    with suppress(OSError):
                        made.rmdir()
            else:
                return place, str(error)
        raise
    return folder, ""


def _list_places(folder: Path) -> list[Path]:
    unique = hashlib.sha256(f"{_OURS} {folder.absolute()}".encode()).hexdigest()[:12]
    parents = (folder.absolute().parent, Path.cwd(), Path(tempfile.gettempdir()))
    return [parent / f"{folder.name}-rescued-{unique}" for parent in dict.fromkeys(parents)]
