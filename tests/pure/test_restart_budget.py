"""The rules of [recovery]: when a loss ends the run, how long to wait, what it is called."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.config.run_sections import Recovery
from unisono.errors import DivergedError, ImpureError, RecipeError, WorkerError
from unisono.runtime.restart_budget import (
    MOST_BACKOFF_SECONDS,
    Change,
    End,
    Loss,
    RestartBudget,
    find_verdict,
    name_loss,
)
from unisono.tracking import events


def rules(**given: Any) -> Recovery:
    return Recovery.model_validate({"attempts": 3, "restarts": 100, "backoff_seconds": 1.0, **given})


def lost(step: int, cause: str = "", what: str = "worker 1 was killed by SIGKILL") -> Loss:
    return Loss(step=step, what=what, cause=cause)


def report(kind: str = "ValueError", message: str = "made for the test", **more: Any) -> dict[str, Any]:
    return {
        "rank": 0, "kind": kind, "message": message, "known": False, "symptom": False, "traceback": f"Traceback: {message}",
        "when": 1.0, **more,
    }  # fmt: skip


def test_a_loss_here_and_there_is_overcome() -> None:
    budget = RestartBudget(rules())
    assert [budget.spend(lost(step)) for step in (-1, 3, 4, 9, 9, 12, 12)] == [""] * 7
    assert budget.attempts == 2


def test_no_restart() -> None:
    end = RestartBudget(rules(restarts=0)).spend(lost(4))
    assert end == "worker 1 was killed by SIGKILL; this was loss 1, and recovery.restarts = 0"


def test_restarts_are_counted_over_the_run() -> None:
    budget = RestartBudget(rules(restarts=2))
    assert budget.spend(lost(4)) == "" == budget.spend(lost(5))
    assert "this was loss 3, and recovery.restarts = 2" in budget.spend(lost(6))


def test_a_fault_that_repeats() -> None:
    budget = RestartBudget(rules())
    assert budget.spend(lost(4)) == "" == budget.spend(lost(4))
    assert budget.spend(lost(4)) == (
        "worker 1 was killed by SIGKILL; this was loss 3 in a row at step 5, so the fault repeats"
    )


def test_a_fault_that_repeats_before_any_step() -> None:
    budget = RestartBudget(rules(attempts=2))
    assert budget.spend(lost(-1)) == ""
    assert "2 in a row at the start, so the fault repeats" in budget.spend(lost(-1))


def test_one_attempt_only() -> None:
    assert "the fault repeats" in RestartBudget(rules(attempts=1)).spend(lost(7))


def test_an_exception_is_tried_again_once() -> None:
    budget = RestartBudget(rules(attempts=9))
    assert budget.spend(lost(4, "ValueError: no", "worker 1 failed")) == ""
    assert budget.spend(lost(4, "ValueError: no", "worker 1 failed")) == (
        "worker 1 failed twice with the same error at step 5: it would come again"
    )


@pytest.mark.parametrize("second", [lost(5, "ValueError: no"), lost(4, "ValueError: other"), lost(4)])
def test_another_exception_or_step_is_another_fault(second: Loss) -> None:
    budget = RestartBudget(rules(attempts=9))
    assert budget.spend(lost(4, "ValueError: no")) == "" == budget.spend(second)


def test_an_exception_before_anything_was_done_is_not_tried_again() -> None:
    """It may be any mistake of the user's own code, and is told at once."""
    assert RestartBudget(rules()).spend(lost(-1, "ValueError: no", "worker 0 failed")) == (
        "worker 0 failed before anything was done"
    )
    assert RestartBudget(rules()).spend(lost(0, "ValueError: no", "worker 0 failed")) == ""


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=30))
def test_attempts_are_losses_in_a_row(steps: list[int]) -> None:
    budget = RestartBudget(rules(attempts=100))
    for step in steps:
        assert budget.spend(lost(step)) == ""
    ahead = [step != steps[-1] for step in reversed(steps)]
    assert budget.attempts == (ahead.index(True) if True in ahead else len(steps))


def test_backoff_doubles_up_to_a_minute() -> None:
    budget = RestartBudget(rules(attempts=100, backoff_seconds=1.5))
    waits = []
    for _ in range(9):
        assert budget.spend(lost(4)) == ""
        waits.append(budget.backoff_seconds)
    assert waits == [0.0, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0]
    assert MOST_BACKOFF_SECONDS == 60.0
    assert budget.spend(lost(5)) == "" and budget.backoff_seconds == 0.0  # a step was done in between


def test_ends_in_words() -> None:
    loss = name_loss(
        [
            End(worker=0, code=-signal.SIGKILL),
            End(worker=2, code=-signal.SIGSEGV, stacks="Fatal Python error"),
            End(worker=3, code=9),
            End(worker=4, code=70, report=report()),
        ],
        step=6,
    )
    assert loss.what == (
        "worker 0 was killed by SIGKILL (out of memory? dmesg tells), worker 2 was killed by SIGSEGV, "
        "worker 3 ended with exit code 9, worker 4 failed (ValueError: made for the test)"
    )
    assert (loss.step, loss.cause, loss.trace) == (6, "ValueError: made for the test", "Fatal Python error")
    assert loss.frames == "Fatal Python error"


def test_where_it_was_raised_is_kept_short() -> None:
    lines = [f"line {number}" for number in range(40)]
    trace, message = "\n".join(lines), "no\nmore " + "x" * 300
    raised = name_loss([End(worker=1, code=70, report=report(message=message, traceback=trace))], step=3)
    assert raised.what == "worker 1 failed (ValueError: no)"
    assert raised.frames.splitlines() == lines[-12:] and raised.trace == trace, "the innermost frames are the last"
    long = name_loss([End(worker=1, code=70, report=report(message="x" * 300))], step=3)
    assert long.what == f"worker 1 failed (ValueError: {'x' * 188} …)"
    crashed = name_loss([End(worker=1, code=-signal.SIGSEGV, stacks=trace)], step=3)
    assert crashed.frames.splitlines() == lines[:12], "the innermost frames are the first"
    told = Change(since=0.0, lost=raised.what, frames=raised.frames).conclude(started(), 1.0)[0]
    assert isinstance(told, events.Recovered) and told.trace == raised.frames


def test_a_killed_worker_has_no_cause() -> None:
    loss = name_loss([End(worker=0, code=-signal.SIGTERM)], step=0)
    assert (loss.what, loss.cause, loss.trace) == ("worker 0 was killed by SIGTERM", "", "")


def test_the_first_traceback_is_told() -> None:
    ends = [End(worker=rank, code=70, report=report(message=f"of {rank}")) for rank in (2, 1)]
    assert name_loss(ends, step=0).trace == "Traceback: of 2"


def test_a_worker_s_own_error_is_the_verdict() -> None:
    ends = [
        End(worker=0, code=-signal.SIGKILL),
        End(worker=1, code=70, report=report("RecipeError", "later", known=True, when=3.0)),
        End(worker=2, code=70, report=report("DivergedError", "first", known=True, when=2.0)),
        End(worker=3, code=70, report=report("LostPeerError", "symptom", known=True, symptom=True, when=1.0)),
        End(worker=4, code=70, report=report("ValueError", "unknown", when=0.5)),
    ]
    verdict = find_verdict(ends)
    assert type(verdict) is DivergedError and str(verdict) == "first"
    verdict = find_verdict(ends[:2])
    assert type(verdict) is RecipeError and str(verdict) == "later"


@pytest.mark.parametrize(
    "end",
    [
        End(worker=0, code=-signal.SIGKILL),
        End(worker=0, code=70, report=report()),
        End(worker=0, code=70, report=report("LostPeerError", known=True, symptom=True)),
    ],
)
def test_no_verdict(end: End) -> None:
    assert find_verdict([end]) is None


def test_an_error_of_the_user_s_own_that_is_known_to_be_deliberate() -> None:
    """A class of his own that inherits from ours cannot be rebuilt here; its message can."""
    verdict = find_verdict([End(worker=0, code=70, report=report("MyOwnError", "no", known=True))])
    assert type(verdict) is WorkerError and str(verdict) == "no"
    assert type(find_verdict([End(worker=0, code=70, report=report("ImpureError", known=True))])) is ImpureError


def test_corruption_costs_a_worker_and_not_the_run() -> None:
    end = End(worker=2, code=70, report=report("CorruptionError", "other bits than worker 0", known=True))
    assert find_verdict([end]) is None
    assert name_loss([end], step=0).what == "worker 2: other bits than worker 0"


def started(workers: int = 3, step: int = 6) -> events.RunStarted:
    return events.RunStarted(
        name="toy", folder="run", workers=workers, device="cpu", threads=1, microbatches_each=[2, 2], samples_per_step=16,
        train_samples=96, steps=18, steps_per_epoch=6, start_step=step, parameters=10, fingerprint="f", pure=True,
    )  # fmt: skip


def test_a_loss_is_told_when_it_is_overcome() -> None:
    (told,) = Change(since=10.0, wasted=0.5, lost="worker 1 failed").conclude(started(), 12.0)
    assert told == events.Recovered(step=6, what="worker 1 failed", workers=3, wasted_seconds=0.5, seconds=2.0)


def test_a_resize_is_told() -> None:
    (told,) = Change(since=10.0, before=2).conclude(started(), 12.0)
    assert told == events.Resized(step=6, before=2, workers=3, seconds=2.0)


def test_a_loss_during_a_resize_is_told_once_in_seconds() -> None:
    recovered, resized = Change(since=10.0, before=2, lost="worker 1 failed").conclude(started(), 12.0)
    assert isinstance(recovered, events.Recovered) and recovered.seconds == 2.0
    assert resized == events.Resized(step=6, before=2, workers=3, seconds=0.0)


def test_nothing_is_told_of_no_change() -> None:
    assert Change(since=10.0).conclude(started(), 12.0) == []


def test_a_resize_stands_still_from_the_first_who_leaves() -> None:
    change = Change(since=1.0, before=2)
    change.stand_still(10.0)
    change.stand_still(11.0)
    (told,) = change.conclude(started(), 12.0)
    assert isinstance(told, events.Resized) and told.seconds == 2.0
