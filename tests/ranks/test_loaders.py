"""Loader processes: what they load is what the source holds, whoever loads it, and they end with their worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from unisono.data.feed import Feed
from unisono.data.items import Items
from unisono.data.loaders import LoaderPool, Wanted, load_in_turn
from unisono.data.order import Order
from unisono.errors import DataError
from unisono.processes.forking import fork

CPU = torch.device("cpu")
DEADLINE_SECONDS = 30.0


class Squares:
    """A `Source` of another kind than those of the package, with all that it needs. It draws from torch's generator."""

    padded = True
    prefetchable = False
    sha256 = "squares"

    def __init__(self, samples: int = 40) -> None:
        self.lengths = np.ones(samples, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, samples: np.ndarray, epoch: int = 0, repeats: np.ndarray | None = None) -> dict[str, Tensor]:
        torch.manual_seed(int(samples.sum()) + 1000 * epoch)
        return {
            "square": torch.from_numpy(samples**2),
            "noise": torch.randn(len(samples), 3),
            "none": torch.empty(0, 2),
        }


class Named:
    """A dataset whose items say which process has loaded them."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, sample: int) -> dict[str, Any]:
        return {"sample": sample, "process": os.getpid()}


class Fails(Named):
    """… and that fails at sample 7, if `how` is done in a loader."""

    def __init__(self, how: str) -> None:
        self.how, self.parent = how, os.getpid()

    def __getitem__(self, sample: int) -> dict[str, Any]:
        if sample == 7 and os.getpid() != self.parent:
            match self.how:
                case "raise":
                    raise KeyError("no such picture")
                case "refuse":
                    raise DataError("sample 7 is not to be used")
                case "exit":
                    raise SystemExit(3)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "crash":
                    os.kill(os.getpid(), signal.SIGSEGV)
        return super().__getitem__(sample)


def wanted(*samples: int, key: int = 0) -> Wanted:
    return Wanted(key=(0, key), samples=np.array(samples))


def wait_for_end(process: int) -> None:
    """Return when no process has this number; fail after a while."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":  # nobody has asked for its exit code
            return
        assert time.monotonic() < deadline, f"process {process} goes on"
        time.sleep(0.01)


def draw_shares(order: Order) -> Iterator[tuple[Any, range]]:
    """Every step with a share that jumps about, such as no worker would have."""
    random = np.random.default_rng(0)
    for step in order.steps():
        start, stop = sorted(random.integers(0, len(step.microbatches) + 1, 2).tolist())
        yield step, range(start, stop)


@pytest.mark.parametrize("by_file", [True, False], ids=["memory files", "pipes"])
def test_feed_gives_what_the_source_holds_however_shares_move(by_file: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisono.data.loaders._makes_memory_files", lambda: by_file)
    source = Squares()
    order = Order(
        lengths=source.lengths, padded=True, samples_per_step=12, microbatches=6, seed=3, total_steps=9
    )  # the last step of an epoch has four microbatches
    seen = 0
    with closing(Feed(source, order, CPU, loaders=2)) as feed:
        for step, share in draw_shares(order):
            for number, found in feed.load(step, share):
                expected = source.take(step.microbatches[number], epoch=step.epoch)
                assert found.keys() == expected.keys()
                for name in expected:
                    assert torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype
                    assert found[name].data_ptr() % 64 == 0
                seen += 1
    assert seen > 10


def test_loaders_read_ahead_of_use_and_over_steps() -> None:
    """A worker with one microbatch a step still keeps its loaders busy: without the plan over steps there is one."""
    source = Items(Named(), seed=0)
    order = Order(lengths=source.lengths, padded=True, samples_per_step=4, microbatches=2, seed=3, total_steps=10)
    processes = set()
    with closing(Feed(source, order, CPU, loaders=2)) as feed:
        for step in order.steps():
            for _, found in feed.load(step, range(1)):
                processes |= set(found["process"].tolist())
                assert feed._pool is not None and feed._pool._plan.keys() <= {
                    (number, 0) for number in range(step.number, order.total_steps)
                }
                assert len(feed._pool._plan) == min(4, order.total_steps - step.number) - 1
    assert len(processes) == 2 and os.getpid() not in processes


def test_pool_drops_what_is_no_longer_wanted() -> None:
    with closing(LoaderPool(Items(Named(), seed=0), 2)) as pool:
        pool.want([wanted(number, key=number) for number in range(8)])
        pool.want([wanted(11, key=11)])
        assert pool.result((0, 11))["sample"].tolist() == [11]
        pool.want([wanted(number, key=number) for number in (3, 12)])
        assert [pool.result((0, number))["sample"].item() for number in (12, 3)] == [12, 3]
        assert not pool._found


def test_what_is_prepared_is_prepared_in_a_thread() -> None:
    """As microbatches are copied into page-locked memory for a GPU."""
    with closing(LoaderPool(Squares(), 1, lambda found: {"more": found["square"] + 1})) as pool:
        pool.want([wanted(3, 4)])
        assert pool.result((0, 0))["more"].tolist() == [10, 17]


def test_signals_are_the_workers_matter_and_a_closed_pool_leaves_no_process() -> None:
    pool = LoaderPool(Items(Named(), seed=0), 2)
    processes = [loader.process.pid for loader in pool._loaders]
    for process in processes:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.kill(process, signum)  # type: ignore[arg-type]
    pool.want([wanted(number, key=number) for number in range(4)])
    assert {pool.result((0, number))["process"].item() for number in range(4)} <= set(processes)
    pool.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)  # type: ignore[arg-type]


def test_loaders_end_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "processes"

    def work() -> None:
        pool = LoaderPool(Items(Named(), seed=0), 2)
        told.write_text(" ".join(str(loader.process.pid) for loader in pool._loaders))
        os.kill(os.getpid(), signal.SIGKILL)

    worker = fork(work, (), "worker")
    worker.join(DEADLINE_SECONDS)
    assert worker.exitcode == -signal.SIGKILL
    for process in told.read_text().split():
        wait_for_end(int(process))


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ("raise", RuntimeError, r"KeyError: 'no such picture'(.|\n)*asked for sample 7 in epoch 0"),
        ("refuse", DataError, r"^sample 7 is not to be used$"),
        ("exit", RuntimeError, r"ended with exit code 1 while it loaded sample 7 of epoch 0(.|\n)*SystemExit: 3"),
        ("kill", RuntimeError, r"was killed by SIGKILL while it loaded sample 7 of epoch 0.*out of memory"),
        ("crash", RuntimeError, r"was killed by SIGSEGV while it loaded sample 7 of epoch 0(.|\n)*__getitem__"),
    ],
)
def test_failure_is_told_with_its_sample_and_traceback(how: str, kind: type[Exception], told: str) -> None:
    source = Items(Fails(how), seed=0)
    with pytest.raises(kind, match=told):
        list(load_in_turn(source, [np.array([1, 2]), np.array([3, 7, 8])], 2))


def test_source_without_a_watch_is_told_with_all_samples() -> None:
    class Killed(Squares):
        def take(self, samples: np.ndarray, epoch: int = 0, repeats: np.ndarray | None = None) -> dict[str, Tensor]:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

    with pytest.raises(RuntimeError, match=r"while it loaded one of the samples \[4, 5\] of epoch 0"):
        list(load_in_turn(Killed(), [np.array([4, 5])], 1))


def test_evaluation_reads_in_turn_with_and_without_loaders() -> None:
    pieces = [np.array([5, 1]), np.array([2]), np.array([9, 8, 7])]
    for loaders in (0, 2, 5):
        found = [part["square"].tolist() for part in load_in_turn(Squares(), pieces, loaders)]
        assert found == [[25, 1], [4], [81, 64, 49]]
