"""The files of a finished model, checked before they are used.

Owns what is compared: facts with their form, files with the hashes recorded at export, tensors with the module that
they are for. Each fault is named with its remedy: a model that is damaged must not predict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.config.small_files import read_small
from unisono.errors import DamagedError, ModelError
from unisono.storage.files import check_file, file_sha256, load_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

REMEDY = "Restore the folder as it was written."
FILES = "files"
"""In the facts: size and SHA-256 of each other file. Folders of older versions lack it."""


def write_model_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts, with the hashes of all files beside them: the last file of a folder."""
    files = {
        beside.name: {"bytes": beside.stat().st_size, "sha256": file_sha256(beside)}
        for beside in sorted(path.parent.iterdir())
    }
    text = json.dumps({**facts, FILES: files}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_model_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a model; its files are not looked at.

    Raises:
        ModelError: they are missing, or not what was written.
    """
    if not path.exists():
        raise ModelError(f"{str(path.parent)!r} holds no model of unisono (no {path.name}). {REMEDY}")
    try:
        facts = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{str(path)!r} is damaged ({error}). {REMEDY}") from None
    for key, value in ("the file", facts), ("'recipe'", facts.get("recipe") if isinstance(facts, dict) else None):
        if not isinstance(value, dict):
            raise ModelError(f"{str(path)!r} is damaged ({key} is no object but {type(value).__name__}). {REMEDY}")
    return dict(facts)


def check_files(folder: Path, facts: Mapping[str, Any]) -> None:
    """Compare the files of a model with the hashes in its facts.

    Raises:
        DamagedError: names the first file that is missing or altered.
        ModelError: the hashes themselves are damaged.
    """
    try:
        known = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in facts.get(FILES, {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{str(folder)!r}: the recorded hashes are damaged ({error!r}). {REMEDY}") from None
    for name, (size_bytes, sha256) in known.items():
        if Path(name).name != name:
            raise ModelError(
                f"{str(folder)!r}: the recorded hashes name {name!r}, which is not in the folder. {REMEDY}"
            )
        check_file(folder / name, size_bytes, sha256, REMEDY)


def load_weights(module: nn.Module, path: Path, asked_by: str) -> None:
    """Load the weights of a file into a module, if each is one that the module can have learned.

    asked_by: what decides the module's names and shapes, for messages.

    Raises:
        DamagedError: the file is not readable, or a weight is NaN or infinite.
        ModelError: names, shapes or dtypes are not the module's.
    """
    found, wanted = load_tensors(path), module.state_dict()
    if odd := sorted(found.keys() ^ wanted.keys()):
        fault = "is missing" if odd[0] in wanted else "is not in the model"
        raise ModelError(
            f"{str(path)!r}: tensor {odd[0]!r} {fault}, by {asked_by}. They do not belong together. {REMEDY}"
        )
    learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for name, tensor in found.items():
        given, asked = _describe(tensor), _describe(wanted[name])
        if given != asked:
            raise ModelError(
                f"{str(path)!r}: tensor {name!r} is {given}; allowed is {asked}, by {asked_by}. They do not belong "
                f"together. {REMEDY}"
            )
        # an infinity may be a constant of a model, such as a mask; NaN never, and no weight is learned to either
        wrong = ~tensor.isfinite() if name in learned else tensor.isnan()
        if count := int(wrong.sum()):
            raise DamagedError(
                f"{str(path)!r}: tensor {name!r} has {count:,} numbers of {tensor.numel():,} that are NaN or infinite, "
                f"so nothing can be predicted. {REMEDY} Or train again."
            )
    module.load_state_dict(found)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
