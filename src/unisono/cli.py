"""The command line: parse, then call one function.

Owns options, exit codes and the output on failure. Heavy imports happen inside the commands, so that --help answers at
once. Most of that time is typer's; it takes longer where annotations are strings.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from unisono.errors import UnisonoError

app = typer.Typer(
    help="Train on any number of workers. Get the same bits.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="TOML file; `unisono recipe --show-defaults` documents every key")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override one key of the recipe; may be repeated"),
]
Workers = Annotated[
    str,
    typer.Option(
        "--workers",
        "-w",
        metavar="N|auto",
        help="processes; auto: all GPUs, else all cores, at most train.microbatches",
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="MODULE:CLASS",
        help="a task of your own: module:Class or path/to/file.py:Class; in a recipe task.kind",
    ),
]
LauncherName = Annotated[
    str,
    typer.Option(
        "--launcher",
        metavar="NAME",
        help="what starts the workers: auto, in_process, fork, spawn, torchrun, or one of an installed package",
    ),
]
ResumeFrom = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="[auto]",
        help="go on from the newest checkpoint of --run-folder, or of the newest runs/NAME-…; auto: if there is "
        "one, else begin, so that the same command serves for both",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print warnings and errors only")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object per event")]
Strict = Annotated[bool, typer.Option("--strict", help="a quarantined record is an error, as with data.strict = true")]


def _print_version(asked: bool) -> None:
    if asked:
        import unisono

        typer.echo(f"unisono {unisono.__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


class _Train(TyperCommand):
    """`--resume` may stand alone, or be followed by "auto"."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        given: list[str] = []
        for argument in arguments:
            if given and given[-1] == "--resume=yes" and argument == "auto":
                given[-1] = "--resume=auto"
            else:
                given.append("--resume=yes" if argument == "--resume" else argument)
        for argument in given:
            if argument.startswith("--resume=") and argument.partition("=")[2] not in ("yes", "no", "auto"):
                raise typer.BadParameter("allowed is --resume, or --resume auto.", param_hint="--resume")
        return list(super().parse_args(context, given))


@app.command(cls=_Train)
def train(
    recipe: RecipePath,
    workers: Workers = "auto",
    set_: Set = None,
    task: TaskName = None,
    run: Annotated[
        Path | None, typer.Option("--run-folder", metavar="FOLDER", help="run folder; default: runs/NAME-001 and so on")
    ] = None,
    resume: ResumeFrom = "no",
    on_loss: Annotated[
        str | None,
        typer.Option("--on-loss", metavar="replace|shrink", help="when a worker is lost; as with recovery.on_loss"),
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option("--fault", metavar="FAULT", help="inject a fault, such as 'kill(worker=1, step=7, phase=update)'"),
    ] = None,
    launcher: LauncherName = "auto",
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="report where the time went; write profile.md, profile.json, trace.json to the run folder"
        ),
    ] = False,
    strict: Strict = False,
    accept_new_numerics: Annotated[
        bool, typer.Option("--accept-new-numerics", help="resume although the numerics fingerprint differs")
    ] = False,
    allow_impure: Annotated[
        bool, typer.Option("--allow-impure", help="train a model that fails the purity probe, without the promise")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train, test and export a model. Under torchrun, join its workers."""
    from unisono.runtime import signals

    signals.end_early()
    count = check_count(workers)
    overrides = (*_with(set_, task, strict), *([f"recovery.on_loss={on_loss}"] if on_loss else []))
    _limit(recipe, overrides)
    from unisono.api import training as api
    from unisono.runtime.launchers.launcher import choose_supervised

    api.train(
        recipe,
        workers=count,
        overrides=overrides,
        run=run,
        resume="auto" if resume == "auto" else resume == "yes",
        faults=tuple(fault or ()),
        launcher=choose_supervised(launcher),
        profile=profile,
        accept_new_numerics=accept_new_numerics,
        allow_impure=allow_impure,
        quiet=quiet,
        as_json=as_json,
    )


@app.command()
def prepare(recipe: RecipePath, workers: Workers = "auto", set_: Set = None, strict: Strict = False) -> None:
    """Read, screen and encode a recipe's data; training opens what this wrote."""
    count = check_count(workers)
    from unisono.api import preparation

    preparation.prepare(recipe, workers=count, overrides=_with(set_, None, strict))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run")],
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="labelled file, pattern or URL; default: the run's own test samples"),
    ] = None,
    workers: Workers = "auto",
    task: TaskName = None,
    launcher: LauncherName = "auto",
    as_json: Json = False,
) -> None:
    """Score a trained model: loss, accuracy, macro-F1, a table per class, the confusion matrix."""
    count = check_count(workers)
    _limit_as(run)
    from unisono.api import application

    application.evaluate(run, data, workers=count, task=task, as_json=as_json, launcher=launcher)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a finished run")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="CSV, TSV, JSONL or Parquet (or a pattern, a URL) with the columns that the model reads",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUTPUT", help="CSV, JSONL or Parquet to write; rows in order")],
    workers: Workers = "auto",
    task: TaskName = None,
    launcher: LauncherName = "auto",
) -> None:
    """Predict for each row: of a text its class, with probabilities."""
    count = check_count(workers)
    _limit_as(run)
    from unisono.api import application

    application.predict(run, source, target, workers=count, task=task, launcher=launcher)


@app.command()
def verify(
    recipe: RecipePath,
    workers: Annotated[
        str, typer.Option("--workers", "-w", metavar="N,N,…", help="numbers of workers to compare")
    ] = "1,2,3",
    steps: Annotated[int, typer.Option("--steps", min=0, help="stop after so many steps; 0: train to the end")] = 0,
    set_: Set = None,
    task: TaskName = None,
) -> None:
    """Train under each number of workers and compare every bit; exit code 1 names the first that differs."""
    counts = [int(check_count(count, auto=False)) for count in workers.split(",")]
    overrides = _with(set_, task)
    _limit(recipe, overrides)
    from unisono.api import verification

    if not verification.verify(recipe, workers=counts, steps=steps, overrides=overrides):
        raise typer.Exit(1)


@app.command()
def resize(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run that is being trained on this machine")],
    workers: Annotated[str, typer.Option("--workers", "-w", metavar="N", help="the new number of workers")],
) -> None:
    """Change the number of workers of a running run, at its next step. The bits stay the same."""
    count = int(check_count(workers, auto=False))
    from unisono.storage import run_lock

    typer.echo(f"{run}: {run_lock.ask_for_workers(run, count)}")


@app.command()
def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    verify: Annotated[bool, typer.Option("--verify", help="compare every file with its SHA-256")] = False,
    as_json: Json = False,
) -> None:
    """List a run's checkpoints; exit code 1 if --verify finds a damaged one."""
    from unisono.api import inventory

    if not inventory.list_checkpoints(run, verify=verify, as_json=as_json):
        raise typer.Exit(1)


@app.command()
def recipe(
    path: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="show this recipe, checked and with defaults filled in")
    ] = None,
    show_defaults: Annotated[
        bool, typer.Option("--show-defaults", help="print a recipe with every key, its default and its meaning")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="bag|transformer|pretrained", help="kind of model for --show-defaults; default: bag"
        ),
    ] = None,
    set_: Set = None,
) -> None:
    """Check a recipe, or document all keys."""
    from unisono.config import recipe as recipes
    from unisono.config.sections import TaskTable

    if path is None and not show_defaults:
        raise typer.BadParameter("give a RECIPE to check, or --show-defaults.")
    if model is not None and not show_defaults:
        raise typer.BadParameter("it chooses what --show-defaults prints. Give both.", param_hint="--model")
    if path is not None:
        found, unused = recipes.load(path, tuple(set_ or ())), []
        if found.task != TaskTable():  # a text recipe without keys of its own needs no import of torch
            from unisono.tasks.kinds import check_task

            unused = check_task(found)
        typer.echo(recipes.to_toml(found, unused), nl=False)
    if show_defaults:
        typer.echo(recipes.document(model=model or "bag"), nl=False)


def check_count(workers: str, *, auto: bool = True) -> int | str:
    """Turn `--workers` into a number, or "auto"."""
    if auto and workers == "auto":
        return "auto"
    if not workers.strip().isdigit() or int(workers) < 1:
        raise typer.BadParameter(
            f"{workers!r}: allowed is a whole number from 1{' or auto' if auto else ''}.", param_hint="--workers"
        )
    return int(workers)


def _with(overrides: list[str] | None, task: str | None, strict: bool = False) -> tuple[str, ...]:
    """`--set`, and the options that set keys of a recipe."""
    named = [f"task.kind={json.dumps(task)}"] if task is not None else []
    return (*(overrides or ()), *named, *(["data.strict=true"] if strict else ()))


def _limit(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Limit this process to the recipe's instruction sets, before torch is imported: it reads them once."""
    from unisono.config import recipe as recipes
    from unisono.determinism import instruction_sets

    instruction_sets.limit(recipes.load(recipe, overrides).train.numerics)


def _limit_as(run: Path) -> None:
    """Limit this process to the instruction sets that a run was trained with, as `_limit` does."""
    from unisono.determinism import instruction_sets
    from unisono.storage.run_folder import read_recipe

    recipe = read_recipe(run)
    if recipe is not None:  # else the command reports what is missing
        instruction_sets.limit(recipe.train.numerics)


def main() -> None:
    """Run the command line; turn an error raised on purpose into its message and exit code."""
    try:
        app(prog_name="unisono")
    except UnisonoError as error:
        from unisono.config.wording import readable

        print(f"unisono: {readable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
