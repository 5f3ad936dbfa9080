"""What starts the workers of a job: the interface, the list of launchers, and the choice of one.

Owns no process. A launcher in a package of its own declares an entry point in the group `unisono.launchers`; its name
is then allowed wherever "fork" is. docs/launchers.md says how one is written.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

import torch

from unisono.config.offers import load_offer
from unisono.config.recipe import Recipe
from unisono.config.run_sections import Recovery
from unisono.errors import RecipeError
from unisono.processes.fault_injection import Fault
from unisono.processes.forking import count_cores
from unisono.runtime.launchers.rank_assignment import count_peers
from unisono.runtime.runner import Runner
from unisono.runtime.worker import Act
from unisono.tracking import events

AUTO = "auto"
BUILT_IN = {
    "in_process": "unisono.runtime.launchers.in_process:InProcess",
    "fork": "unisono.runtime.launchers.fork:Fork",
    "spawn": "unisono.runtime.launchers.spawn:Spawn",
    "torchrun": "unisono.runtime.launchers.torchrun:Torchrun",
}
ENTRY_POINTS = "unisono.launchers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training, for any workers.

    open_observer: makes the observer of its events; called in the process that reports for the run, and closed
        there. Its argument: whether this process may fork, so that loggers get a process of their own.
    may_stop: whether an observer may request the end. faults: to inject.
    """

    runner: Runner
    recipe: Recipe
    folder: Path
    workers: int
    open_observer: Callable[[bool], events.Observer]
    may_stop: bool = False
    faults: tuple[Fault, ...] = ()


class Launcher(Protocol):
    """Starts workers somewhere, gives each a rank assignment, and sees them to their end."""

    def count(self, wanted: str | int, microbatches: int, device: str) -> int:
        """The number of workers for `wanted`, a number or "auto". device: as train.device. Raises RecipeError where
        that number is not available."""
        ...

    def train(self, training: Training) -> None:
        """Train to the end, or raise what ended it. Each worker must call `training.runner.train`."""
        ...

    def run(self, act: Act, *, workers: int, threads: int, device: str) -> bool:
        """Run `act` once in each worker; return whether this process reports for all of them."""
        ...


def count_workers(wanted: str | int, microbatches: int, device: str) -> int:
    """The number of workers on this host for `wanted`; "auto": all GPUs, else all cores, at most one per
    microbatch."""
    if wanted != AUTO:
        return read_workers(wanted)
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    return max(1, min(gpus or count_cores(), microbatches))


def read_workers(wanted: object) -> int:
    """A number of workers, as a number or a text.

    Raises:
        RecipeError: it is none, or less than 1.
    """
    if isinstance(wanted, bool) or not str(wanted).strip().isdigit() or not int(str(wanted)):
        raise RecipeError(f'workers = {wanted!r} (--workers): allowed is a whole number from 1, or "auto".')
    return int(str(wanted))


def find_launcher(name: str | Launcher) -> Launcher:
    """The launcher of a name.

    Raises:
        RecipeError: there is none of that name.
    """
    if not isinstance(name, str):
        if lacks := [method for method in ("count", "train", "run") if not callable(getattr(name, method, None))]:
            raise RecipeError(f"launcher {name!r}: it has no method {lacks[0]!r}. See docs/launchers.md.")
        return name
    if name in BUILT_IN:
        module, _, kind = BUILT_IN[name].partition(":")
        made: Launcher = getattr(import_module(module), kind)()
        return made
    declared = entry_points(group=ENTRY_POINTS)
    if name in declared.names:
        offered = load_offer(declared, name, "launcher", RecipeError)
        try:
            made_by_package: Launcher = offered()  # type: ignore[operator]
        except Exception as error:
            raise RecipeError(
                f"launcher {name!r}: the installed package that offers it ({offered!r}) cannot be used: {error}. "
                "Repair or uninstall it."
            ) from error
        return find_launcher(made_by_package)
    allowed = ", ".join([AUTO, *BUILT_IN, *sorted(declared.names)])
    raise RecipeError(f"launcher {name!r}: allowed are {allowed}. Others come with packages that declare them.")


def choose(
    name: str | Launcher,
    *,
    workers: str | int,
    microbatches: int,
    device: str,
    supervised: bool = False,
) -> tuple[Launcher, int]:
    """The launcher for a job, and its number of workers.

    "auto" is torchrun's where it has started this process, or where torch.distributed is initialised here; for one
    worker it is this process; for more, they are spawned where this process has used CUDA and they will use it, else
    forked.

    Args:
        supervised: whether one worker, too, needs a supervisor, which brings it back where it is lost.
    """
    if name == AUTO:
        name = _choose(count_workers(workers, microbatches, device), device, supervised)
    launcher = find_launcher(name)
    return launcher, launcher.count(workers, microbatches, device)


def _choose(workers: int, device: str, supervised: bool) -> str:
    if count_peers():
        return "torchrun"
    if workers == 1 and not supervised:
        return "in_process"
    return "spawn" if device != "cpu" and torch.cuda.is_initialized() else "fork"


def choose_supervised(name: str) -> str:
    """The launcher for a name given to the command line, where one worker is supervised, too: a terminal or a
    scheduler expects it to survive, and no caller has to look into it."""
    return "fork" if name == AUTO and not count_peers() else name


def needs_supervisor(recipe: Recipe, faults: tuple[Fault, ...]) -> bool:
    """Whether the job needs something that only a supervisor can do."""
    return bool(faults) or recipe.train.audit_every > 0 or recipe.recovery != Recovery()


def run_everywhere(
    act: Act, *, workers: str | int, microbatches: int, threads: int, device: str, launcher: str | Launcher = AUTO
) -> bool:
    """Run `act` in every worker. Return whether this process reports for all of them."""
    chosen, count = choose(launcher, workers=workers, microbatches=microbatches, device=device)
    return chosen.run(act, workers=count, threads=threads, device=device)


def refuse_within_import() -> None:
    """Refuse to start anything while a spawned process imports the script that started it: the script would start
    itself again, without end.

    Raises:
        RecipeError: the script is being imported now.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # multiprocessing itself uses this flag
        raise RecipeError(
            "a spawned worker imports your script, and the script starts a run again. Put what starts it under "
            '`if __name__ == "__main__":`, or move the task to a module of its own.'
        )
