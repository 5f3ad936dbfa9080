"""unisono.parallel over real forked workers: the same result on any number of them, whatever becomes of them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono import parallel
from unisono.determinism.nodes import fold
from unisono.errors import ParallelError, TaskError, WorkerError
from unisono.parallel import local_processes as local
from unisono.parallel import sharing

WORKERS = (1, 3, *(pytest.param(more, marks=pytest.mark.slow) for more in (2, 5, 8)))


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def double(item: int) -> int:
    return 2 * item


def fail_at(*numbers: int):
    def task(item: int) -> int:
        if item in numbers:
            raise ValueError(f"not {item}")
        return item

    return task


def count_file(path: Path) -> int:
    """How often this was called with the path, over all processes; appending a byte is one write."""
    with path.open("ab") as file:
        file.write(b"x")
    return path.stat().st_size


# Order and laziness


@pytest.mark.parametrize("workers", WORKERS)
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    def task(item: int) -> int:
        time.sleep(0.002 * (item % 3 == 0))  # later ones are ready first
        return item

    assert list(parallel.map(task, range(60), workers=workers)) == list(range(60))


def test_no_items_no_results() -> None:
    assert list(parallel.map(double, [], workers=2)) == []
    with pytest.raises(ParallelError, match="at least one item"):
        parallel.map_reduce(double, lambda a, b: a + b, [], workers=2)


def test_nothing_begins_before_the_first_result_is_asked_for() -> None:
    read = []
    results = parallel.map(double, (read.append(item) or item for item in range(9)), workers=2)
    assert read == [] and multiprocessing.active_children() == []
    assert next(results) == 0 and read
    results.close()


def test_an_infinite_generator_is_read_a_little_ahead_and_left_when_the_results_are_closed() -> None:
    read = itertools.count()
    last = [0]

    def items() -> Iterator[int]:
        for item in read:
            last[0] = item
            yield item

    results = parallel.map(double, items(), workers=2)
    for number in range(200):
        assert next(results) == 2 * number
    time.sleep(0.05)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert multiprocessing.active_children() == []
    most = sharing.AHEAD * sharing.MOST_TASKS * 2
    assert last[0] < 200 + most


def test_large_items_are_not_read_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound in bytes holds, not only the one in tasks."""
    monkeypatch.setattr(sharing, "AHEAD_BYTES", 4 << 20)
    furthest, given = [0], [0]

    def items() -> Iterator[np.ndarray]:
        for number in range(100):
            furthest[0] = max(furthest[0], number - given[0])
            yield np.zeros(1 << 17)  # 1 MiB, and a MiB back

    for number, _ in enumerate(parallel.map(lambda item: item, items(), workers=2)):
        given[0] = number
        time.sleep(0.001)
    assert furthest[0] <= 8


def test_dropping_the_iterator_ends_the_workers() -> None:
    results = parallel.map(double, itertools.count(), workers=2)
    next(results)
    del results
    assert multiprocessing.active_children() == []


def test_a_script_that_ends_in_the_middle_ends(tmp_path: Path) -> None:
    """Without our own clean-up, multiprocessing would wait for workers that wait for us."""
    script = "from unisono import parallel\nr = parallel.map(abs, range(99), workers=2)\nprint(next(r))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


# The same bits


def draw(item: int) -> tuple[float, float, float, float, int]:
    own = np.random.default_rng(parallel.key())
    return random.random(), np.random.random(), torch.rand(()).item(), own.random(), parallel.key()


def test_random_draws_do_not_depend_on_the_workers() -> None:
    expected = list(parallel.map(draw, range(40), workers=1))
    assert len(set(expected)) == 40
    for workers in (2, 3, 8):
        assert list(parallel.map(draw, range(40), workers=workers)) == expected
    assert list(parallel.map(draw, range(40), workers=2, seed=1)) != expected


def test_a_task_draws_the_same_whichever_other_tasks_there_are() -> None:
    """Its key is of its number alone: no generator goes on from the task before."""
    all_ = list(parallel.map(draw, range(40), workers=2))
    some = list(parallel.map(lambda item: draw(item) if item == 33 else None, range(40), workers=1))
    assert some[33] == all_[33]


def test_without_a_seed_generators_are_left_alone() -> None:
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    assert list(parallel.map(lambda item: np.random.random(), range(1), workers=1, seed=None)) == [expected]
    with pytest.raises(TaskError, match="with a seed"):
        list(parallel.map(lambda item: parallel.key(), range(1), workers=1, seed=None))


def test_there_is_no_key_outside_of_tasks() -> None:
    with pytest.raises(ParallelError, match="within a task"):
        parallel.key()


@pytest.mark.slow
def test_torch_imported_by_a_task_is_seeded_in_the_first_one_too() -> None:
    """`seed_all` finds no torch before the first task; from the second on it does, in workers that had an earlier one."""
    script = """
import sys
from unisono import parallel
assert "torch" not in sys.modules
def draw(item):
    import torch
    return torch.rand(()).item()
results = [list(parallel.map(draw, range(6), workers=workers)) for workers in (1, 2)]
assert "torch" not in sys.modules
assert results[0] == results[1], results
assert len(set(results[0])) == 6
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def test_global_generators_of_the_caller_are_left_alone() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    list(parallel.map(draw, range(4), workers=2))
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_kernels_use_so_many_threads_also_if_the_caller_has_used_more(threads: int) -> None:
    """GNU's OpenMP in a forked child would wait for ever for its parent's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values = torch.rand(1 << 20)
        values.exp()

        def task(item: int) -> int:
            values.exp()
            return torch.get_num_threads()

        found = list(parallel.map(task, range(2), workers=2, threads=threads, timeout_seconds=120))
        assert found == [threads, threads]
    finally:
        torch.set_num_threads(before)


# The tree


@settings(max_examples=settings.default.max_examples // 10)  # each forks workers
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60))
def test_sums_have_the_bits_of_the_tree(values: list[float]) -> None:
    expected = fold(values)
    for workers in (1, 3, 5):
        result = parallel.map_reduce(lambda item: values[item], lambda a, b: a + b, range(len(values)), workers=workers)
        assert np.float64(result).tobytes() == np.float64(expected).tobytes()


def test_the_order_in_which_sums_are_taken_matters_here() -> None:
    """Otherwise the test above could not fail."""
    values = [0.1, 1e9, -1e9, 0.3, 7e-9] * 12
    assert sum(values) != fold(values)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_tree_is_the_one_that_is_drawn(workers: int) -> None:
    def bracket(a: str, b: str) -> str:
        return f"({a}{b})"

    assert parallel.map_reduce(str, bracket, range(7), workers=workers) == "(((01)(23))((45)6))"
    assert parallel.map_reduce(str, bracket, range(5), workers=workers) == "(((01)(23))4)"
    assert parallel.map_reduce(str, bracket, range(1), workers=workers) == "0"


def test_many_leaves_are_combined_at_the_workers() -> None:
    """A worker sends complete nodes: far fewer than leaves. The caller's `combine` counts those that it must do."""
    here = os.getpid()
    calls = [0]

    def add(a: int, b: int) -> int:
        calls[0] += os.getpid() == here
        return a + b

    assert parallel.map_reduce(double, add, range(5000), workers=2) == 4999 * 5000
    assert calls[0] < 2500


# Failures


@pytest.mark.parametrize("workers", WORKERS)
def test_the_first_failure_in_the_order_of_the_items_is_raised(workers: int) -> None:
    def task(item: int) -> int:
        if item == 4:
            time.sleep(0.05)  # the later failure is known first
        return fail_at(4, 9)(item)

    with pytest.raises(TaskError, match="task 4 failed: ValueError: not 4\nits item: 4") as found:
        list(parallel.map(task, range(20), workers=workers))
    assert found.value.number == 4
    assert isinstance(found.value.__cause__, ValueError)
    assert "in task" in str(found.value)  # the traceback at the worker
    with pytest.raises(TaskError, match="task 4 failed: ValueError: not 4") as found:
        parallel.map_reduce(task, lambda a, b: a + b, range(20), workers=workers)
    assert found.value.number == 4


def test_results_before_a_failure_are_given_out() -> None:
    results = parallel.map(fail_at(3), range(9), workers=2)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(TaskError):
        next(results)


@pytest.mark.parametrize("workers", WORKERS)
def test_failures_go_into_quarantine_in_the_order_of_the_items(workers: int) -> None:
    quarantine: list[parallel.Failure] = []
    results = list(parallel.map(fail_at(2, 3, 8), range(9), workers=workers, quarantine=quarantine))
    assert results == [0, 1, 4, 5, 6, 7]
    assert [(failure.number, failure.item, failure.error) for failure in quarantine] == [
        (number, number, f"ValueError: not {number}") for number in (2, 3, 8)
    ]
    assert isinstance(quarantine[0].exception, ValueError) and "in task" in quarantine[0].trace


@pytest.mark.parametrize("workers", WORKERS)
def test_a_failure_in_quarantine_is_a_missing_leaf(workers: int) -> None:
    quarantine: list[parallel.Failure] = []
    task = fail_at(2, 3, 4, 6)
    result = parallel.map_reduce(
        lambda item: str(task(item)), lambda a, b: f"({a}{b})", range(8), workers=workers, quarantine=quarantine
    )
    assert result == "((01)(57))"
    assert sorted(failure.number for failure in quarantine) == [2, 3, 4, 6]
    with pytest.raises(ParallelError, match="at least one item"):
        parallel.map_reduce(fail_at(0), lambda a, b: a, range(1), workers=workers, quarantine=quarantine)


def test_a_task_that_fails_twice_succeeds_at_the_third_try(tmp_path: Path) -> None:
    def task(item: int) -> tuple[int, int]:
        if item == 5 and count_file(tmp_path / "tries") < 3:
            raise OSError("not yet")
        return item, parallel.key()

    expected = list(parallel.map(lambda item: (item, parallel.key()), range(9), workers=1))
    assert list(parallel.map(task, range(9), workers=2, retries=2)) == expected  # and the key stays the same
    (tmp_path / "tries").unlink()
    with pytest.raises(TaskError, match="task 5 failed: OSError: not yet"):
        list(parallel.map(task, range(9), workers=2, retries=1))


def test_an_error_of_combine_ends_the_call_and_says_so() -> None:
    """Wherever it was called; quarantine does not help, and nothing is tried again with a half-changed `left`."""

    def combine(a: int, b: int) -> int:
        raise RuntimeError("no")

    for workers, count in itertools.product((1, 3), (2, 3, 100)):
        with pytest.raises(TaskError, match="combine failed: RuntimeError: no") as found:
            parallel.map_reduce(double, combine, range(count), workers=workers, quarantine=[], retries=3)
        assert isinstance(found.value.__cause__, RuntimeError)


class LocalError(Exception):
    """Cannot be put together again: its constructor takes two arguments, its pickle has one."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def test_exceptions_that_cannot_travel_are_told_in_words() -> None:
    def task(item: int) -> None:
        if item == 0:
            raise LocalError(1, 2)

        class Inner(Exception):
            pass

        raise Inner(lambda: 0)

    quarantine: list[parallel.Failure] = []
    assert list(parallel.map(task, range(2), workers=2, quarantine=quarantine)) == []
    assert "LocalError: 1 and 2" in quarantine[0].error and "Inner" in quarantine[1].error
    assert [failure.exception for failure in quarantine] == [None, None]


class Unsent:
    def __reduce__(self):
        raise TypeError("stays here")


class Shy:
    def __repr__(self) -> str:
        raise ValueError("shy")


class Unread:
    def __reduce__(self):
        return divmod, (1, 0)


def test_results_that_cannot_be_sent_fail_with_their_item() -> None:
    def task(item: int) -> object:
        return {3: lambda: 0, 5: Unsent(), 6: (np.zeros(9000), Unsent()), 7: Unread()}.get(item, item)

    quarantine: list[parallel.Failure] = []
    assert list(parallel.map(task, range(9), workers=2, quarantine=quarantine)) == [0, 1, 2, 4, 8]
    assert [failure.number for failure in quarantine] == [3, 5, 6, 7]
    assert all("its result cannot be sent" in failure.error for failure in quarantine[:3])
    assert "stays here" in quarantine[1].error
    assert "cannot be put together again: ZeroDivisionError" in quarantine[3].error
    for number in (3, 7):
        with pytest.raises(TaskError, match="task 0 failed: its result") as found:
            parallel.map_reduce(lambda item: task(item + number), lambda a, b: a, range(1), workers=1)  # noqa: B023
        assert found.value.number == 0


def test_items_that_cannot_be_sent_fail_with_their_number() -> None:
    items = [0, Unsent(), 2, (np.zeros(9000), Unsent()), Unread(), 5]
    quarantine: list[parallel.Failure] = []
    assert list(parallel.map(lambda item: item, items, workers=2, quarantine=quarantine)) == [0, 2, 5]
    assert [failure.number for failure in quarantine] == [1, 3, 4]
    assert "its item cannot be sent to a worker: TypeError: stays here" in quarantine[0].error
    assert "its item was sent, but cannot be put together again" in quarantine[2].error
    with pytest.raises(TaskError, match="task 1 failed: its item cannot be sent"):
        list(parallel.map(lambda item: item, items, workers=2))


def test_an_item_whose_repr_raises_does_not_hide_the_failure() -> None:
    with pytest.raises(TaskError, match="its item: <Shy, whose repr raised"):
        list(parallel.map(lambda item: 1 / 0, [Shy()], workers=1))


def test_exits_and_lack_of_memory_are_failures_like_others() -> None:
    def task(item: int) -> None:
        if item == 0:
            sys.exit(3)
        if item == 1:
            raise MemoryError("a lot")
        raise GeneratorExit

    quarantine: list[parallel.Failure] = []
    assert list(parallel.map(task, range(3), workers=2, quarantine=quarantine)) == []
    assert [failure.error for failure in quarantine] == ["SystemExit: 3", "MemoryError: a lot", "GeneratorExit"]


def test_errors_of_the_items_themselves_reach_the_caller() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(parallel.map(double, items(), workers=2))


# Losses


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_missing(tmp_path: Path) -> None:
    def task(item: int) -> float:
        if item == 17 and count_file(tmp_path / "tries") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return random.random()

    expected = list(parallel.map(lambda item: random.random(), range(50), workers=1))
    assert list(parallel.map(task, range(50), workers=3)) == expected
    (tmp_path / "tries").unlink()
    total = parallel.map_reduce(task, lambda a, b: a + b, range(50), workers=3)
    assert total == fold(expected)


def kill_at(*numbers: int):
    def task(item: int) -> int:
        if item in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return task


def test_a_task_that_kills_its_worker_each_time_is_named() -> None:
    with pytest.raises(
        TaskError, match="task 7 failed: its worker was killed by SIGKILL, 3 times\nits item: 7"
    ) as found:
        list(parallel.map(kill_at(7), range(20), workers=2))
    assert found.value.number == 7
    quarantine: list[parallel.Failure] = []
    assert list(parallel.map(kill_at(7), range(9), workers=2, quarantine=quarantine)) == [0, 1, 2, 3, 4, 5, 6, 8]
    assert [failure.number for failure in quarantine] == [7]


def test_many_tasks_may_kill_their_workers() -> None:
    """Twelve losses in a row say nothing against the place: each has a task to blame."""
    quarantine: list[parallel.Failure] = []
    assert list(parallel.map(kill_at(0, 1, 2, 3), range(5), workers=1, quarantine=quarantine)) == [4]
    assert [failure.number for failure in quarantine] == [0, 1, 2, 3]


def test_how_a_worker_ended_is_told() -> None:
    with pytest.raises(TaskError, match="its worker ended with exit code 9, 3 times"):
        list(parallel.map(lambda item: os._exit(9), range(1), workers=1))


def test_a_task_that_takes_too_long_is_ended() -> None:
    def task(item: int) -> int:
        if item == 3:
            time.sleep(600)
        return item

    with pytest.raises(TaskError, match="task 3 failed: it took longer than timeout_seconds"):
        list(parallel.map(task, range(9), workers=2, timeout_seconds=1.0))
    quarantine: list[parallel.Failure] = []
    results = list(parallel.map(task, range(9), workers=2, timeout_seconds=1.0, quarantine=quarantine))
    assert results == [0, 1, 2, 4, 5, 6, 7, 8]


def test_a_late_task_may_be_quicker_next_time(tmp_path: Path) -> None:
    def task(item: int) -> int:
        if item == 3 and count_file(tmp_path / "tries") == 1:
            time.sleep(600)
        return item

    assert list(parallel.map(task, range(9), workers=2, timeout_seconds=1.0, retries=1)) == list(range(9))


def test_many_short_tasks_are_not_late_together() -> None:
    assert len(list(parallel.map(lambda item: time.sleep(0.05), range(60), workers=2, timeout_seconds=1.0))) == 60


def test_workers_that_cannot_live_end_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "settle", lambda threads: os._exit(4))
    with pytest.raises(WorkerError, match="workers in a row were lost; the last one ended with exit code 4"):
        list(parallel.map(double, range(100), workers=2))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = """
import os, sys, time
from unisono import parallel
def task(item):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(600)
list(parallel.map(task, range(2), workers=2))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_running(worker) for worker in workers)
    process.stdout.close()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ctrl_c_ends_workers_and_is_raised(tmp_path: Path) -> None:
    """A terminal sends SIGINT to the whole group; the workers leave it to their parent."""
    script = """
import multiprocessing, os, sys, time
from unisono import parallel
def task(item):
    if item == 1:
        print("at work", flush=True)
    time.sleep(600 if item else 0)
try:
    list(parallel.map(task, range(4), workers=2))
except KeyboardInterrupt:
    print("interrupted", len(multiprocessing.active_children()), flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=180)
    assert (process.returncode, out, err) == (0, "interrupted 0\n", "")


# What tasks may do


def test_functions_are_inherited_not_sent() -> None:
    big = np.arange(1 << 20)
    lock = threading.Lock()  # cannot be pickled

    def task(item: int) -> int:
        with lock:
            return int(big[item])

    assert list(parallel.map(task, range(5), workers=2)) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_tasks_may_have_workers_of_their_own() -> None:
    def task(item: int) -> tuple[int, int]:
        outer = parallel.key()
        inner = list(parallel.map(lambda one: parallel.key(), range(3), workers=2, seed=item))
        assert list(parallel.map(double, range(3), workers=2, seed=None)) == [0, 2, 4]
        return outer, sum(inner)

    assert list(parallel.map(task, range(4), workers=2)) == list(parallel.map(task, range(4), workers=1))


def test_a_worker_without_a_seed_has_no_key_of_its_parents_task() -> None:
    def task(item: int) -> None:
        with pytest.raises(TaskError, match="no random key"):
            list(parallel.map(lambda one: parallel.key(), range(1), workers=1, seed=None))

    list(parallel.map(task, range(1), workers=1))


def test_calls_may_be_made_from_threads_at_once() -> None:
    results: dict[int, list[int]] = {}

    def call(number: int) -> None:
        results[number] = list(parallel.map(double, range(300), workers=2))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert results == {number: [2 * item for item in range(300)] for number in range(3)}


def test_two_calls_may_be_open_at_once() -> None:
    one, two = parallel.map(double, range(50), workers=2), parallel.map(str, range(50), workers=2)
    assert list(zip(one, two, strict=True)) == [(2 * item, str(item)) for item in range(50)]


def test_what_tasks_print_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    list(parallel.map(lambda item: print(f"item {item}"), range(3), workers=2))
    assert sorted(capfd.readouterr().out.splitlines()) == ["item 0", "item 1", "item 2"]


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    list(parallel.map(double, range(3), workers=2))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        list(parallel.map(kill_at(1), range(3), workers=2, quarantine=[]))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# Progress and arguments


def test_progress_is_told_with_the_total_where_there_is_one() -> None:
    told: list[tuple[int, int | None]] = []
    list(parallel.map(double, range(30), workers=2, progress=lambda done, total: told.append((done, total))))
    assert told[-1] == (30, 30) and [done for done, _ in told] == sorted(done for done, _ in told)
    told.clear()
    parallel.map_reduce(double, max, (item for item in range(30)), workers=2, progress=lambda *both: told.append(both))
    assert told[-1] == (30, None)


def test_a_bar_is_shown_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(parallel.map(double, range(3), workers=1, progress=True)) == [0, 2, 4]
    out, err = capfd.readouterr()
    assert out == "" and "3/3" in err
    list(parallel.map(double, range(3), workers=1))  # no terminal, no bar
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers = 0: allowed are whole numbers from 1, or 'auto' for one per core"),
        ({"workers": 1.5}, "workers = 1.5: allowed"),
        ({"workers": True}, "workers = True: allowed"),
        ({"workers": "all"}, "workers = 'all': allowed"),
        ({"threads": 0}, "threads = 0: allowed are whole numbers from 1"),
        ({"retries": -1}, "retries = -1: allowed are whole numbers from 0"),
        ({"seed": 1.0}, "seed = 1.0: allowed are whole numbers, or None"),
        ({"timeout_seconds": 0}, "timeout_seconds = 0: allowed are numbers above 0, or None"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds = nan: allowed are numbers above 0, or None"),
        ({"timeout_seconds": "1"}, "timeout_seconds = '1': allowed"),
        ({"engine": "threads"}, "engine = 'threads': allowed are 'processes', 'ray'"),
        ({"engine": 3}, "engine = 3: allowed"),
        ({"quarantine": "bad"}, "quarantine = 'bad': allowed is what has an append method"),
    ],
)
def test_arguments_that_cannot_be_used_say_what_can(arguments: dict[str, object], message: str) -> None:
    """At the call, not at the first result."""
    with pytest.raises(ParallelError) as found:
        parallel.map(double, [1], **arguments)  # type: ignore[arg-type]
    assert message in str(found.value)
    with pytest.raises(ParallelError) as found:
        parallel.map_reduce(double, max, [1], **arguments)  # type: ignore[arg-type]
    assert message in str(found.value)


def test_functions_and_items_that_are_none_say_so() -> None:
    with pytest.raises(ParallelError, match=r"function = 3: not callable\. Give a function of one item"):
        parallel.map(3, [1])  # type: ignore[arg-type]
    with pytest.raises(ParallelError, match=r"combine = None: not callable\. Give a function of two results"):
        parallel.map_reduce(double, None, [1])  # type: ignore[arg-type]
    with pytest.raises(ParallelError, match="items = 3: not iterable"):
        parallel.map(double, 3)  # type: ignore[arg-type]


def test_auto_is_one_worker_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    found = []
    for _ in parallel.map(lambda item: time.sleep(0.01), range(20)):
        found.append(len(multiprocessing.active_children()))
    assert max(found) == 3
