"""`unisono checkpoints`: a run's checkpoints on disk, and whether they are whole.

Owns the table. `storage/checkpoints.py` owns what a checkpoint is, and how it is verified.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from unisono.errors import DamagedError, RunFolderError
from unisono.storage import checkpoints
from unisono.tracking.terminal import print_now


def list_checkpoints(run: str | Path, *, verify: bool = False, as_json: bool = False) -> bool:
    """Print a run's checkpoints, oldest first; with `verify`, compare every file with its SHA-256. Return whether all
    are whole, as far as that was checked.

    Raises:
        RunFolderError: the run has none.
    """
    folder = Path(run) / "checkpoints"
    rows = [_describe(path, verify=verify) for path in sorted(folder.glob("step-*")) if path.is_dir()]
    if not rows:
        raise RunFolderError(
            f"{str(run)!r} has no checkpoints. Name the folder of a run that has; the key checkpoint.every_steps says "
            "how often they are written."
        )
    if as_json:
        for row in rows:
            print(json.dumps(row))
    else:
        print_now("    step  written (UTC)             MB  state")
        for row in rows:
            print_now(f"{row['step']:>8}  {row['written']}  {row['bytes'] / 1e6:>11,.1f}  {row['state']}")
        print_now(
            f"the newest is {rows[-1]['path']}" if verify else "give --verify to compare every file with its SHA-256"
        )
    return not any(row["fault"] for row in rows)


def _describe(path: Path, *, verify: bool) -> dict[str, Any]:
    aside = path.suffix == checkpoints.ASIDE
    fault, state = "", "set aside: it was found damaged" if aside else "complete"
    if verify and not aside:
        try:
            checkpoints.verify(path)
            state = "verified"
        except DamagedError as error:
            fault = str(error)
            state = f"damaged: {error}"
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return {
        "step": int(path.name.removesuffix(checkpoints.ASIDE).removeprefix("step-")),
        "path": str(path),
        "written": f"{written:%Y-%m-%d %H:%M:%S}",
        "bytes": sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        "state": state,
        "fault": fault,
    }
