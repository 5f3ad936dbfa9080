"""The run folder: the names of its files, and when a folder may be used.

    recipe.toml  fingerprint.json  metrics.jsonl  curves.svg  summary.json  checkpoints/  model/  hangs/

Owns names and the choice of a folder. The modules that write the files define what they hold.
"""

from __future__ import annotations

from pathlib import Path

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.errors import RunFolderError
from unisono.storage.model_files import read_model_facts

RUNS = Path("runs")
FACTS = "unisono.json"
"""In a model folder: the recipe, and other facts that prediction needs."""


def new_folder(name: str, given: str | Path | None) -> Path:
    """The folder of a new run: the given one, which must not exist, or `runs/NAME-001` and so on, the first that is
    free."""
    if given is not None:
        path = Path(given)
        if path.exists():
            raise RunFolderError(
                f"--run-folder {str(path)!r} exists. Give another folder, go on with what is there (--resume), or "
                f"remove it (rm -r {path})."
            )
        return path
    return RUNS / f"{name}-{_newest_number(name) + 1:03d}"


def choose_folder(name: str, given: str | Path | None, *, resume: bool | str) -> Path:
    """The folder of a run: a new one, an old one to resume, or with "auto" whichever exists.

    "auto" takes the given folder, whatever is in it, or the newest `runs/NAME-…` if that run has not ended.
    """
    if resume == "auto":
        newest = _newest_number(name)
        path = Path(given) if given is not None else RUNS / f"{name}-{newest:03d}"
        if path.exists() and (given is not None or not (path / "summary.json").exists()):
            if (
                any(not inside.name.startswith(".") for inside in path.iterdir())
                and not (path / "recipe.toml").exists()
            ):
                raise RunFolderError(f"--run-folder {str(path)!r} is no run folder. Give another one.")
            return path
        return new_folder(name, given)
    return old_folder(name, given) if resume else new_folder(name, given)


def old_folder(name: str, given: str | Path | None) -> Path:
    """The folder of a run to resume: the given one, or the newest `runs/NAME-…`."""
    if given is None and not _newest_number(name):
        raise RunFolderError(
            f"--resume: there is no run folder runs/{name}-…. Name one with --run-folder, or start without --resume."
        )
    path = Path(given) if given is not None else RUNS / f"{name}-{_newest_number(name):03d}"
    if not (path / "checkpoints").is_dir():
        raise RunFolderError(
            f"--resume: {str(path)!r} has no checkpoints. Name the folder of a run that has with --run-folder, or "
            "start without --resume."
        )
    return path


def model_folder(run: str | Path) -> Path:
    """The finished model of a run; `run` may be the model's folder itself."""
    if (Path(run) / FACTS).is_file():
        return Path(run)
    path = Path(run) / "model"
    if not path.is_dir():
        raise RunFolderError(
            f"{str(run)!r} has no finished model (no folder {str(path)!r}). Give the folder of a run that has ended."
        )
    return path


def read_recipe(run: str | Path) -> Recipe | None:
    """The recipe of a run's finished text classifier; None where there is no such model."""
    known = [path for path in (Path(run) / FACTS, Path(run) / "model" / FACTS) if path.is_file()]
    return recipes.check(read_model_facts(known[0])["recipe"]) if known else None


def _newest_number(name: str) -> int:
    numbers = [path.name.removeprefix(f"{name}-") for path in RUNS.glob(f"{name}-*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)
