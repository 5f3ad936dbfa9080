"""A run's state on disk: `step-00000120/`, whole or absent, the same bytes for any number of workers.

    parameters.safetensors   weights and buffers under the module's own names
    buffers.safetensors      buffers that the module's state_dict leaves out, if there are any
    optimizer.safetensors    optimiser state (and averaged weights) under "slot.parameter"
    state.json               step, early stopping, numerics fingerprint, recipe, SHA-256 of each file

Owns the mapping between a state's content and files, and which of several checkpoints is used. Pickle is neither
written nor read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unisono.errors import DamagedError
from unisono.storage.elsewhere import write_or_rescue
from unisono.storage.files import (
    load_tensors,
    open_sealed,
    remove_folder,
    remove_leftovers,
    save_tensors,
    seal,
    whole_folder,
)

FORMAT = 1
ASIDE = ".damaged"
"""Ending of the name of a checkpoint that was found damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A whole state in the form of a checkpoint: whatever the number of workers, the same names and bytes.

    parameters: the tensors of the module's state_dict. buffers: those that it leaves out. optimizer: "slot.parameter".
    facts: plain values: step, early stopping, and other facts of the run.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint found on disk, its files verified. `facts` is state.json."""

    folder: Path
    facts: Mapping[str, Any]


def write(content: Content, folder: Path, *, keep: int, at: Callable[[str], None] = lambda phase: None) -> Path:
    """Write a state as `folder/step-…`; then remove all but the newest `keep`. `at` is called with what is about to be
    done.

    Raises:
        RunFolderError: it cannot be written. Older files are unchanged.
    """
    path = name_checkpoint(folder, int(content.facts["step"]))
    remove_leftovers(folder)
    with whole_folder(path, at) as part:
        at("parameters")
        save_tensors(part / "parameters.safetensors", content.parameters)
        if content.buffers:
            save_tensors(part / "buffers.safetensors", content.buffers)
        at("optimizer")
        save_tensors(part / "optimizer.safetensors", content.optimizer)
        at("seal")
        seal(part, "state.json", {"format": FORMAT, **content.facts})
    for old in list_checkpoints(folder)[:-keep]:
        at("retire")
        remove_folder(old)
    return path


def write_somewhere(content: Content, run: Path, *, keep: int) -> tuple[Path, str]:
    """Write a state into `run/checkpoints`, or where that cannot be written into another folder, which keeps one.
    Return the checkpoint's path, and why it is elsewhere; "": it is not.

    Raises:
        RunFolderError: no place can be written.
    """

    def write_to(place: Path) -> None:
        write(content, place / "checkpoints", keep=keep if place == run else 1)

    place, why = write_or_rescue(run, write_to)
    return name_checkpoint(place / "checkpoints", int(content.facts["step"])), why


def name_checkpoint(folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.suffix != ASIDE)


def verify(path: Path) -> Saved:
    """Open a checkpoint and compare every file with its SHA-256.

    Raises:
        DamagedError: names the file.
    """
    facts = open_sealed(path, "state.json")
    if facts.get("format") != FORMAT:
        raise DamagedError(f"{str(path)!r} has format {facts.get('format')!r}; this version reads {FORMAT}.")
    step, tables = facts.get("step"), [facts.get(name, {}) for name in ("recipe", "fingerprint")]
    if not isinstance(step, int) or step < 0 or not all(isinstance(table, dict) for table in tables):
        raise DamagedError(f"{str(path / 'state.json')!r} is not what was written. Delete the folder {str(path)!r}.")
    return Saved(folder=path, facts=facts)


def newest(folder: Path) -> tuple[Saved | None, list[DamagedError]]:
    """The newest checkpoint that is whole, verified; None if there is none. And what was wrong with newer ones."""
    faults: list[DamagedError] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return verify(path), faults
        except DamagedError as error:
            faults.append(error)
    return None, faults


def set_aside(folder: Path, after: Saved | None) -> list[Path]:
    """Rename the (damaged) checkpoints newer than `after`, so that none of them is used again; return where they
    are."""
    moved = []
    for path in list_checkpoints(folder):
        if after is None or path.name > after.folder.name:
            target = path.with_name(path.name + ASIDE)
            shutil.rmtree(target, ignore_errors=True)
            moved.append(path.rename(target))
    return moved


def read(saved: Saved) -> Content:
    """Load a verified checkpoint.

    Raises:
        DamagedError: a file is not readable as safetensors.
    """
    others = saved.folder / "buffers.safetensors"
    return Content(
        parameters=load_tensors(saved.folder / "parameters.safetensors"),
        buffers=load_tensors(others) if others.exists() else {},
        optimizer=load_tensors(saved.folder / "optimizer.safetensors"),
        facts=saved.facts,
    )
