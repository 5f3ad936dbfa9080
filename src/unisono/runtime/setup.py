"""How a worker begins its part in a run: build, compare numerics, probe, and load a checkpoint.

Owns the job, the run in progress, and every check that refuses a run before the first step. `run.py` does the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unisono.backends.backend import Backend
from unisono.backends.backend_registry import find_backend
from unisono.config.recipe import Recipe
from unisono.data.order import Order, count_steps
from unisono.data.streams import SampleStream
from unisono.determinism import keys
from unisono.engine import numerics
from unisono.engine.contribution import Contributor
from unisono.engine.optimizer import Optimizer, array_names
from unisono.engine.profile import Profile
from unisono.engine.purity import compare_taken, probe
from unisono.engine.replica import Replica, layout_digest
from unisono.engine.snapshot import SnapshotArrays
from unisono.engine.state import TrainState
from unisono.engine.trial import check_folder, try_export, try_loss, try_prediction, try_scores
from unisono.engine.warm_start import WarmStart, start_from
from unisono.errors import ContractError, DamagedError, RecipeError, RunFolderError
from unisono.exchange.protocol import Exchange
from unisono.processes.forking import end_copy
from unisono.processes.progress_table import Progress
from unisono.runtime.resuming import Resumption, decisive, resume
from unisono.runtime.supervisor_client import SupervisorClient
from unisono.storage import checkpoints
from unisono.storage.files import facts_sha256
from unisono.storage.origin import COMMIT, Origin, agree
from unisono.tasks.run_inputs import RunInputs
from unisono.tracking import events

Resume = Literal["no", "yes", "auto"]
PROBED = 2
"""Samples with which a model is probed for purity: its shapes, not its sizes, are what it could remember."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The job, the same on every worker.

    resume: "no", "yes" (from the newest checkpoint, which must exist) or "auto" (if there is one). trace: a folder
    for `verify`. profile: whether to record where time is spent.
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

    fingerprint: of the model as it was built, so it does not depend on when it is taken. settings: the state of the
    process, as the fingerprint describes it. profile: what this worker was doing and for how long, where requested.
    warm: where the first weights come from, if from another run.
    """

    inputs: RunInputs
    backend: Backend
    device: torch.device
    fingerprint: Mapping[str, Any]
    settings: numerics.Settings
    profile: Profile | None = None
    warm: WarmStart | None = None


@dataclass(slots=True, kw_only=True)
class Run:
    """A run in progress on one worker. `begun`: the step from which this group of workers went on. `saved_step`: the
    step whose checkpoint is on disk, or being written; −1: unknown."""

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

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @property
    def inputs(self) -> RunInputs:
        return self.ready.inputs

    @property
    def progress(self) -> Progress:
        """The observers of what this worker is about to do."""
        return self.ready.profile or self.client.progress

    @property
    def judge(self) -> Contributor:
        """The contributor, without offloaded weight gradients."""
        return replace(self.contributor, offload=None)

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        return self.ready.fingerprint

    def tell(self, event: events.Event) -> None:
        """Pass an event on, from worker 0 only."""
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
            f"`--workers {workers}` (workers={workers}): the recipe has {microbatches} microbatches, so 1 to "
            f"{microbatches} workers can share a step. Use at most {microbatches}, or set train.microbatches = "
            f"{max(workers, 1)} (this changes the numerics)."
        )


def leave_alone(built: object) -> None:
    """Do nothing to a model that has been built."""


def make_ready(
    job: Job, inputs: RunInputs, device: torch.device, on_built: Callable[[Any], None] = leave_alone
) -> Ready:
    """Build the model, and take the numerics fingerprint. `on_built` is called with what the task has built, before
    anything is done to it."""
    recipe, train = job.recipe, job.recipe.train
    inputs.check(recipe)
    keys.seed_all(key := keys.key(train.seed, "build"))
    kind = find_backend(inputs.task.backend)
    process, threads = os.getpid(), torch.get_num_threads()
    try:
        backend = kind.build(inputs.task, train, key=key, device=device, on_built=on_built)
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch has no kind of its own for it
            raise RecipeError(f"the model does not fit into memory: {error}. Make it smaller.") from error
        raise
    end_copy(process)
    numerics.reset_modes()  # build may have left them otherwise
    if torch.get_num_threads() != threads:
        raise ContractError(
            f"the task's build, or a package that it imports, set torch to {torch.get_num_threads()} threads; allowed "
            f"is train.threads, which is {train.threads}. Set train.threads = {torch.get_num_threads()}, or end build "
            f"with torch.set_num_threads({train.threads})."
        )
    start = train.start_from
    warm = start_from(start, backend, inputs.task, inputs.labels) if start else None
    data = {**inputs.data, **backend.fingerprint(), **(warm.fingerprint if warm else {})}
    found = numerics.fingerprint(train, device=device, data=data, layout=layout_digest(backend))
    profile = Profile() if job.profile else None
    return Ready(
        inputs=inputs,
        backend=backend,
        device=device,
        fingerprint=found,
        settings=numerics.Settings(),
        profile=profile,
        warm=warm,
    )


def join(job: Job, ready: Ready, exchange: Exchange, client: SupervisorClient) -> Run:
    """Take part in a group of workers: compare numerics, probe for purity, and go on from the snapshot, from a
    checkpoint, or begin."""
    recipe, train, inputs = job.recipe, job.recipe.train, ready.inputs
    check_workers(recipe, exchange.workers)
    client.progress.at("join")
    replica = Replica(ready.backend, rank=exchange.rank, workers=exchange.workers)
    warnings = _compare_workers(ready.fingerprint, exchange)
    order = _make_order(recipe, ready)
    arrays = _open_snapshot(job, ready, replica, exchange, client, order.total_steps)
    optimizer = Optimizer(replica, exchange, train, arrays)
    run = Run(
        job=job,
        ready=ready,
        exchange=exchange,
        client=client,
        state=TrainState(
            step=0,
            replica=replica,
            optimizer=optimizer,
            exchange=exchange,
            read_stream=inputs.train.state_at if isinstance(inputs.train, SampleStream) else None,
        ),
        order=order,
        contributor=Contributor(replica=replica, seed=train.seed, offload=exchange.offload, settings=ready.settings),
        pure=not job.allow_impure,
    )
    origin, saved = _look(job, arrays)
    everyone = agree(origin, exchange)
    if arrays is not None and arrays.committed:
        run.state.recover(arrays.snapshot.facts(), *arrays.integers())
        run.recovered = True
        _go_on_in_stream(run)
    else:
        if not job.allow_impure:
            _probe(run)
        if job.resume != "no":
            warnings += _set_aside(run, saved, everyone)
            if saved is not None:
                now = Resumption(
                    recipe=recipe,
                    fingerprint=run.fingerprint,
                    total_steps=order.total_steps,
                    folder=str(job.folder),
                    accepts=job.accept_new_numerics,
                )
                warnings += resume(now, run.state, saved)
                run.saved_step = run.state.step
        if ready.warm is not None and not run.state.step:
            run.state.lineage = [dict(ready.warm.facts)]
            run.tell(events.Notice(message=ready.warm.notice))
        warnings += _try_out(run)
        _go_on_in_stream(run)
        run.state.begin()
        for warning in warnings:
            run.tell(events.Notice(message=warning, warning=True))
    run.begun = run.state.step
    return run


def _make_order(recipe: Recipe, ready: Ready) -> Order:
    """Which samples each step's microbatches hold: a function of the recipe, the data and the module, so the same on
    every worker."""
    train, inputs = recipe.train, ready.inputs
    min_samples = ready.backend.min_samples
    shuffled = not isinstance(inputs.train, SampleStream)
    return Order(
        lengths=inputs.train.lengths,
        padded=inputs.train.padded,
        samples_per_step=train.samples_per_step,
        microbatches=train.microbatches,
        seed=train.seed,
        total_steps=count_steps(
            inputs.samples_per_epoch,
            train.samples_per_step,
            train.epochs if shuffled else 1,
            train.max_steps,
            drop_last=train.drop_last,
            min_samples=min_samples,
        ),
        min_samples=min_samples,
        drop_last=train.drop_last,
        sampled=inputs.sampled,
        shuffled=shuffled,
    )


def _go_on_in_stream(run: Run) -> None:
    """Restore a stream to the position of the run."""
    stream, step = run.inputs.train, run.state.step
    if isinstance(stream, SampleStream) and not stream.go_to(step, run.state.stream) and stream.has_state:
        told = f"the stream does not go on from its state after step {step}: it is read again from the beginning"
        run.tell(events.Notice(message=told, warning=True))


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
    """Probe with some samples of the first step, and with some of another shape, even where all shapes of the step are
    equal.

    A few show as much as a whole microbatch, and the first step is not delayed for long.
    """
    first = run.order.step(0).microbatches
    smaller, larger = first[-1][:PROBED], np.concatenate([first[0][:PROBED], first[-1][:1]])
    take = run.inputs.train.take
    taken = [take(samples) for samples in (smaller, larger)]
    if not run.inputs.train.prefetchable:
        compare_taken(taken[0], take(smaller))
    one, other = (_move(found, run.ready.device) for found in taken)
    probe(run.judge, one, other)


def _move(taken: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: column.to(device) for name, column in taken.items()}


def _try_out(run: Run) -> list[str]:
    """Try what happens at the end of an epoch and of the run; return warnings. Only worker 0 writes to folders."""
    inputs, device, backend = run.inputs, run.ready.device, run.state.replica.backend
    process = os.getpid()
    warnings = try_scores(backend, inputs, run.recipe, device)
    if not run.state.step:
        samples = run.order.step(0).microbatches[0][:PROBED]
        small, double = (_move(inputs.train.take(np.tile(samples, times)), device) for times in (1, 2))
        warnings += try_loss(run.judge, small, double) + try_prediction(backend, inputs, device)
    if run.exchange.rank == 0:
        try_export(inputs)
        model = sum(tensor.nbytes for tensor in run.state.replica.tensors().values())
        numbers = len(array_names(run.recipe.train)) * run.state.replica.flat.nbytes
        warnings += check_folder(run.job.folder, model_bytes=model, checkpoint_bytes=numbers)
    end_copy(process)
    run.ready.settings.keep()  # measures, metrics and export are the user's code
    return warnings


def _look(job: Job, arrays: SnapshotArrays | None) -> tuple[Origin, checkpoints.Saved | None]:
    """The state that this worker would go on from: a commit, the newest whole checkpoint of its run folder, or the
    beginning."""
    if arrays is not None and arrays.committed:
        sequence, step = arrays.snapshot.sequence, int(arrays.snapshot.facts()["step"])
        return Origin(step=step, state=f"{COMMIT}{sequence}", place="in the snapshot"), None
    if job.resume == "no":
        return Origin(step=0, state="", place="in a new run"), None
    saved, faults = checkpoints.newest(job.folder / "checkpoints")
    told = [str(fault) for fault in faults]
    if saved is None:
        return Origin(step=0, state="", place=f"since {str(job.folder)!r} has no whole checkpoint", faults=told), None
    # the facts hold the SHA-256 of every file, which has just been compared
    step, state, place = int(saved.facts["step"]), facts_sha256(saved.facts), f"in {str(saved.folder)!r}"
    return Origin(step=step, state=state, place=place, faults=told), saved


def _set_aside(run: Run, saved: checkpoints.Saved | None, everyone: Sequence[Origin]) -> list[str]:
    """Set aside the damaged checkpoints that are newer than the one all workers go on from; return the notices.

    Raises:
        DamagedError, RunFolderError: there is nothing to go on from, and the job requires it.
    """
    faults = list(dict.fromkeys(fault for one in everyone for fault in one.faults))
    if saved is None and run.job.resume == "yes":
        if faults:
            raise DamagedError(faults[0])
        raise RunFolderError(
            f"--resume: {str(run.job.folder)!r} has no complete checkpoint. Start without --resume, or with "
            '--resume auto (resume="auto").'
        )
    if run.exchange.rank == 0 and everyone[0].faults:  # only worker 0 writes there
        checkpoints.set_aside(run.job.folder / "checkpoints", saved)
    went_on = f"going on from {saved.folder.name}" if saved else "beginning anew"
    aside = dict.fromkeys(everyone[0].faults, f"Set aside as *{checkpoints.ASIDE}; ")
    return [f"{fault} {aside.get(fault, 'Not used; ')}{went_on}." for fault in faults]
