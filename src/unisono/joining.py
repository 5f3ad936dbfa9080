"""How a worker takes its place in a run: build, compare numerics, probe, and load what a checkpoint holds.

Owns the job, the run in progress, and everything that is refused before the first step. What happens after is `run.py`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unisono import events, keys
from unisono.checkpoint import checkpoints
from unisono.data.order import Order, count_steps
from unisono.engine import numerics
from unisono.engine.contribution import Contributor
from unisono.engine.optimizer import Optimizer
from unisono.engine.purity import probe
from unisono.engine.replica import Replica
from unisono.engine.state import TrainState
from unisono.errors import RecipeError, RunFolderError
from unisono.exchange.protocol import Exchange
from unisono.material import Material
from unisono.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to run, the same on every worker. `trace` is a folder for `verify`, `resume` goes on from the newest
    checkpoint."""

    recipe: Recipe
    folder: Path
    resume: bool = False
    accept_new_numerics: bool = False
    allow_impure: bool = False
    trace: Path | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """A run in progress on one worker. `observers` listen on worker 0 only."""

    job: Job
    material: Material
    exchange: Exchange
    device: torch.device
    observers: Sequence[events.Observer]
    state: TrainState
    order: Order
    contributor: Contributor
    fingerprint: Mapping[str, Any]
    pure: bool = True
    last_loss: float = math.nan
    evaluated_step: int = -1
    started: float = field(default_factory=time.perf_counter)
    samples: int = 0

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    def tell(self, event: events.Event) -> None:
        """Pass an event to the observers."""
        for observer in self.observers:
            observer.observe(event)

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


def join(
    job: Job, material: Material, exchange: Exchange, device: torch.device, observers: Sequence[events.Observer] = ()
) -> Run:
    """Build the replica, compare numerics with the other workers, probe for purity, and load a checkpoint to resume."""
    recipe, train = job.recipe, job.recipe.train
    check_workers(recipe, exchange.workers)
    material.check(recipe)
    keys.seed_all(keys.key(train.seed, "build"))
    module = material.task.build().to(device)
    replica = Replica(module, rank=exchange.rank, workers=exchange.workers, pretrained=material.task.pretrained)
    found = numerics.fingerprint(train, device=device, data=material.data, layout=replica.layout_digest())
    warnings = _compare_workers(found, exchange)
    order = Order(
        lengths=material.train.lengths,
        padded=material.train.padded,
        samples_per_step=train.samples_per_step,
        microbatches=train.microbatches,
        seed=train.seed,
        total_steps=count_steps(len(material.train), train.samples_per_step, train.epochs, train.max_steps),
    )
    contributor = Contributor(replica=replica, task=material.task, precision=train.precision, seed=train.seed)
    run = Run(
        job=job,
        material=material,
        exchange=exchange,
        device=device,
        observers=observers if exchange.rank == 0 else (),
        state=TrainState(step=0, replica=replica, optimizer=Optimizer(replica, exchange, train), exchange=exchange),
        order=order,
        contributor=contributor,
        fingerprint=found,
        pure=not job.allow_impure,
    )
    if not job.allow_impure:
        _probe(run)
    if job.resume:
        warnings += _resume(run)
    for warning in warnings:
        run.tell(events.Notice(message=warning, warning=True))
    return run


def _compare_workers(found: Mapping[str, Any], exchange: Exchange) -> list[str]:
    """Refuse to join workers that compute with other numerics than worker 0."""
    everyone = [json.loads(content) for content in exchange.gather_bytes(json.dumps(found).encode())]
    warnings: list[str] = []
    for rank, other in enumerate(everyone[1:], start=1):
        remedy = "Run all workers with one version, one kind of processor and one set of variables."
        warnings += numerics.compare(everyone[0], other, who=f"on worker {rank}", here="on worker 0", remedy=remedy)
    return warnings


def _probe(run: Run) -> None:
    """Probe with a microbatch of the first step, and with one of another shape, even where all of its are alike."""
    first = run.order.step(0).microbatches
    larger = np.concatenate([first[0], first[-1][:1]])
    take = run.material.train.take
    one, other = (
        {name: column.to(run.device) for name, column in take(samples).items()} for samples in (first[-1], larger)
    )
    probe(run.contributor, one, other)


def _resume(run: Run) -> list[str]:
    """Load the newest checkpoint of the run folder; refuse one of another recipe or other numerics."""
    saved = checkpoints.newest(run.job.folder / "checkpoints")
    if saved is None:
        raise RunFolderError(f"--resume: {str(run.job.folder)!r} has no complete checkpoint. Start without --resume.")
    mine, theirs = decisive(run.recipe), saved.facts["recipe"]
    if changed := sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)):
        told = ", ".join(f"{key} = {mine.get(key)!r} (was {theirs.get(key)!r})" for key in changed)
        raise RunFolderError(
            f"--resume: the recipe has changed: {told}. Resume with the recipe that began the run, or start a new run."
        )
    warnings = []
    if run.job.accept_new_numerics:
        if names := numerics.differences(run.fingerprint, saved.facts["fingerprint"]):
            warnings.append(f"going on under new numerics ({', '.join(names)} differ): the bits are those of neither")
    else:
        remedy = "Resume where the run began, or give --accept-new-numerics: it then goes on, to other bits."
        warnings = numerics.compare(
            run.fingerprint, saved.facts["fingerprint"], who="in the checkpoint", here="here", remedy=remedy
        )
    checkpoints.restore(run.state, saved)
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
