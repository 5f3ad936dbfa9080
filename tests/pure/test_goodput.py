"""Goodput: every second of the wall time is of one kind, and of the right one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.tracking.goodput import KINDS, goodput, measure_speed

Line = dict[str, Any]


def step(when: float, seconds: float = 1.0, data_seconds: float = 0.0, number: int = 1) -> Line:
    return {"event": "StepDone", "step": number, "seconds": seconds, "data_seconds": data_seconds, "when": when}


def start(when: float, since: float) -> Line:
    return {"event": "RunStarted", "start_step": 0, "since": since, "when": when}


def recovered(when: float, wasted: float, seconds: float, number: int = 1) -> Line:
    return {"event": "Recovered", "step": number, "wasted_seconds": wasted, "seconds": seconds, "when": when}


def saved(when: float, waited: float) -> Line:
    return {"event": "CheckpointWritten", "step": 1, "seconds": 9.0, "waited_seconds": waited, "when": when}


def other(event: str, when: float, **fields: Any) -> Line:
    return {"event": event, "step": 1, **fields, "when": when}


def kinds(lines: list[Line], until: float | None = None) -> dict[str, float]:
    """The kinds that took time."""
    found = goodput(lines, until=until)
    assert found["wall_seconds"] == pytest.approx(sum(found["seconds"].values()))
    return {kind: seconds for kind, seconds in found["seconds"].items() if seconds}


BEGUN = [start(102.0, since=100.0)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([step(103.0)], {"steps": 1.0}),
        ([step(103.0, 1.0, 0.25)], {"steps": 0.75, "data": 0.25}),
        ([step(103.5, 1.0)], {"steps": 1.5}),
        ([step(103.0), other("Evaluated", 103.5)], {"steps": 1.0, "evaluation": 0.5}),
        ([step(103.0), other("Notice", 103.2), step(104.0)], {"steps": 2.0}),
        # asynchronous: told in the middle of a step; its waiting lies in a step
        ([step(103.0), saved(103.5, 0.2), step(104.0)], {"steps": 1.8, "saving": 0.2}),
        ([step(103.0), saved(103.01, 0.2), step(104.0)], {"steps": 1.8, "saving": 0.2}),
        # the last one is waited for, and no step follows
        ([step(103.0), saved(103.5, 0.5), other("Evaluated", 104.0)], {"steps": 1.0, "saving": 0.5, "evaluation": 0.5}),
        ([step(103.0), recovered(104.0, 0.4, 0.6)], {"steps": 1.0, "waste": 0.4, "recovery": 0.6}),
        # lost during an evaluation
        ([step(103.0), recovered(105.0, 0.4, 0.6)], {"steps": 1.0, "waste": 1.4, "recovery": 0.6}),
        # a step that was committed before the loss, but told after the recovery began
        ([step(104.0), recovered(104.0, 0.4, 0.6)], {"steps": 1.0, "waste": 0.4, "recovery": 0.6}),
        # a claim that nothing bears out takes no step's own seconds
        ([step(103.0), recovered(103.0, 0.4, 0.6)], {"steps": 1.0}),
        ([step(103.0), other("Resized", 103.7, seconds=0.7)], {"steps": 1.0, "recovery": 0.7}),
        ([step(103.0), other("Corrupted", 104.0), step(105.0)], {"steps": 2.0, "waste": 1.0}),
        ([step(103.0), other("Corrupted", 104.0), recovered(104.5, 1.0, 0.5)], {"steps": 1.0, "waste": 1.0, "recovery": 0.5}),
    ],
)  # fmt: skip
def test_sources(lines: list[Line], expected: dict[str, float]) -> None:
    assert kinds([*BEGUN, *lines]) == pytest.approx({"start": 2.0, **expected})


def test_what_follows_the_last_line_is_evaluation() -> None:
    assert kinds([*BEGUN, step(103.0)], until=4.5) == {"start": 2.0, "steps": 1.0, "evaluation": 1.5}


def test_time_between_sessions_is_not_counted_and_forgotten_steps_are_waste() -> None:
    lines = [
        *BEGUN,
        step(103.0),
        start(1001.0, since=1000.0),
        other("Resumed", 1001.0, wasted_seconds=2.5),
        step(1002.0),
    ]
    assert kinds(lines) == {"start": 3.0, "steps": 2.0, "waste": 2.5}
    assert goodput(lines)["share"] == round(2 / 7.5, 4)


def test_a_loss_among_forgotten_steps_counts_for_itself_only() -> None:
    """Between the steps kept and the loss lie 10 seconds of steps that were forgotten, and told by Resumed."""
    lines = [
        *BEGUN, step(103.0), recovered(114.0, 0.4, 0.6, number=11),
        start(1001.0, since=1000.0), other("Resumed", 1001.0, wasted_seconds=10.0),
    ]  # fmt: skip
    assert kinds(lines) == {"start": 3.0, "steps": 1.0, "waste": 10.4, "recovery": 0.6}


def test_a_start_told_twice_counts_once() -> None:
    assert kinds([*BEGUN, step(103.0), start(103.5, since=100.0), step(104.5)]) == {"start": 2.5, "steps": 2.0}


def test_nothing_gives_nothing() -> None:
    assert goodput([]) == {"wall_seconds": 0.0, "share": 0.0, "seconds": dict.fromkeys(KINDS, 0.0)}


def test_the_date_may_be_set_at_any_time() -> None:
    """A year forwards within a session, and back in the next one: spans come from `clock`."""
    year = 365 * 86_400.0
    lines = [
        start(100.0, since=98.0) | {"clock": 2.0},
        step(103.0) | {"clock": 3.0},
        step(year, number=2) | {"clock": 4.5},
        start(50.0, since=49.0) | {"clock": 1.0},
        step(51.0, number=3) | {"clock": 2.0},
    ]
    assert goodput(lines, until=3.5)["seconds"] == {
        **dict.fromkeys(KINDS, 0.0), "start": 3.0, "steps": 3.5, "evaluation": 1.5,
    }  # fmt: skip


def test_speed_is_that_of_all_sessions_together() -> None:
    """Steps, seconds and samples of one span: without the starts, and without what follows the last step."""
    lines = [
        *BEGUN, step(103.0), recovered(104.0, 0.4, 0.6), step(105.0, number=2),
        start(1001.0, since=1000.0), other("Resumed", 1001.0, wasted_seconds=2.0), step(1003.0, number=3),
        other("Evaluated", 1009.0),
    ]  # fmt: skip
    lines = [line | {"samples": 14} if line["event"] == "StepDone" else line for line in lines]
    assert measure_speed(lines, steps=3) == {"seconds": 7.0, "samples_per_second": 6.0}
    assert measure_speed(lines, steps=5) == {"seconds": 7.0, "samples_per_second": 6.0, "timed_steps": 3}
    assert measure_speed([], steps=0) == {"seconds": 0.0, "samples_per_second": 0.0}


# Honest histories: what was done is found again

milliseconds = st.integers(0, 5000).map(lambda number: number / 1000)

activity = st.one_of(
    st.tuples(st.just("step"), milliseconds, milliseconds, milliseconds),  # computing, data, waiting for a save
    st.tuples(st.just("evaluation"), milliseconds),
    st.tuples(st.just("loss"), milliseconds, milliseconds, st.booleans()),  # wasted, recovery, in an evaluation?
    st.tuples(st.just("resizing"), milliseconds),
    st.tuples(st.just("corruption"), milliseconds),
    st.tuples(st.just("off"), milliseconds, milliseconds, milliseconds),  # between sessions, start, forgotten
)


def play(activities: list[tuple[Any, ...]]) -> tuple[list[Line], dict[str, float]]:
    """The lines that a run would write, and the truth."""
    truth = dict.fromkeys(KINDS, 0.0)
    now, number = 1.7e9, 0
    lines = [start(now, since=now)]
    for kind, *amounts in activities:
        if kind == "step":
            number += 1
            computing, data, waiting = amounts
            if waiting:
                now += waiting
                lines.append(saved(now, waiting))
            now += computing + data
            lines.append(step(now, computing + data, data, number))
            truth["steps"] += computing
            truth["data"] += data
            truth["saving"] += waiting
        elif kind == "evaluation":
            now += amounts[0]
            lines.append(other("Evaluated", now, step=number))
            truth["evaluation"] += amounts[0]
        elif kind == "loss":
            wasted, seconds, is_untold = amounts
            now += wasted + seconds
            lines.append(recovered(now, 0.0 if is_untold else wasted, seconds, number))
            truth["waste"] += wasted
            truth["recovery"] += seconds
        elif kind == "resizing":
            now += amounts[0]
            lines.append(other("Resized", now, step=number, seconds=amounts[0]))
            truth["recovery"] += amounts[0]
        elif kind == "corruption":
            now += amounts[0]
            lines.append(other("Corrupted", now, step=number + 1))
            truth["waste"] += amounts[0]
        else:
            off, starting, forgotten = amounts
            now += off + starting
            lines.append(start(now, since=now - starting))
            lines.append(other("Resumed", now, step=number + 1, wasted_seconds=forgotten))
            truth["start"] += starting
            truth["waste"] += forgotten
    return [line | {"when": round(line["when"], 3)} for line in lines], truth


@given(st.lists(activity, max_size=30))
def test_what_was_done_is_found_again(activities: list[tuple[Any, ...]]) -> None:
    lines, truth = play(activities)
    found = goodput(lines)
    assert found["seconds"] == pytest.approx(truth, abs=0.01)
    wall = sum(truth.values())
    assert found["wall_seconds"] == pytest.approx(wall, abs=0.01)
    if wall > 1:
        assert found["share"] == pytest.approx(truth["steps"] / wall, abs=0.01)


# Any lines at all

seconds = st.floats(-10, 50)
anything = st.fixed_dictionaries(
    {
        "event": st.sampled_from(
            [
                "RunStarted",
                "StepDone",
                "Evaluated",
                "CheckpointWritten",
                "Recovered",
                "Resized",
                "Corrupted",
                "Resumed",
                "Notice",
            ]
        ),
        "step": st.integers(0, 20),
    },
    optional=dict.fromkeys(["when", "since", "seconds", "data_seconds", "waited_seconds", "wasted_seconds"], seconds),
)


@given(st.lists(anything, max_size=30), st.none() | seconds)
def test_kinds_add_up_for_any_lines(lines: list[Line], until: float | None) -> None:
    found = goodput(lines, until=until)
    assert list(found["seconds"]) == list(KINDS)
    assert all(amount >= 0 for amount in found["seconds"].values())
    assert math.isclose(sum(found["seconds"].values()), found["wall_seconds"], abs_tol=1e-6)
    assert 0 <= found["share"] <= 1


@given(st.lists(anything, max_size=30), st.integers(0, 30))
def test_a_notice_changes_nothing(lines: list[Line], place: int) -> None:
    notice = {"event": "Notice", "message": "", "when": 5.0}
    place = min(place, len(lines))
    if place:  # the first line begins a session
        assert goodput([*lines[:place], notice, *lines[place:]]) == goodput(lines)
