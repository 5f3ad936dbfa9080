"""A warm start: a new model begins with the weights of a finished run.

Owns which weights are copied: those of equal name and shape, and of a classifier's head the rows of the classes that
both runs have. The others keep their initial values. Changes only the model it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisono.backends.backend import Backend
from unisono.engine.replica import tensors_sha256
from unisono.errors import ModelError
from unisono.storage.files import load_tensors
from unisono.storage.model_files import read_model_facts
from unisono.storage.run_folder import FACTS, SUMMARY, model_folder
from unisono.tasks.task import Task

_SHOWN = 5
"""Names in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """Where the first weights come from. facts: plain values for the run's lineage. notice: what was copied."""

    facts: Mapping[str, Any]
    notice: str

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides the first weights, beside the recipe."""
        return {"start_from": str(self.facts["weights_sha256"])}


def start_from(run: str, backend: Backend, task: Task, labels: Sequence[str]) -> WarmStart:
    """Copy the weights of a finished run into a model that has just been built.

    labels: names of the model's classes, in order; () where it has none.

    Raises:
        RunFolderError: there is no finished model in the folder.
        DamagedError: its weights cannot be read.
        ModelError: it has no weights of this model.
    """
    folder = model_folder(run)
    given = load_tensors(folder / "model.safetensors")
    before: list[str] = read_model_facts(folder / FACTS).get("labels", [])
    classes = [(place, before.index(name)) for place, name in enumerate(labels) if name in before]
    mine = backend.tensors()
    with torch.no_grad():
        copied = [
            name
            for name, value in mine.items()
            if name in given
            and (
                _copy_rows(value, given[name], classes)
                if name in task.class_rows and labels
                else _copy(value, given[name])
            )
        ]
    if not copied:
        raise ModelError(
            f"'train.start_from' = {run!r}: no weight in it has the name and shape of one of this model's. It has "
            f"{_list(list(given))}; this model {_list(list(mine))}. Name a run of the same model."
        )
    written = Path(run) / SUMMARY
    summary = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    facts = {
        "start_from": run,
        "weights_sha256": tensors_sha256(given),
        "steps": summary.get("steps"),
        "lineage": summary.get("lineage", []),
    }
    fresh = [name for name in mine if name not in copied]
    unused = [name for name in given if name not in mine]
    parts = [f"{len(copied)} of {len(mine)} tensors"]
    if labels and list(labels) != before:
        parts.append(f"{len(classes)} of {len(labels)} classes are in both")
    parts += [f"new: {_list(fresh)}"] if fresh else []
    parts += [f"not used: {_list(unused)}"] if unused else []
    return WarmStart(facts=facts, notice=f"starting from the weights of {run}: " + "; ".join(parts))


def _copy(value: Tensor, other: Tensor) -> bool:
    if value.shape != other.shape:
        return False
    value.copy_(other)
    return True


def _copy_rows(value: Tensor, other: Tensor, classes: Sequence[tuple[int, int]]) -> bool:
    """Copy the rows of the classes that both have: (row here, row there)."""
    if value.shape[1:] != other.shape[1:] or not classes:
        return False
    for here, there in classes:
        value[here].copy_(other[there])
    return True


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
