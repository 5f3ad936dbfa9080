"""One training run as each worker lives it, from the first step to the finished model.

Owns the order of things around the loop: when to report, evaluate and save, and what is left in the run folder.
`setup.py` does what comes before, `engine/loop.py` is the loop itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from unisono.config import recipe as recipes
from unisono.data.feed import Feed
from unisono.engine import footprint, numerics
from unisono.engine.assignment import shares
from unisono.engine.audit import Audit
from unisono.engine.contribution import Contributes
from unisono.engine.evaluation import measure_all
from unisono.engine.loop import steps
from unisono.engine.profile import Profile
from unisono.engine.replica import tensors_sha256
from unisono.engine.trace import Traced
from unisono.errors import ContractError, DataError, Interrupted, LostPeerError, RecipeError, RunFolderError
from unisono.exchange.protocol import Exchange
from unisono.processes.progress_table import REGROUP, RUNNING, STOP
from unisono.runtime.launchers.rank_assignment import count_peers
from unisono.runtime.setup import Job, Ready, Run, join, run_facts
from unisono.runtime.supervisor_client import SupervisorClient, UnsupervisedClient
from unisono.storage.checkpoints import name_checkpoint
from unisono.storage.elsewhere import write_or_rescue
from unisono.storage.files import save_tensors, whole_folder, write_text
from unisono.storage.run_folder import SUMMARY, begin
from unisono.tasks.metrics import summarise
from unisono.tracking import events
from unisono.tracking import profile_report as profiles

CHANGED = (
    "the data was written into while it was trained on, so the weights belong to no data that still exists. Leave it "
    "alone until training has ended, or give a copy of it (frame.copy(), array.copy(), a copied file); a prepared "
    "dataset that is not what it was is deleted, and prepared again. Checkpoints from before are whole."
)


def execute(job: Job, ready: Ready, exchange: Exchange, client: SupervisorClient) -> bool:
    """Train, test and export; leave everything in `job.folder`. Every worker of a group calls this.

    Returns whether the run is complete; false: another group of workers goes on.

    Raises:
        Interrupted: a stop was requested on some worker; a checkpoint was written.
        LostPeerError: another worker has ended.
        UnisonoError: as its subclasses say.
    """
    if ready.profile:
        exchange = ready.profile.join(exchange, client.progress, ready.device)
    run = join(job, ready, exchange, client)
    client.request()  # from here on a stop waits for the end of its step, on every worker
    exchange.wait_for_all()
    if exchange.rank == 0 and not run.recovered:
        _open_folder(run)
    _announce(run)
    contributor = ready.profile.mark(run.contributor) if ready.profile else run.contributor
    traced = Traced(contributor, job.trace, exchange.rank) if job.trace else None
    feed = Feed(run.inputs.train, run.order, ready.device, run.progress, run.recipe.train.loader_workers)
    try:
        request = _follow(run, feed, traced or contributor, traced)
    finally:
        feed.close()
        if traced:
            traced.close()
    if request == REGROUP:
        return False
    if run.saved_step != run.state.step:
        _save(run)
    if request == STOP:  # worker 0 may be lost before the others leave: no worker leaves before all have the request
        if ready.profile:
            _write_profile(run, ready.profile, None)
        unwritten = exchange.add_integers(torch.tensor([int(not client.settle())]))
        raise Interrupted(_tell_stop(run, not unwritten.item()))
    _finish(run, feed)
    return True


def _tell_stop(run: Run, saved: bool) -> str:
    if saved:
        is_here = name_checkpoint(run.job.folder / "checkpoints", run.state.step).is_dir()
        where = f"`--run-folder {run.job.folder} --resume`" if is_here else "the folder that the last warning names"
        return (
            f"stopped after step {run.state.step} of {run.order.total_steps}, which is saved. Go on with the same "
            f"command and {where} (run=…, resume=True), on any number of workers."
        )
    return (
        f"stopped after step {run.state.step} of {run.order.total_steps}, which could not be saved: the "
        "messages above say why. Go on from the last checkpoint, if there is one, with --resume (resume=True)."
    )


def _open_folder(run: Run) -> None:
    folder = run.job.folder
    if run.job.resume != "no" or not count_peers():  # else it is made already
        folder.mkdir(parents=True, exist_ok=True)
    else:
        begin(folder)
    if run.state.lineage and (folder / SUMMARY).exists() and run.state.step < run.order.total_steps:
        (folder / SUMMARY).rename(folder / f"summary-step-{run.state.step:08}.json")  # of the end that it goes beyond
    write_text(folder / "recipe.toml", recipes.to_toml(run.recipe, run.inputs.unused))
    write_text(folder / "fingerprint.json", json.dumps(run.fingerprint, indent=1) + "\n")


def _announce(run: Run) -> None:
    train, state = run.recipe.train, run.state
    run.tell(
        events.RunStarted(
            name=run.recipe.name,
            folder=str(run.job.folder),
            workers=run.exchange.workers,
            device=str(run.fingerprint["device"]),
            threads=train.threads,
            microbatches_each=[len(share) for share in shares(train.microbatches, run.exchange.workers)],
            samples_per_step=train.samples_per_step,
            train_samples=len(run.inputs.train),
            steps=run.order.total_steps,
            steps_per_epoch=run.order.steps_per_epoch,
            start_step=state.step,
            fingerprint=numerics.digest(run.fingerprint),
            parameters=sum(one.value.numel() for one in state.replica.backend.parameters()),
            pure=run.pure,
        )
    )


def _follow(run: Run, feed: Feed, contributor: Contributes, traced: Traced | None) -> int:
    """Train, and attend to each committed step. Return what ended it: a request, or progress_table.RUNNING at the
    end."""
    state = run.state
    if state.step and state.last is not None:
        _attend(run, 0.0, 0.0)  # the worker that attended to this step may have been lost before the end
    if state.finished or _has_settled(run):
        return RUNNING
    audit = Audit(
        contributor,
        run.judge,
        run.exchange,
        run.order,
        take=feed.take,
        tell=lambda found: run.client.tell(events.Corrupted(**dataclasses.asdict(found))),
        every=run.recipe.train.audit_every,
    )
    last, waited = time.perf_counter(), 0.0
    train, request, at = run.recipe.train, run.client.request, run.progress.at
    watched = run.ready.profile.watch(audit) if run.ready.profile else audit
    for done in steps(state, run.order, feed, watched, train, request, audit.check, at):
        if traced and run.exchange.rank == 0:
            traced.record_weights(state.step, state.replica)
        _attend(run, time.perf_counter() - last, feed.waited_seconds - waited)
        if _has_settled(run):
            evaluate = run.recipe.evaluate
            run.tell(
                events.Notice(message=f"stopping early: no better {evaluate.metric} in {evaluate.patience} evaluations")
            )
            return RUNNING
        if state.finished:
            run.tell(events.Notice(message=f"ending after step {state.step}: an observer requested it"))
        if done.totals.request != RUNNING:
            return done.totals.request
        last, waited = time.perf_counter(), feed.waited_seconds
    return RUNNING


def _attend(run: Run, seconds: float, data_seconds: float) -> None:
    """Do what follows a committed step: report, evaluate, save. Doing it again changes nothing."""
    state, lengths = run.state, run.inputs.train.lengths
    assert state.last is not None
    _refuse_overwritten(run)
    run.progress.at("report", state.step - 1)
    step = run.order.step(state.step - 1)
    run.tell(
        events.StepDone(
            step=state.step,
            epoch=round(run.epoch(), 6),
            loss=state.last["loss"],
            gradient_norm=state.last["norm"],
            learning_rate=state.last["rate"],
            samples=step.samples,
            tokens=int(sum(lengths[piece].sum() for piece in step.microbatches)),
            seconds=seconds,
            data_seconds=data_seconds,
        )
    )
    if state.step == run.order.total_steps:
        return
    _evaluate_if_due(run)
    every = run.recipe.checkpoint.every_steps
    if every and state.step % every == 0 and state.step != run.saved_step:
        _save(run)


def _evaluate_if_due(run: Run) -> None:
    if not run.state.evaluated and _is_due(run) and run.state.step < run.order.total_steps:
        _evaluate(run)


def _has_settled(run: Run) -> bool:
    """Whether early stopping is on and its patience is over."""
    patience = run.recipe.evaluate.patience
    return bool(patience) and run.state.evaluations_since_best >= patience


def _find_stopper(run: Run) -> str | None:
    """The reason why training ended before its last step."""
    stopped = "observer" if run.state.finished else "evaluate.patience"
    return stopped if run.state.step < run.order.total_steps else None


def _is_due(run: Run) -> bool:
    """Whether an evaluation follows this step."""
    evaluate, step = run.recipe.evaluate, run.state.step
    if evaluate.every_steps:
        return step % evaluate.every_steps == 0
    if not evaluate.every_epochs:
        return False
    period = evaluate.every_epochs * run.order.steps_per_epoch
    return math.floor(step / period) > math.floor((step - 1) / period)


def _evaluate(run: Run) -> None:
    """Score the validation samples (or the test samples, for information only); keep the best weights where the recipe
    says so."""
    split, source = ("validation", run.inputs.validation) if run.inputs.validation else ("test", run.inputs.test)
    if source is None:
        return
    scores = _score(run, source)
    best = False
    metric, keep = run.recipe.evaluate.metric, run.recipe.evaluate.keep_best
    used, higher = keep or run.recipe.evaluate.patience, run.inputs.higher_is_better(run.recipe)
    if used and metric not in scores:  # it was there in the trial
        raise RecipeError(f"'evaluate.metric' = {metric!r}: measured are {', '.join(scores)}. Name one of them.")
    if run.inputs.validation is not None and metric in scores and higher is not None:
        if keep:  # a checkpoint that is being written may still read the best weights
            run.client.settle()
            run.exchange.wait_for_all()
        best = run.state.judge(scores[metric], higher=higher, keep=keep)
    run.tell(events.Evaluated(step=run.state.step, epoch=round(run.epoch(), 6), split=split, scores=scores, best=best))
    run.state.note_evaluation()


def _score(run: Run, source: Any) -> dict[str, float]:
    with run.state.averaged_weights():
        results = measure_all(
            run.state.replica.backend,
            run.inputs.task.measure,
            source,
            run.exchange,
            device=run.ready.device,
            samples_per_microbatch=run.recipe.evaluate.samples_per_microbatch,
            seed=run.recipe.train.seed,
            progress=run.progress,
            loaders=run.recipe.train.loader_workers,
        )
    if not results:
        raise ContractError('the task\'s measure returned nothing. Return at least {"loss": one number per sample}.')
    return summarise(results, run.inputs.task.metrics())


def _save(run: Run) -> None:
    run.progress.at("save", run.state.step - 1)
    facts = run_facts(run.job, run.ready, run.order.total_steps)
    run.client.save(run.state, facts, run.job.folder, run.recipe.checkpoint.keep)
    run.saved_step = run.state.step


def _write_profile(run: Run, profile: Profile, feed: Feed | None) -> None:
    """Put the workers' profiles together; report where time was spent, and write it to the run folder. Without a feed,
    no microbatch is computed again for measurements."""

    def again(step: int, number: int) -> None:
        assert feed is not None
        run.judge.contribute(step, number, feed.take(run.order.step(step), number))

    measured = footprint.describe(
        profile,
        run.state,
        again if feed else None,
        precision=run.recipe.train.precision,
        memory=run.client.memory,
        wait_for_all=run.exchange.wait_for_all,
    )
    contents = run.exchange.gather_bytes(json.dumps(profile.told() | measured).encode())
    if run.exchange.rank:
        return
    facts = {"name": run.recipe.name, "device": str(run.ready.device), "threads": run.recipe.train.threads}
    try:
        told = profiles.write(run.job.folder, [json.loads(content) for content in contents], facts)
        run.tell(events.Notice(message=told))
    except Exception as error:  # noqa: BLE001 - a failed report must not end the run
        run.tell(events.Notice(message=f"the profile was not written: {error}", warning=True))


def _refuse_overwritten(run: Run) -> None:
    """Refuse to go on after the dataset's files were written into. Only where they were touched are they read."""
    if run.inputs.touched():
        run.progress.at("prepare", run.state.step - 1)  # it may take long, and has no deadline
        if run.inputs.overwritten():
            raise DataError(CHANGED)


def _refuse_changed_data(run: Run) -> None:
    """Refuse data that was changed during training: then the hash is not that of the data seen."""
    changed = run.exchange.add_integers(torch.tensor([int(run.inputs.changed())]))
    if changed.item():
        raise DataError(CHANGED)


def _export(run: Run, tensors: dict[str, torch.Tensor], place: Path) -> None:
    """Write the model into a run folder, or another one."""
    with whole_folder(place / "model") as part:
        save_tensors(part / "model.safetensors", tensors)
        run.inputs.export(part)


def _finish(run: Run, feed: Feed) -> None:
    """Evaluate and test, write model/, report the summary."""
    state, folder = run.state, run.job.folder
    run.progress.at("finish", state.step - 1)
    if run.inputs.validation is not None and not state.evaluated:
        _evaluate(run)
    optimizer_sha256 = tensors_sha256(state.optimizer_tensors())
    if run.ready.profile:
        _write_profile(run, run.ready.profile, feed)
    if run.recipe.evaluate.keep_best:
        state.take_best()
    evaluate = run.recipe.evaluate
    if (evaluate.keep_best or evaluate.patience) and state.evaluations_since_best and state.best_score is None:
        told = f"{evaluate.metric!r} was NaN in all {state.evaluations_since_best} evaluations"
        run.tell(
            events.Notice(message=f"{told}, so none was the best: the model is that of the last step", warning=True)
        )
    test = _score(run, run.inputs.test) if run.inputs.test is not None else None
    run.progress.at("finish", state.step - 1)  # again: what follows may take longer than a step
    _refuse_changed_data(run)
    with state.averaged_weights():
        if run.exchange.rank == 0:
            run.client.settle()  # a checkpoint that fills the disk frees the space before the model needs it
            tensors = state.replica.tensors()
            place, why = write_or_rescue(folder, lambda place: _export(run, tensors, place))
            summary = {
                "name": run.recipe.name,
                "steps": state.step,
                "epochs": round(run.epoch(), 6),
                "workers": run.exchange.workers,
                "device": run.fingerprint["device"],
                "fingerprint": numerics.digest(run.fingerprint),
                "pure": run.pure,
                "train": {"loss": state.last["loss"] if state.last else None, "samples": len(run.inputs.train)},
                "test": test,
                "best_step": state.best_step or None,
                "stopped_by": _find_stopper(run),
                "lineage": state.lineage,
                "weights_sha256": tensors_sha256(tensors),
                "optimizer_sha256": optimizer_sha256,
            }
            if test is not None:
                run.tell(
                    events.Evaluated(
                        step=state.step, epoch=round(run.epoch(), 6), split="test", scores=test, best=False
                    )
                )
            if why:
                write_text(place / SUMMARY, json.dumps(summary, indent=1) + "\n")
                raise RunFolderError(f"{why} The model and its summary are in {str(place)!r} instead, and are whole.")
            run.tell(events.RunEnded(folder=str(folder), summary=summary))
    try:
        run.exchange.wait_for_all()
    except LostPeerError:
        # a worker that leaves has passed this meeting, so all had come; the reset of its connections may arrive first
        if not isinstance(run.client, UnsupervisedClient):
            raise  # a supervisor sees whether it left or was lost
