"""The run folder: the names of its files, and when a folder may be used.

    recipe.toml  fingerprint.json  metrics.jsonl  curves.svg  summary.json  checkpoints/  model/  hangs/

Owns names and the choice of a folder. The modules that write the files define what they hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.config.sections import TEXT
from unisono.errors import RecipeError, RunFolderError
from unisono.storage.model_files import read_model_facts
from unisono.storage.run_lock import ANSWER, RUNNING, WANTED

RUNS = Path("runs")
_FREE = {("model", "dropout"), ("model", "attention_dropout"), ("model", "freeze"), ("model", "folder")}
"""Keys of a model that may differ from those of the run that it starts from."""
_FIRST = {"recipe.toml", "fingerprint.json", RUNNING}
"""What is in the folder of a run before its first step."""
SUMMARY = "summary.json"
FACTS = "unisono.json"
"""In a model folder: the recipe, and other facts that prediction needs."""


def new_folder(name: str, given: str | Path | None, *, make: bool) -> Path:
    """The folder of a new run: the given one, which must not exist, or `runs/NAME-001` and so on, the first that is
    free.

    Args:
        make: make it at once, so that each of several runs that start together has a folder of its own. False for a
            worker of several that choose alike; worker 0 makes the folder, with `begin`.

    Raises:
        RunFolderError: the given one exists, or it cannot be made.
    """
    numbered = (RUNS / f"{name}-{number:03d}" for number in itertools.count(_newest_number(name) + 1))
    for path in numbered if given is None else (Path(given),):
        try:
            if make:
                path.mkdir(parents=True)
            elif path.exists():
                continue
        except FileExistsError:  # another run may have just made it
            continue
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunFolderError(
                f"--run-folder {str(path)!r} cannot be made: {reason}. Give another folder, or make the place writable."
            ) from None
        return path
    raise _taken(path)


def begin(folder: Path) -> None:
    """Make a new run's folder, and refuse one that another run has made meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "recipe.toml").touch(exist_ok=False)
    except FileExistsError:
        raise _taken(folder) from None


@contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Afterwards the folder is removed if nothing is in it: the run was refused before it began."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _taken(path: Path) -> RunFolderError:
    return RunFolderError(
        f"--run-folder (run=…) {str(path)!r} exists. Give another folder, go on with what is there (--resume, "
        f"resume=True), or remove it (rm -r {path})."
    )


def remove_begun(folder: Path) -> str:
    """Remove a run folder in which nothing has happened yet; one with more in it stays. Return what is left, for a
    message."""
    if not folder.exists():
        return "no run folder was left behind."
    names = {path.name for path in folder.iterdir()}
    with suppress(OSError):
        if all(name in _FIRST or name.startswith((WANTED, ANSWER)) for name in names):
            for name in names:
                (folder / name).unlink()
            folder.rmdir()
            return "no run folder was left behind."
    return f"{str(folder)!r} is as it was before. Go on with --resume (resume=True)."


def choose_folder(name: str, given: str | Path | None, *, resume: bool | str, make: bool) -> Path:
    """The folder of a run: a new one, an old one to resume, or with "auto" whichever exists.

    "auto" takes the given folder, whatever is in it, or the newest `runs/NAME-…` if that run has not ended.
    """
    if resume == "auto":
        newest = _newest_number(name)
        path = Path(given) if given is not None else RUNS / f"{name}-{newest:03d}"
        if path.exists() and (given is not None or not (path / SUMMARY).exists()):
            if (
                any(not inside.name.startswith(".") for inside in path.iterdir())
                and not (path / "recipe.toml").exists()
            ):
                raise RunFolderError(f"--run-folder {str(path)!r} is no run folder. Give another one.")
            return path
        return new_folder(name, given, make=make)
    return old_folder(name, given) if resume else new_folder(name, given, make=make)


def old_folder(name: str, given: str | Path | None) -> Path:
    """The folder of a run to resume: the given one, or the newest `runs/NAME-…`."""
    if given is None and not _newest_number(name):
        raise RunFolderError(
            f"--resume: there is no run folder runs/{name}-…. Name one with --run-folder (run=…), or start without "
            "--resume (resume=True)."
        )
    path = Path(given) if given is not None else RUNS / f"{name}-{_newest_number(name):03d}"
    if not (path / "checkpoints").is_dir():
        raise RunFolderError(
            f"--resume: {str(path)!r} has no checkpoints. Name the folder of a run that has with --run-folder (run=…), "
            "or start without --resume (resume=True)."
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


def complete(recipe: Recipe) -> Recipe:
    """The recipe with what it needs of the run that it starts from: the vocabulary, which must be the same, and the
    model, where the recipe names none.

    Raises:
        RunFolderError: that run has no finished model.
        RecipeError: the recipe wants another model or vocabulary.
    """
    if not recipe.train.start_from or recipe.task.kind != TEXT:
        return recipe
    run = recipe.train.start_from
    folder = model_folder(run)
    before = read_recipe(run)
    if before is None or before.task.kind != TEXT:
        raise RecipeError(f"'train.start_from' = {run!r}: its model is no text classifier. Name a run of one.")
    table = recipe.model_dump(mode="json", exclude_unset=True)
    model = before.model.model_dump(mode="json")
    if "folder" in model:
        model["folder"] = str(folder)  # where the run found its encoder may be gone
    for section, known in (("model", model), ("encode", before.encode.model_dump(mode="json"))):
        for key, value in table.get(section, {}).items():
            if value != known.get(key) and (section, key) not in _FREE:
                raise RecipeError(
                    f"'{section}.{key}' = {value!r}: the run in 'train.start_from' has {known.get(key)!r}, and its "
                    "weights belong to that. Leave the key out, or train without start_from."
                )
        table[section] = known | table.get(section, {})
    return recipes.check(table)


def _newest_number(name: str) -> int:
    numbers = [path.name.removeprefix(f"{name}-") for path in RUNS.glob(f"{name}-*")]
    return max((int(number) for number in numbers if number.isdigit()), default=0)
