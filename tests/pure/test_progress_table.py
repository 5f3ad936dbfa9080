"""The board: what another process has written is read, even if it is no more; its few words reach every worker."""

from __future__ import annotations

import os
import signal
import time

import pytest

from unisono.errors import LostPeerError
from unisono.processes.fault_injection import KINDS, Fault
from unisono.processes.progress_table import (
    CALLS,
    PHASES,
    REGROUP,
    RUNNING,
    STOP,
    UNWATCHED,
    ProgressTable,
    Row,
    Unwatched,
)


def test_rows_of_another_process_are_read_after_its_end() -> None:
    progress_table = ProgressTable(3)
    before = time.monotonic()
    pid = os.fork()
    if not pid:
        progress_writer = progress_table.progress_writer(1)
        progress_writer.assignment(2, 0)
        progress_writer.at("contribute", 6, 3)
        progress_writer.enter("add_integers")
        progress_writer.leave()
        progress_writer.enter("gather_shards")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    row = progress_table.row(1)
    assert before <= row.since <= time.monotonic()
    assert row == Row(
        phase="contribute", step=6, microbatch=3, since=row.since, entered=2, left=1, waiting="gather_shards"
    )
    untouched = Row(phase="start", step=0, microbatch=0, since=0.0, entered=0, left=0, waiting="")
    assert progress_table.row(0) == progress_table.row(2) == untouched


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase(phase: str) -> None:
    progress_table = ProgressTable(2)
    progress_table.progress_writer(0).at(phase, 8)
    assert (progress_table.row(0).phase, progress_table.row(0).step, progress_table.row(0).microbatch) == (phase, 8, -1)


def test_a_phase_that_is_not_on_the_list_is_a_mistake() -> None:
    with pytest.raises(ValueError):
        ProgressTable(1).progress_writer(0).at("lunch")


@pytest.mark.parametrize("call", CALLS[1:])
def test_every_exchange(call: str) -> None:
    progress_table = ProgressTable(1)
    progress_writer = progress_table.progress_writer(0)
    progress_writer.enter(call)
    assert progress_table.row(0).waiting == call
    progress_writer.leave()
    assert progress_table.row(0).waiting == ""


def test_exchanges_are_counted_from_the_seat_on() -> None:
    progress_table = ProgressTable(1)
    progress_writer = progress_table.progress_writer(0)
    progress_writer.enter("add_integers")
    progress_writer.assignment(0, 0)
    assert (progress_table.row(0).entered, progress_table.row(0).left, progress_table.row(0).waiting) == (0, 0, "")


def test_entering_and_leaving_are_progress() -> None:
    progress_table = ProgressTable(1)
    progress_writer = progress_table.progress_writer(0)
    times = []
    for mark in (
        lambda: progress_writer.at("update", 0),
        lambda: progress_writer.enter("gather_shards"),
        progress_writer.leave,
    ):
        time.sleep(0.001)
        mark()
        times.append(progress_table.row(0).since)
    assert times == sorted(set(times))


def test_a_new_worker_s_row_begins_with_its_start() -> None:
    progress_table = ProgressTable(2)
    for slot in (0, 1):
        progress_writer = progress_table.progress_writer(slot)
        progress_writer.at("update", 6)
        progress_writer.enter("gather_shards")
    before = time.monotonic()
    progress_table.clear(1)
    row = progress_table.row(1)
    assert before <= row.since <= time.monotonic()
    assert (row.phase, row.entered, row.left, row.waiting) == ("start", 0, 0, "")
    assert progress_table.row(0).waiting == "gather_shards"


def test_a_dissolved_group_is_left_at_the_next_mark() -> None:
    progress_table = ProgressTable(2)
    progress_table.generation = 4
    progress_writer = progress_table.progress_writer(0)
    progress_writer.assignment(0, 4)
    progress_writer.at("update", 2)
    progress_writer.enter("gather_shards")
    progress_table.generation = 5
    progress_writer.leave()  # what has been exchanged is not taken back
    with pytest.raises(LostPeerError, match="dissolved"):
        progress_writer.at("commit", 2)
    with pytest.raises(LostPeerError, match="dissolved"):
        progress_writer.enter("wait_for_all")
    assert progress_table.row(0).phase == "commit"  # where it was, is told all the same
    progress_writer.assignment(0, 5)
    progress_writer.at("join")


def test_who_has_no_seat_belongs_to_no_group() -> None:
    progress_table = ProgressTable(1)
    progress_table.generation = 7
    progress_writer = progress_table.progress_writer(0)
    progress_writer.at("start")
    progress_writer.assignment(-1, -1)
    progress_writer.at("wait")


def test_words_of_the_supervisor_reach_another_process() -> None:
    progress_table = ProgressTable(1)
    assert (progress_table.generation, progress_table.request, progress_table.prepared) == (0, RUNNING, False)
    pid = os.fork()
    if not pid:
        deadline = time.monotonic() + 120
        while progress_table.request != STOP and time.monotonic() < deadline:
            time.sleep(0.001)
        progress_table.prepared = progress_table.generation == 3
        os._exit(0)
    progress_table.generation = 3
    progress_table.request = STOP
    os.waitpid(pid, 0)
    assert progress_table.prepared
    assert len({RUNNING, STOP, REGROUP}) == 3


def test_words_and_rows_do_not_touch() -> None:
    progress_table = ProgressTable(2)
    for slot in (0, 1):
        progress_table.progress_writer(slot).at("report", 1000 + slot, slot)
    progress_table.generation, progress_table.request, progress_table.prepared = 9, REGROUP, True
    for fault in range(40):
        assert progress_table.count_strike(fault) == 0
    assert [progress_table.count_strike(fault) for fault in range(40)] == [1] * 40
    assert [progress_table.row(slot).step for slot in (0, 1)] == [1000, 1001]
    assert (progress_table.generation, progress_table.request, progress_table.prepared) == (9, REGROUP, True)


def test_faults_strike_where_the_pen_writes_and_are_counted_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[str] = []
    monkeypatch.setitem(KINDS, "fail", lambda: struck.append("one"))
    progress_table = ProgressTable(2)
    faults = (Fault(kind="fail", worker=1, step=3, phase="update", times=2),)
    first, second = (progress_table.progress_writer(slot, faults) for slot in (0, 1))
    first.assignment(0, 0)
    second.assignment(1, 0)
    for progress_writer in (first, second):
        for step in range(4):
            progress_writer.at("load", step)
            progress_writer.at("update", step)
    assert len(struck) == 1
    first.assignment(1, 0)  # it takes the place of the other, and its fault
    first.at("update", 2)
    first.at("update", 2)
    assert len(struck) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Row(phase="join", step=-1, microbatch=-1, since=0, entered=1, left=0, waiting="join"), "join, in the exchange join"),
        (Row(phase="update", step=6, microbatch=-1, since=0, entered=0, left=0, waiting=""), "update in step 7"),
        (Row(phase="load", step=0, microbatch=0, since=0, entered=0, left=0, waiting=""), "load (microbatch 0 of step 1)"),
        (Row(phase="evaluate", step=-1, microbatch=5, since=0, entered=0, left=0, waiting=""), "evaluate (microbatch 5)"),
    ],
)  # fmt: skip
def test_rows_in_words(row: Row, words: str) -> None:
    assert str(row) == words


def test_unwatched_does_nothing() -> None:
    assert isinstance(UNWATCHED, Unwatched)
    for _ in range(2):
        UNWATCHED.at("anything", 3, 4)
        UNWATCHED.enter("anything")
        UNWATCHED.leave()
