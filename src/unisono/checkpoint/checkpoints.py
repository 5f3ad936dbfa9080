"""A run's state on disk: `step-00000120/`, whole or absent, the same bytes for any number of workers.

    parameters.safetensors   weights and buffers under the module's own names
    buffers.safetensors      buffers that the module's state_dict leaves out, where there are such
    optimizer.safetensors    optimiser state (and averaged weights) under "slot.parameter"
    state.json               step, early stopping, numerics fingerprint, recipe, SHA-256 of each file

Owns the mapping between state and files. Pickle is neither written nor read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unisono.engine.state import TrainState
from unisono.errors import DamagedError
from unisono.files import load_tensors, open_sealed, save_tensors, seal, whole_folder

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint found on disk, its files verified. `facts` is state.json."""

    folder: Path
    facts: Mapping[str, Any]


def save(state: TrainState, folder: Path, *, facts: Mapping[str, Any], keep: int) -> Path:
    """Write the state as `folder/step-…`; every worker calls this, worker 0 writes. Remove all but the newest
    `keep`."""
    path = folder / f"step-{state.step:08d}"
    optimizer = state.optimizer_tensors()
    if state.exchange.rank == 0:
        tensors, everything = state.replica.tensors(), state.replica.all_tensors()
        with whole_folder(path) as part:
            save_tensors(part / "parameters.safetensors", tensors)
            if others := {name: value for name, value in everything.items() if name not in tensors}:
                save_tensors(part / "buffers.safetensors", others)
            save_tensors(part / "optimizer.safetensors", optimizer)
            progress = {
                "step": state.step,
                "best_score": state.best_score,
                "best_step": state.best_step,
                "evaluations_since_best": state.evaluations_since_best,
            }
            seal(part, "state.json", {"format": FORMAT, **progress, **facts})
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def newest(folder: Path) -> Saved | None:
    """The newest checkpoint, verified; None if there is none.

    Raises:
        DamagedError: it is damaged; names the file.
    """
    found = list_checkpoints(folder)
    if not found:
        return None
    facts = open_sealed(found[-1], "state.json")
    if facts.get("format") != FORMAT:
        raise DamagedError(f"{str(found[-1])!r} has format {facts.get('format')!r}; this version reads {FORMAT}.")
    return Saved(folder=found[-1], facts=facts)


def restore(state: TrainState, saved: Saved) -> None:
    """Put a checkpoint into a state that was built for the same recipe, under any number of workers."""
    tensors = load_tensors(saved.folder / "parameters.safetensors")
    others = saved.folder / "buffers.safetensors"
    if others.exists():
        tensors |= load_tensors(others)
    try:
        state.restore(tensors, load_tensors(saved.folder / "optimizer.safetensors"))
    except (KeyError, RuntimeError) as error:
        raise DamagedError(
            f"{str(saved.folder)!r} does not fit this model: {error}. Resume with the recipe that began the run."
        ) from error
    state.step = int(saved.facts["step"])
    state.best_score = saved.facts["best_score"]
    state.best_step = int(saved.facts["best_step"])
    state.evaluations_since_best = int(saved.facts["evaluations_since_best"])
