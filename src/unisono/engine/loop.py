"""THE LOOP: a generator of steps. State in, state out; everything else observes what it yields.

Owns the order of the verbs. Evaluation, checkpoints and reports belong to the caller that iterates (`runtime/run.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from unisono.config.sections import Train
from unisono.data.feed import Feed
from unisono.data.order import Order, Step
from unisono.engine.contribution import Contributes
from unisono.engine.reduction import Reduction, Totals
from unisono.engine.schedule import rate
from unisono.engine.state import TrainState
from unisono.processes.progress_table import RUNNING, UNWATCHED


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A committed step and what is known of it."""

    step: Step
    totals: Totals
    norm: float
    rate: float


def steps(
    state: TrainState,
    order: Order,
    feed: Feed,
    contributor: Contributes,
    train: Train,
    request: Callable[[], int] = lambda: RUNNING,
    check: Callable[[Step, Sequence[range]], None] = lambda step, shares: None,
    at: Callable[[str, int, int], None] = UNWATCHED.at,
) -> Iterator[Done]:
    """Train from `state.step` to the order's end, or until any worker's `request` is more than RUNNING; yield after
    each committed step. `check` audits contributions before they are added up; `at` is called before every verb."""
    reduction = Reduction(state.replica, state.exchange)
    for step in order.steps(start=state.step):
        at("begin", step.number, -1)
        mine = reduction.begin(step)  # the only thing that depends on this worker's rank
        for number, microbatch in feed.load(step, mine):
            at("contribute", step.number, number)
            reduction.add(number, contributor.contribute(step.number, number, microbatch))
        at("audit", step.number, -1)
        check(step, reduction.shares)
        at("reduce", step.number, -1)
        gradient, totals = reduction.finish(request())  # the same bits for any number of workers
        at("update", step.number, -1)
        now = rate(train, step.number, order.total_steps)
        norm = state.optimizer.update(gradient, totals, step=step.number, rate=now)
        at("commit", step.number, -1)
        state.commit(step.number + 1, totals, {"loss": totals.loss, "norm": norm, "rate": now})  # for all, or for none
        yield Done(step=step, totals=totals, norm=norm, rate=now)
        if totals.request != RUNNING:
            return
