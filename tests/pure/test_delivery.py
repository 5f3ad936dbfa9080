"""Each step reaches a logger once, over repeated events, resumes and failures; user's observers stop a run or fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.errors import ObserverError
from unisono.tracking import events, logger
from unisono.tracking.delivery import Deliveries
from unisono.tracking.dispatcher import EventDispatcher
from unisono.tracking.events import (
    CheckpointWritten,
    Evaluated,
    Event,
    Notice,
    Recovered,
    RunEnded,
    RunStarted,
    StepDone,
)
from unisono.tracking.reporter import Reporter


class Listing:
    """A second logger, which keeps what it gets; it fails at step `fails_at`."""

    got: list[Event]
    closed: int
    memories: list[dict[str, str]]
    fails_at = 0

    def __init__(self, context: logger.LoggerContext) -> None:
        type(self).memories.append(dict(context.memory))
        context.memory["name"] = "mine"

    def observe(self, event: Event) -> None:
        if isinstance(event, StepDone) and event.step == self.fails_at:
            raise ConnectionError("no network")
        self.got.append(event)

    def flush(self) -> None:
        return

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Listing]]:
    Listing.got, Listing.closed, Listing.memories, Listing.fails_at = [], 0, [], 0
    monkeypatch.setattr(logger, "_registered", {"listing": Listing})
    yield Listing


def make_recipe(**train: Any) -> Recipe:
    return recipes.check({"tracking": {"loggers": ["listing"]}, "train": train})


def start(folder: Path, step: int = 0) -> RunStarted:
    return RunStarted(
        name="n", folder=str(folder), workers=2, device="cpu", threads=1, microbatches_each=[1, 1], samples_per_step=8,
        train_samples=80, steps=20, steps_per_epoch=10, start_step=step, parameters=1, fingerprint="f", pure=True,
    )  # fmt: skip


def do(step: int) -> StepDone:
    return StepDone(
        step=step,
        epoch=step / 10,
        loss=1.0 / step,
        gradient_norm=1.0,
        learning_rate=0.1,
        samples=8,
        tokens=8,
        seconds=0.1,
    )


def recover(step: int) -> Recovered:
    return Recovered(step=step, what="worker 1 was killed", workers=2, wasted_seconds=0.0, seconds=0.1)


def evaluate(step: int) -> Evaluated:
    return Evaluated(step=step, epoch=step / 10, split="validation", scores={"loss": 0.5}, best=False)


def play(folder: Path, told: list[Event], recipe: Recipe | None = None) -> list[str]:
    """One process that trains: the ledger first, then the loggers, as the dispatcher has it. Returns the warnings."""
    warned: list[str] = []
    folder.mkdir(exist_ok=True)
    dispatcher = EventDispatcher(Reporter(folder, quiet=True, as_json=False))

    def warn(message: str) -> None:
        warned.append(message)
        dispatcher.warn(message)

    dispatcher.loggers = Deliveries(recipe or make_recipe(), warn)
    for event in told:
        dispatcher.observe(event)
    dispatcher.close()
    return warned


def steps_of(got: list[Event]) -> list[int]:
    return [event.step for event in got if isinstance(event, StepDone)]


def test_what_is_told_again_after_a_loss_arrives_once(listing: type[Listing], tmp_path: Path) -> None:
    checkpoint = CheckpointWritten(step=2, path="p")
    play(
        tmp_path,
        [
            start(tmp_path),
            do(1),
            do(2),
            evaluate(2),
            checkpoint,
            recover(2),
            do(2),
            evaluate(2),
            checkpoint,
            do(3),
            recover(3),
        ],
    )
    kinds = [type(event).__name__ for event in listing.got]
    assert kinds == [
        "RunStarted",
        "StepDone",
        "StepDone",
        "Evaluated",
        "CheckpointWritten",
        "Recovered",
        "StepDone",
        "Recovered",
    ]
    assert steps_of(listing.got) == [1, 2, 3]
    assert listing.closed == 1


def test_a_resumed_run_neither_repeats_nor_loses_steps(listing: type[Listing], tmp_path: Path) -> None:
    """Resumed from step 10, where the log already has steps to 14."""
    play(tmp_path, [start(tmp_path), *map(do, range(1, 11)), evaluate(10), *map(do, range(11, 15))])
    play(tmp_path, [start(tmp_path, 10), *map(do, range(11, 17))])
    assert steps_of(listing.got) == list(range(1, 17))
    assert [event.step for event in listing.got if isinstance(event, Evaluated)] == [10]
    assert listing.memories == [{}, {"name": "mine"}]


def test_a_logger_that_failed_gets_what_it_lacks_when_the_run_is_resumed(
    listing: type[Listing], tmp_path: Path
) -> None:
    listing.fails_at = 4
    warned = play(tmp_path, [start(tmp_path), do(1), do(2), do(3), do(4), recover(4), do(5), evaluate(5), do(6)])
    assert len(warned) == 1 and "listing failed (ConnectionError: no network)" in warned[0]
    assert listing.closed == 1
    listing.fails_at = 0
    got = len(listing.got)
    listing.got = listing.got[: got - 3]  # nothing was flushed, so steps 1 to 3 count as lost
    assert play(tmp_path, [start(tmp_path, 5), do(6), do(7)]) == []
    assert steps_of(listing.got) == [1, 2, 3, 4, 5, 6, 7]
    assert [type(event).__name__ for event in listing.got if not isinstance(event, StepDone)] == [
        "RunStarted",
        "RunStarted",
        "Recovered",
        "Evaluated",
    ]


def test_a_logger_that_is_new_to_a_run_gets_its_history(listing: type[Listing], tmp_path: Path) -> None:
    play(tmp_path, [start(tmp_path), do(1), recover(1), do(2), evaluate(2), do(3)], recipes.check({}))
    assert listing.got == []
    play(tmp_path, [start(tmp_path, 2), do(3)])
    assert [type(event).__name__ for event in listing.got] == [
        "RunStarted",
        "StepDone",
        "Recovered",
        "StepDone",
        "Evaluated",
        "StepDone",
    ]


def test_another_recipe_that_begins_anew_in_the_folder_has_a_log_of_its_own(
    listing: type[Listing], tmp_path: Path
) -> None:
    play(tmp_path, [start(tmp_path), do(1), do(2)])
    play(tmp_path, [start(tmp_path), do(1), do(2)], make_recipe(seed=1))
    assert steps_of(listing.got) == [1, 2, 1, 2]
    assert listing.memories == [{}, {}]


def test_steps_are_thinned_but_evaluations_are_not(listing: type[Listing], tmp_path: Path) -> None:
    thin = recipes.check({"tracking": {"loggers": ["listing"], "every_steps": 5}})
    play(tmp_path, [start(tmp_path), *map(do, range(1, 12)), evaluate(11)], thin)
    assert steps_of(listing.got) == [1, 5, 10]
    assert isinstance(listing.got[-1], Evaluated)


def test_a_logger_that_cannot_be_opened_does_not_end_the_run(
    listing: type[Listing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Listing, "__init__", lambda self, context: 1 / 0)
    assert len(play(tmp_path, [start(tmp_path), do(1), do(2)])) == 1


class Callback:
    """An observer that answers `answer` to step `at`, or raises it."""

    def __init__(self, at: int, answer: Any) -> None:
        self.at, self.answer = at, answer
        self.steps: list[int] = []
        self.closed = 0

    def observe(self, event: Event) -> Any:
        if not isinstance(event, StepDone):
            return None
        self.steps.append(event.step)
        if event.step == self.at and isinstance(self.answer, Exception):
            raise self.answer
        return self.answer if event.step == self.at else None

    def close(self) -> None:
        self.closed += 1


def test_an_observer_that_asks_for_the_end_is_named_in_the_summary(tmp_path: Path) -> None:
    callback = Callback(2, events.STOP)
    dispatcher = EventDispatcher(Reporter(tmp_path, quiet=True, as_json=False), [callback])
    assert [dispatcher.observe(event) for event in (start(tmp_path), do(1), do(2), do(2), do(3))] == [
        None,
        None,
        "stop",
        None,
        None,
    ]
    ends: list[Event] = []
    dispatcher.loggers = type(
        "Ends", (), {"observe": lambda self, event: ends.append(event), "close": lambda self: None}
    )()
    dispatcher.observe(RunEnded(folder=str(tmp_path), summary={"stopped_by": "observer"}))
    dispatcher.close()
    assert callback.steps == [1, 2, 3] and callback.closed == 1
    assert isinstance(ends[0], RunEnded) and ends[0].summary["stopped_by"] == "observer Callback"
    assert "goodput" in ends[0].summary  # loggers get the summary that the ledger has completed


@pytest.mark.parametrize(
    ("answer", "told"),
    [(ValueError("mine"), "ValueError: mine"), (True, "returned True; allowed are None and unisono.STOP")],
)
def test_an_observer_that_fails_is_named_and_keeps_no_other_from_the_event(
    answer: Any, told: str, tmp_path: Path
) -> None:
    bad, good = Callback(2, answer), Callback(0, None)
    dispatcher = EventDispatcher(Reporter(tmp_path, quiet=True, as_json=False), [bad, good])
    dispatcher.observe(start(tmp_path))
    dispatcher.observe(do(1))
    with pytest.raises(ObserverError, match=f"observer Callback failed on StepDone of step 2: .*{told}") as raised:
        dispatcher.observe(do(2))
    assert isinstance(raised.value.__cause__, ValueError | TypeError)
    dispatcher.observe(do(3))
    dispatcher.close()
    assert (bad.steps, good.steps, bad.closed, good.closed) == ([1, 2], [1, 2, 3], 1, 1)


def test_notices_from_before_the_start_reach_loggers(listing: type[Listing], tmp_path: Path) -> None:
    play(tmp_path, [Notice(message="early"), start(tmp_path)])
    assert [type(event).__name__ for event in listing.got] == ["RunStarted", "Notice"]
