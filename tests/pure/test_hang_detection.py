"""Who hangs is found, and not those who wait for it; nobody is suspected for being patient."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.processes import progress_table as progress_tables
from unisono.processes.progress_table import PHASES, ProgressTable, Row
from unisono.runtime import hang_detection
from unisono.runtime.hang_detection import (
    FIRST_STEP_PATIENCE,
    PATIENCE,
    START_PATIENCE,
    HangDetector,
    Stuck,
    find_stuck,
)
from unisono.runtime.worker_pool import WorkerPool

NOW, LIMIT, START = 1000.0, 10.0, 70.0


def row(phase: str = "contribute", *, ago: float = 0.0, entered: int = 5, waiting: str = "") -> Row:
    left = entered - 1 if waiting else entered
    return Row(phase=phase, step=6, microbatch=-1, since=NOW - ago, entered=entered, left=left, waiting=waiting)


def find(*rows: Row, stopped: tuple[int, ...] = (), answered: tuple[int, ...] = ()) -> list[int]:
    """Who is found, by position."""
    found = find_stuck(
        dict(enumerate(rows)), stopped=stopped, answered=answered, now=NOW, limit_seconds=LIMIT, start_seconds=START
    )
    assert all(stuck.row is rows[stuck.worker] and stuck.seconds == NOW - stuck.row.since for stuck in found)
    assert all(stuck.stopped == (stuck.worker in stopped) for stuck in found)
    return [stuck.worker for stuck in found]


def test_who_makes_progress_is_left_alone() -> None:
    assert find(row(ago=9.9), row(ago=10.0), row("reduce", ago=9.0, waiting="add_integers", entered=6)) == []


def test_nobody_is_found_among_nobody() -> None:
    assert find() == []


@pytest.mark.parametrize("phase", ["begin", "load", "contribute", "audit", "reduce", "update", "commit", "report"])
def test_who_is_waited_for_is_found_and_not_who_waits(phase: str) -> None:
    waiting = row("reduce", ago=11.0, entered=6, waiting="add_integers")
    assert find(waiting, row(phase, ago=11.0, entered=5), waiting) == [1]


def test_who_waits_is_excused_however_long() -> None:
    """The one that is waited for is at work, for instance evaluating one microbatch after another."""
    assert find(row("reduce", ago=1e6, entered=6, waiting="wait_for_all"), row("evaluate", ago=0.1, entered=5)) == []


def test_all_stuck_in_one_exchange_are_found() -> None:
    assert find(*[row("update", ago=11.0, entered=7, waiting="gather_shards")] * 3) == [0, 1, 2]


def test_who_came_last_to_the_exchange_in_which_all_are_stuck_counts_from_there() -> None:
    late, fresh = (row("update", ago=ago, entered=7, waiting="gather_shards") for ago in (11.0, 9.0))
    assert find(late, fresh) == [0]  # soon both will be


def test_of_all_in_one_exchange_the_stopped_one_is_found() -> None:
    assert find(*[row("update", ago=11.0, entered=7, waiting="gather_shards")] * 3, stopped=(2,)) == [2]


def test_who_is_stopped_while_it_waits_is_found() -> None:
    """It waited for another when it was stopped, which has come and gone since."""
    rows = row("reduce", ago=11.0, entered=6, waiting="add_integers"), row(ago=1.0, entered=5)
    assert find(*rows, stopped=(0,)) == [0]


def test_who_waits_for_the_supervisor_is_excused_and_excuses_others() -> None:
    """A checkpoint is being written: worker 0 waits for that, the others for worker 0."""
    rows = row("save", ago=1e6, entered=5), row("reduce", ago=1e6, entered=6, waiting="add_integers")
    assert find(*rows, answered=(0,)) == []
    assert find(*rows) == [0]
    assert find(*rows, answered=(0,), stopped=(0,)) == [0]


@pytest.mark.parametrize(("ago", "found"), [(9.0, []), (11.0, [0])])
@pytest.mark.parametrize("phase", ["wait", "prepare", "start", "join", "save", "finish"])
def test_no_phase_excuses_who_is_stopped(phase: str, ago: float, found: list[int]) -> None:
    assert find(row(phase, ago=ago), stopped=(0,)) == found


@pytest.mark.parametrize("phase", PHASES)
def test_patience_with_each_phase(phase: str) -> None:
    patience = {"start": START / LIMIT, "join": 10.0, "evaluate": 10.0, "save": 10.0, "finish": 60.0}
    patience |= {"wait": math.inf, "prepare": math.inf}
    limit = LIMIT * patience.get(phase, 1.0)
    assert find(row(phase, ago=min(limit, 1e9) - 1.0)) == []
    assert find(row(phase, ago=min(limit, 1e9) + 1.0)) == ([] if math.isinf(limit) else [0])
    assert PATIENCE.keys() <= set(PHASES)


@given(
    st.lists(
        st.tuples(st.sampled_from(PHASES), st.floats(0, 500), st.integers(0, 3), st.sampled_from(["", "add_integers"])),
        min_size=1,
        max_size=5,
    )
)
def test_only_who_holds_up_the_others_is_found(drawn: list[tuple[str, float, int, str]]) -> None:
    rows = [row(phase, ago=ago, entered=entered, waiting=waiting) for phase, ago, entered, waiting in drawn]
    fewest = min(row.entered for row in rows)
    for rank in find(*rows):
        assert not rows[rank].waiting or rows[rank].entered == fewest
        assert NOW - rows[rank].since > LIMIT


def test_in_words() -> None:
    place = Row(phase="update", step=6, microbatch=-1, since=0.0, entered=7, left=6, waiting="gather_shards")
    stuck = Stuck(worker=2, seconds=31.4, row=place, stopped=False)
    words = "worker 2 made no progress for 31 s (at update in step 7, in the exchange gather_shards"
    assert str(stuck) == f"{words})"
    assert str(Stuck(worker=2, seconds=31.4, row=place, stopped=True)) == f"{words}, stopped by a signal)"


# The watch over real processes


class Clock:
    """Stands still, except where a test turns it: no load of the machine makes anybody late."""

    def __init__(self) -> None:
        self.nanoseconds = 10**12

    def monotonic_ns(self) -> int:
        return self.nanoseconds

    def monotonic(self) -> float:
        return self.nanoseconds / 1e9

    def turn(self, seconds: float) -> None:
        self.nanoseconds += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (hang_detection, progress_tables):
        monkeypatch.setattr(module, "time", clock)
    return clock


@contextmanager
def children(count: int) -> Iterator[list[int]]:
    """Processes that do nothing."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if not pid:
            while True:
                signal.pause()
        pids.append(pid)
    try:
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@dataclass
class Someone:
    """What the watch knows of a member."""

    slot: int
    number: int
    pid: int = 0
    generation: int = 0
    waiting: bool = False
    asking: bool = False


def make_watch(factor: float, folder: Path, *handles: Someone) -> tuple[HangDetector, ProgressTable]:
    progress_table = ProgressTable(max(1, len(handles)))
    pool: Any = SimpleNamespace(staying=lambda: handles, is_stopped=WorkerPool.is_stopped)
    for handle in handles:
        progress_writer = progress_table.progress_writer(handle.slot)
        progress_writer.assignment(handle.number, handle.generation)
        progress_table.generation = handle.generation
        progress_writer.at("contribute", 3, 0)
    return HangDetector(pool, progress_table, folder, factor), progress_table


def look(watch: HangDetector, clock: Clock, seconds: float) -> list[int]:
    """Who hangs within so many seconds; the watch has to look often, since it excuses all where it was asleep itself."""
    end = clock.monotonic() + seconds
    while not (found := watch.find()) and clock.monotonic() < end:
        clock.turn(0.01)
    assert all(handle.number == stuck.worker for handle, stuck in found)
    return sorted(stuck.worker for _, stuck in found)


def test_limit_follows_the_longest_step(tmp_path: Path) -> None:
    watch, _ = make_watch(20.0, tmp_path)
    assert watch.limit_seconds == 20.0 * FIRST_STEP_PATIENCE
    for seconds, limit in ((0.01, 20.0), (3.0, 60.0), (0.5, 60.0)):
        watch.learn(seconds)
        assert watch.limit_seconds == limit


def test_the_first_step_has_more_time(tmp_path: Path, clock: Clock) -> None:
    with children(1) as pids:
        watch, _ = make_watch(0.05, tmp_path, Someone(0, 1, pids[0]))  # 1.5 s before any step, 0.05 s after one
        assert look(watch, clock, 1.48) == []
        watch.learn(0.001)
        assert look(watch, clock, 0.06) == [1]


def test_a_start_has_a_clock_of_its_own(tmp_path: Path, clock: Clock) -> None:
    """However short the steps are: a replacement imports, opens the data and builds the model."""
    with children(1) as pids:
        watch, progress_table = make_watch(0.05, tmp_path, Someone(0, 1, pids[0], generation=-1))
        progress_table.progress_writer(0).at("start")
        watch.learn(0.001)
        assert look(watch, clock, 0.05 * START_PATIENCE - 0.02) == []
        assert look(watch, clock, 0.1) == [1]
        ((_, stuck),) = watch.find()
        assert "was not ready 3 s after its start" in str(stuck) and "raise recovery.hang_factor" in str(stuck)


def test_factor_zero_never_suspects(tmp_path: Path, clock: Clock) -> None:
    with children(1) as pids:
        watch, _ = make_watch(0.0, tmp_path, Someone(0, 1, pids[0]))
        watch.learn(0.001)
        assert look(watch, clock, 30.0) == []


def test_who_waits_for_the_supervisor_is_found_if_it_is_stopped(tmp_path: Path, clock: Clock) -> None:
    with children(2) as pids:
        first, second = Someone(0, 1, pids[0]), Someone(1, 0, pids[1])
        watch, _ = make_watch(0.05, tmp_path, first, second)
        watch.learn(0.001)
        assert look(watch, clock, 0.06) == [0, 1]
        first.asking, second.waiting = True, True  # for an answer; for a seat
        assert look(watch, clock, 30.0) == []
        os.kill(first.pid, signal.SIGSTOP)
        os.waitpid(first.pid, os.WUNTRACED)
        assert look(watch, clock, 0.06) == [1]
        assert "stopped by a signal" in str(watch.find()[0][1])


def test_groups_do_not_excuse_each_other(tmp_path: Path, clock: Clock) -> None:
    """One that is being started has been in no exchange yet; that is no reason to wait for it in the present group."""
    with children(3) as pids:
        present = Someone(0, 0, pids[0], generation=3), Someone(1, 1, pids[1], generation=3)
        watch, progress_table = make_watch(0.05, tmp_path, *present, Someone(2, 2, pids[2], generation=-1))
        for handle in present:
            progress_writer = progress_table.progress_writer(handle.slot)
            progress_writer.generation = progress_table.generation
            progress_writer.enter("add_integers")
        progress_table.clear(2)
        watch.learn(0.001)
        assert look(watch, clock, 0.06) == [0, 1]


def test_a_run_that_was_stopped_as_a_whole_suspects_nobody_when_it_goes_on(tmp_path: Path, clock: Clock) -> None:
    """Ctrl-Z and `fg`: the watch has slept as long as the workers."""
    with children(1) as pids:
        watch, _ = make_watch(0.3, tmp_path, Someone(0, 1, pids[0]))
        watch.learn(0.001)
        assert watch.find() == []
        clock.turn(0.4)
        assert watch.find() == []
        assert look(watch, clock, 0.31) == [1]  # but not for ever


def test_stacks_that_cannot_be_written_cost_nothing_else(tmp_path: Path) -> None:
    def dump_stacks(folder: Path, told: str) -> None:
        assert folder == tmp_path / "hangs" / "001-step-00000008"
        raise OSError("the disk is full")

    pool: Any = SimpleNamespace(dump_stacks=dump_stacks)
    place = Row(phase="load", step=7, microbatch=1, since=0.0, entered=0, left=0, waiting="")
    found: Any = [(None, Stuck(worker=0, seconds=9.0, row=place, stopped=False))]
    told = HangDetector(pool, ProgressTable(1), tmp_path, 1.0).describe(found, 7)
    assert told.startswith("worker 0 made no progress for 9 s (at load (microbatch 1 of step 8))")
    assert "the disk is full" in told
