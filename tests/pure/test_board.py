"""The board: what another process has written is read, even if it is no more; its few words reach every worker."""

from __future__ import annotations

import os
import signal
import time

import pytest

from unisono.errors import LostPeerError
from unisono.processes.fault_injection import KINDS, Fault
from unisono.processes.progress_table import CALLS, PHASES, REGROUP, RUNNING, STOP, UNWATCHED, Board, Row, Unwatched


def test_rows_of_another_process_are_read_after_its_end() -> None:
    board = Board(3)
    before = time.monotonic()
    pid = os.fork()
    if not pid:
        pen = board.pen(1)
        pen.seat(2, 0)
        pen.at("contribute", 6, 3)
        pen.enter("add_integers")
        pen.leave()
        pen.enter("gather_shards")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    row = board.row(1)
    assert before <= row.since <= time.monotonic()
    assert row == Row(
        phase="contribute", step=6, microbatch=3, since=row.since, entered=2, left=1, waiting="gather_shards"
    )
    untouched = Row(phase="start", step=0, microbatch=0, since=0.0, entered=0, left=0, waiting="")
    assert board.row(0) == board.row(2) == untouched


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase(phase: str) -> None:
    board = Board(2)
    board.pen(0).at(phase, 8)
    assert (board.row(0).phase, board.row(0).step, board.row(0).microbatch) == (phase, 8, -1)


def test_a_phase_that_is_not_on_the_list_is_a_mistake() -> None:
    with pytest.raises(ValueError):
        Board(1).pen(0).at("lunch")


@pytest.mark.parametrize("call", CALLS[1:])
def test_every_exchange(call: str) -> None:
    board = Board(1)
    pen = board.pen(0)
    pen.enter(call)
    assert board.row(0).waiting == call
    pen.leave()
    assert board.row(0).waiting == ""


def test_exchanges_are_counted_from_the_seat_on() -> None:
    board = Board(1)
    pen = board.pen(0)
    pen.enter("add_integers")
    pen.seat(0, 0)
    assert (board.row(0).entered, board.row(0).left, board.row(0).waiting) == (0, 0, "")


def test_entering_and_leaving_are_progress() -> None:
    board = Board(1)
    pen = board.pen(0)
    times = []
    for mark in (lambda: pen.at("update", 0), lambda: pen.enter("gather_shards"), pen.leave):
        time.sleep(0.001)
        mark()
        times.append(board.row(0).since)
    assert times == sorted(set(times))


def test_a_new_worker_s_row_begins_with_its_start() -> None:
    board = Board(2)
    for slot in (0, 1):
        pen = board.pen(slot)
        pen.at("update", 6)
        pen.enter("gather_shards")
    before = time.monotonic()
    board.clear(1)
    row = board.row(1)
    assert before <= row.since <= time.monotonic()
    assert (row.phase, row.entered, row.left, row.waiting) == ("start", 0, 0, "")
    assert board.row(0).waiting == "gather_shards"


def test_a_dissolved_group_is_left_at_the_next_mark() -> None:
    board = Board(2)
    board.generation = 4
    pen = board.pen(0)
    pen.seat(0, 4)
    pen.at("update", 2)
    pen.enter("gather_shards")
    board.generation = 5
    pen.leave()  # what has been exchanged is not taken back
    with pytest.raises(LostPeerError, match="dissolved"):
        pen.at("commit", 2)
    with pytest.raises(LostPeerError, match="dissolved"):
        pen.enter("wait_for_all")
    assert board.row(0).phase == "commit"  # where it was, is told all the same
    pen.seat(0, 5)
    pen.at("join")


def test_who_has_no_seat_belongs_to_no_group() -> None:
    board = Board(1)
    board.generation = 7
    pen = board.pen(0)
    pen.at("start")
    pen.seat(-1, -1)
    pen.at("wait")


def test_words_of_the_supervisor_reach_another_process() -> None:
    board = Board(1)
    assert (board.generation, board.request, board.prepared) == (0, RUNNING, False)
    pid = os.fork()
    if not pid:
        deadline = time.monotonic() + 10
        while board.request != STOP and time.monotonic() < deadline:
            time.sleep(0.001)
        board.prepared = board.generation == 3
        os._exit(0)
    board.generation = 3
    board.request = STOP
    os.waitpid(pid, 0)
    assert board.prepared
    assert len({RUNNING, STOP, REGROUP}) == 3


def test_words_and_rows_do_not_touch() -> None:
    board = Board(2)
    for slot in (0, 1):
        board.pen(slot).at("report", 1000 + slot, slot)
    board.generation, board.request, board.prepared = 9, REGROUP, True
    for fault in range(40):
        assert board.count_strike(fault) == 0
    assert [board.count_strike(fault) for fault in range(40)] == [1] * 40
    assert [board.row(slot).step for slot in (0, 1)] == [1000, 1001]
    assert (board.generation, board.request, board.prepared) == (9, REGROUP, True)


def test_faults_strike_where_the_pen_writes_and_are_counted_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[str] = []
    monkeypatch.setitem(KINDS, "fail", lambda: struck.append("one"))
    board = Board(2)
    faults = (Fault(kind="fail", worker=1, step=3, phase="update", times=2),)
    first, second = (board.pen(slot, faults) for slot in (0, 1))
    first.seat(0, 0)
    second.seat(1, 0)
    for pen in (first, second):
        for step in range(4):
            pen.at("load", step)
            pen.at("update", step)
    assert len(struck) == 1
    first.seat(1, 0)  # it takes the place of the other, and its fault
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
