"""One training run as each worker lives it, from the first step to the finished model.

Owns the order of things around the loop: when to report, evaluate and save, and what is left in the run folder. What
comes before is `joining.py`, the loop itself `loop.py`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from unisono import events
from unisono import recipe as recipes
from unisono.checkpoint import checkpoints
from unisono.data.feed import Feed
from unisono.engine import numerics
from unisono.engine.assignment import shares
from unisono.engine.replica import tensors_sha256
from unisono.engine.trace import Traced
from unisono.errors import ContractError, Interrupted, RecipeError
from unisono.evaluation import measure_all
from unisono.exchange.protocol import Exchange
from unisono.files import save_tensors, whole_folder, write_text
from unisono.joining import Job, Run, decisive, join
from unisono.loop import Done, steps
from unisono.material import Material
from unisono.scores import summarise


def execute(
    job: Job,
    material: Material,
    exchange: Exchange,
    device: torch.device,
    observers: Sequence[events.Observer],
    stop: Callable[[], bool],
) -> None:
    """Train, test and export; leave everything in `job.folder`. Every worker calls this.

    Raises:
        Interrupted: `stop` became true somewhere; a checkpoint was written.
        UnisonoError: as its subclasses say.
    """
    run = join(job, material, exchange, device, observers)
    stop()  # from here on an interrupt waits for the end of its step, on every worker, before anything is written
    exchange.wait_for_all()
    if exchange.rank == 0:
        _open_folder(run)
    _announce(run)
    feed = Feed(material.train, run.order, device)
    traced = Traced(run.contributor, job.trace, exchange.rank) if job.trace else None
    try:
        done = (
            steps(run.state, run.order, feed, traced or run.contributor, run.recipe.train, stop)
            if not _has_settled(run)
            else ()
        )
        interrupted = _follow(run, done, traced)
    finally:
        feed.close()
        if traced:
            traced.close()
    _save(run)
    if interrupted:
        raise Interrupted(
            f"stopped after step {run.state.step} of {run.order.total_steps}, which is saved. Go on with the same "
            "command and "
            f"`--run-folder {job.folder} --resume`, on any number of workers."
        )
    _finish(run)


def _open_folder(run: Run) -> None:
    folder = run.job.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.toml", recipes.to_toml(run.recipe))
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
            train_samples=len(run.material.train),
            steps=run.order.total_steps,
            steps_per_epoch=run.order.steps_per_epoch,
            start_step=state.step,
            fingerprint=numerics.digest(run.fingerprint),
            parameters=sum(parameter.numel() for parameter in state.replica.module.parameters()),
            pure=run.pure,
        )
    )


def _follow(run: Run, done: Iterable[Done], traced: Traced | None) -> bool:
    """Observe each committed step: report, evaluate, save, stop early. Return whether the run was interrupted."""
    recipe, state, lengths = run.recipe, run.state, run.material.train.lengths
    last = time.perf_counter()
    for one in done:
        run.last_loss = one.totals.loss
        run.samples += one.step.samples
        now = time.perf_counter()
        run.tell(
            events.StepDone(
                step=state.step,
                epoch=round(run.epoch(), 6),
                loss=one.totals.loss,
                gradient_norm=one.norm,
                learning_rate=one.rate,
                samples=one.step.samples,
                tokens=int(sum(lengths[piece].sum() for piece in one.step.microbatches)),
                seconds=now - last,
            )
        )
        last = now
        if traced and run.exchange.rank == 0:
            traced.record_weights(state.step, state.replica)
        at_end = state.step == run.order.total_steps
        if _is_due(run) and not at_end:
            _evaluate(run)
            last = time.perf_counter()
        every = recipe.checkpoint.every_steps
        if every and state.step % every == 0 and not at_end:
            _save(run)
        if _has_settled(run):
            run.tell(
                events.Notice(
                    message=f"stopping early: no better {recipe.evaluate.metric} in {recipe.evaluate.patience} "
                    "evaluations"
                )
            )
            return False
        if one.totals.stop:
            return True
    return False


def _has_settled(run: Run) -> bool:
    """Whether early stopping is on and its patience is over."""
    patience = run.recipe.evaluate.patience
    return bool(patience) and run.state.evaluations_since_best >= patience


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
    """Score the validation samples (or, to look at, the test samples); keep the best weights where the recipe says
    so."""
    split, source = ("validation", run.material.validation) if run.material.validation else ("test", run.material.test)
    if source is None:
        return
    scores = _score(run, source)
    run.evaluated_step = run.state.step
    best = False
    metric = run.recipe.evaluate.metric
    if run.material.validation is not None:
        if metric not in scores:
            raise RecipeError(f"'evaluate.metric' = {metric!r}: measured are {', '.join(scores)}. Name one of them.")
        best = run.state.judge(scores[metric], higher=metric != "loss", keep=run.recipe.evaluate.keep_best)
    run.tell(events.Evaluated(step=run.state.step, epoch=round(run.epoch(), 6), split=split, scores=scores, best=best))


def _score(run: Run, source: Any) -> dict[str, float]:
    with run.state.averaged_weights():
        results = measure_all(
            run.state.replica.module,
            run.material.task.measure,
            source,
            run.exchange,
            device=run.device,
            samples_per_microbatch=run.recipe.evaluate.samples_per_microbatch,
            precision=run.recipe.train.precision,
            seed=run.recipe.train.seed,
        )
    if not results:
        raise ContractError('the task\'s measure returned nothing. Return at least {"loss": one number per sample}.')
    return summarise(results)


def _save(run: Run) -> None:
    facts = {
        "fingerprint": dict(run.fingerprint),
        "recipe": decisive(run.recipe),
        "total_steps": run.order.total_steps,
    }
    path = checkpoints.save(run.state, run.job.folder / "checkpoints", facts=facts, keep=run.recipe.checkpoint.keep)
    run.tell(events.CheckpointWritten(step=run.state.step, path=str(path)))


def _finish(run: Run) -> None:
    """Evaluate and test, write model/ and summary.json."""
    state, folder = run.state, run.job.folder
    if run.material.validation is not None and run.evaluated_step != state.step:
        _evaluate(run)
    optimizer_sha256 = tensors_sha256(state.optimizer_tensors())
    seconds = time.perf_counter() - run.started
    if run.recipe.evaluate.keep_best:
        state.take_best()
    test = _score(run, run.material.test) if run.material.test is not None else None
    with state.averaged_weights():
        if run.exchange.rank == 0:
            tensors = state.replica.tensors()
            with whole_folder(folder / "model") as part:
                save_tensors(part / "model.safetensors", tensors)
                run.material.export(part)
            summary = {
                "name": run.recipe.name,
                "steps": state.step,
                "epochs": round(run.epoch(), 6),
                "seconds": round(seconds, 3),
                "samples_per_second": round(run.samples / seconds, 2),
                "workers": run.exchange.workers,
                "device": run.fingerprint["device"],
                "fingerprint": numerics.digest(run.fingerprint),
                "pure": run.pure,
                "train": {"loss": run.last_loss if run.samples else None, "samples": len(run.material.train)},
                "test": test,
                "best_step": state.best_step or None,
                "weights_sha256": tensors_sha256(tensors),
                "optimizer_sha256": optimizer_sha256,
            }
            if test is not None:
                run.tell(
                    events.Evaluated(
                        step=state.step, epoch=round(run.epoch(), 6), split="test", scores=test, best=False
                    )
                )
            write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
            run.tell(events.RunEnded(folder=str(folder), summary=summary))
    run.exchange.wait_for_all()
