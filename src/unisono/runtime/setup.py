"""How a worker takes its place in a run: build, compare numerics, probe, and load what a checkpoint holds.

Owns the job, the run in progress, and everything that is refused before the first step. What happens after is `run.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from unisono.config.recipe import Recipe
from unisono.data.order import Order, count_steps
from unisono.determinism import keys
from unisono.engine import numerics
from unisono.engine.contribution import Contributor
from unisono.engine.optimizer import Optimizer, array_names
from unisono.engine.profile import Profile
from unisono.engine.purity import probe
from unisono.engine.replica import Replica, layout_digest
from unisono.engine.snapshot import SnapshotArrays
from unisono.engine.state import TrainState
from unisono.errors import DamagedError, RecipeError, RunFolderError
from unisono.exchange.protocol import Exchange
from unisono.processes.progress_table import Progress
from unisono.runtime.run_inputs import RunInputs
from unisono.runtime.supervisor_client import SupervisorClient
from unisono.storage import checkpoints
from unisono.tracking import events

Resume = Literal["no", "yes", "auto"]
PROBED = 2
"""Samples with which a model is probed for purity: its shapes, not its sizes, are what it could remember."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to run, the same on every worker.

    resume: "no", "yes" (from the newest checkpoint, which must be there) or "auto" (if there is one). trace: a folder
    for `verify`. profile: whether to write where the time went.
    """

    recipe: Recipe
    folder: Path
    resume: Resume = "no"
    accept_new_numerics: bool = False
    allow_impure: bool = False
    trace: Path | None = None
    profile: bool = False


@dataclass(slots=True, kw_only=True)
class Ready:
    """What a worker makes once and keeps while groups of workers come and go.

    fingerprint: of the module as it was built, so it is the same whenever it is taken. profile: what this worker was
    at, where it is asked for.
    """

    inputs: RunInputs
    module: nn.Module
    device: torch.device
    fingerprint: Mapping[str, Any]
    profile: Profile | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """A run in progress on one worker. `begun`: the step that this group of workers went on from. `saved_step`: whose
    checkpoint is on disk, or being written; −1: unknown."""

    job: Job
    ready: Ready
    exchange: Exchange
    client: SupervisorClient
    state: TrainState
    order: Order
    contributor: Contributor
    pure: bool = True
    begun: int = 0
    recovered: bool = False
    saved_step: int = -1
    started: float = field(default_factory=time.perf_counter)
    samples: int = 0

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @property
    def inputs(self) -> RunInputs:
        return self.ready.inputs

    @property
    def progress(self) -> Progress:
        """Who hears what this worker is about to do."""
        return self.ready.profile or self.client.progress

    @property
    def judge(self) -> Contributor:
        """The contributor, without anybody's help."""
        return replace(self.contributor, offload=None)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return self.ready.fingerprint

    def tell(self, event: events.Event) -> None:
        """Pass an event on; one voice is enough."""
        if self.exchange.rank == 0:
            self.client.tell(event)

    def epoch(self) -> float:
        """Epochs done."""
        return self.state.step / self.order.steps_per_epoch


def check_workers(recipe: Recipe, workers: int) -> None:
    """Refuse more workers than microbatches."""
    microbatches = recipe.train.microbatches
    if not 1 <= workers <= microbatches:
        raise RecipeError(
            f"`--workers {workers}`: the recipe has {microbatches} microbatches, so 1 to {microbatches} workers can "
            "share a step. "
            f"Use at most {microbatches}, or set train.microbatches = {max(workers, 1)} (this changes the numerics)."
        )


def leave_alone(module: nn.Module) -> None:
    """Do nothing to a module that has been built."""


def make_ready(
    job: Job, inputs: RunInputs, device: torch.device, on_built: Callable[[nn.Module], None] = leave_alone
) -> Ready:
    """Build the module, and take the numerics fingerprint. `on_built` is called with the module as it was built."""
    recipe, train = job.recipe, job.recipe.train
    inputs.check(recipe)
    keys.seed_all(keys.key(train.seed, "build"))
    module = inputs.task.build()
    on_built(module)
    module = module.to(device)
    found = numerics.fingerprint(train, device=device, data=inputs.data, layout=layout_digest(module))
    profile = Profile() if job.profile else None
    return Ready(inputs=inputs, module=module, device=device, fingerprint=found, profile=profile)


def join(job: Job, ready: Ready, exchange: Exchange, client: SupervisorClient) -> Run:
    """Take part in a group of workers: compare numerics, probe for purity, and go on from the snapshot, from a
    checkpoint, or begin."""
    recipe, train, inputs = job.recipe, job.recipe.train, ready.inputs
    check_workers(recipe, exchange.workers)
    client.progress.at("join")
    replica = Replica(ready.module, rank=exchange.rank, workers=exchange.workers, pretrained=inputs.task.pretrained)
    warnings = _compare_workers(ready.fingerprint, exchange)
    total_steps = count_steps(len(inputs.train), train.samples_per_step, train.epochs, train.max_steps)
    order = Order(
        lengths=inputs.train.lengths,
        padded=inputs.train.padded,
        samples_per_step=train.samples_per_step,
        microbatches=train.microbatches,
        seed=train.seed,
        total_steps=total_steps,
    )
    arrays = _open_snapshot(job, ready, replica, exchange, client, total_steps)
    optimizer = Optimizer(replica, exchange, train, arrays)
    run = Run(
        job=job,
        ready=ready,
        exchange=exchange,
        client=client,
        state=TrainState(step=0, replica=replica, optimizer=optimizer, exchange=exchange),
        order=order,
        contributor=Contributor(
            replica=replica, task=inputs.task, precision=train.precision, seed=train.seed, offload=exchange.offload
        ),
        pure=not job.allow_impure,
    )
    if arrays is not None and arrays.committed:
        run.state.recover(arrays.snapshot.facts(), *arrays.integers())
        run.recovered = True
    else:
        if not job.allow_impure:
            _probe(run)
        if job.resume != "no":
            warnings += _resume(run)
        run.state.begin()
        for warning in warnings:
            run.tell(events.Notice(message=warning, warning=True))
    run.begun = run.state.step
    return run


def _open_snapshot(
    job: Job, ready: Ready, replica: Replica, exchange: Exchange, client: SupervisorClient, total_steps: int
) -> SnapshotArrays | None:
    """The run's arrays in its snapshot, where it has one."""
    if client.memory < 0:
        return None
    return SnapshotArrays(
        client.memory,
        array_names(job.recipe.train),
        replica,
        exchange,
        most_workers=job.recipe.train.microbatches,
        extra=run_facts(job, ready, total_steps),
        direct=ready.device.type == "cpu",
    )


def run_facts(job: Job, ready: Ready, total_steps: int) -> dict[str, Any]:
    """What a checkpoint says of its run."""
    return {"fingerprint": dict(ready.fingerprint), "recipe": decisive(job.recipe), "total_steps": total_steps}


def _compare_workers(found: Mapping[str, Any], exchange: Exchange) -> list[str]:
    """Refuse to join workers that compute with other numerics than worker 0."""
    everyone = [json.loads(content) for content in exchange.gather_bytes(json.dumps(found).encode())]
    warnings: list[str] = []
    for rank, other in enumerate(everyone[1:], start=1):
        remedy = "Run all workers with one version, one kind of processor and one set of variables."
        warnings += numerics.compare(everyone[0], other, who=f"on worker {rank}", here="on worker 0", remedy=remedy)
    return warnings


def _probe(run: Run) -> None:
    """Probe with some samples of the first step, and with some of another shape, even where all of its are alike.

    A few show as much as a whole microbatch, and nobody waits long for the first step.
    """
    first = run.order.step(0).microbatches
    smaller, larger = first[-1][:PROBED], np.concatenate([first[0][:PROBED], first[-1][:1]])
    take = run.inputs.train.take
    one, other = (
        {name: column.to(run.ready.device) for name, column in take(samples).items()} for samples in (smaller, larger)
    )
    probe(run.judge, one, other)


def _resume(run: Run) -> list[str]:
    """Load the newest whole checkpoint of the run folder; refuse one of another recipe or other numerics."""
    folder = run.job.folder / "checkpoints"
    saved, faults = checkpoints.newest(folder)
    warnings = []
    if faults and (saved or run.job.resume == "auto"):
        run.exchange.wait_for_all()  # every worker has looked
        if run.exchange.rank == 0:
            checkpoints.set_aside(folder, saved)
        went_on = f"going on from {saved.folder.name}" if saved else "beginning anew"
        warnings += [f"{fault} Set aside as *{checkpoints.ASIDE}; {went_on}." for fault in faults]
    if saved is None:
        if faults and run.job.resume == "yes":
            raise faults[0]
        if run.job.resume == "yes":
            raise RunFolderError(
                f"--resume: {str(run.job.folder)!r} has no complete checkpoint. Start without --resume, or with "
                "--resume auto."
            )
        return warnings
    mine, theirs = decisive(run.recipe), saved.facts["recipe"]
    if changed := sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)):
        told = ", ".join(f"{key} = {mine.get(key)!r} (was {theirs.get(key)!r})" for key in changed)
        raise RunFolderError(
            f"--resume: the recipe has changed: {told}. Resume with the recipe that began the run, or start a new run."
        )
    if run.job.accept_new_numerics:
        if names := numerics.differences(run.fingerprint, saved.facts["fingerprint"]):
            warnings.append(f"going on under new numerics ({', '.join(names)} differ): the bits are those of neither")
    else:
        remedy = "Resume where the run began, or give --accept-new-numerics: it then goes on, to other bits."
        warnings += numerics.compare(
            run.fingerprint, saved.facts["fingerprint"], who="in the checkpoint", here="here", remedy=remedy
        )
    try:
        run.state.restore(checkpoints.read(saved))
    except (KeyError, RuntimeError) as error:
        raise DamagedError(
            f"{str(saved.folder)!r} does not fit this model: {error}. Resume with the recipe that began the run."
        ) from error
    run.saved_step = run.state.step
    return warnings


def decisive(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide a run's course; the dataset's hash stands for [data] and [encode]."""
    dump = recipe.model_dump(mode="json")
    for key in ("device", "audit_every"):
        dump["train"].pop(key)
    dump["model"].pop("folder", None)
    return {
        f"{section}.{key}": value for section in ("model", "train", "evaluate") for key, value in dump[section].items()
    }
