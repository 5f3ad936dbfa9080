"""Each worker has a device of its own, and all have the same kind: in plain values, with no GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unisono.config import recipe as recipes
from unisono.errors import RecipeError
from unisono.runtime.launchers.devices import Told, choose, compare
from unisono.runtime.launchers.fork import launch
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.supervisor import Supervisor
from unisono.storage.run_lock import WorkersRequest


def assignment(local_rank: int, local_workers: int) -> RankAssignment:
    return RankAssignment(rank=local_rank, workers=local_workers, local_rank=local_rank, local_workers=local_workers)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("wanted", "gpus", "place", "device"),
    [
        ("auto", 0, (2, 3), "cpu"),
        ("cpu", 2, (1, 2), "cpu"),
        ("auto", 2, (1, 2), "cuda:1"),
        ("cuda", 4, (1, 2), "cuda:1"),
        ("auto", 1, (0, 1), "cuda:0"),
        ("auto", 1, (3, 4), "cuda:0"),  # its own, as Slurm shows it
    ],
)
def test_the_device_of_a_worker(wanted: str, gpus: int, place: tuple[int, int], device: str) -> None:
    assert choose(wanted, gpus=gpus, local_rank=place[0], local_workers=place[1]) == device


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
@pytest.mark.parametrize("local_rank", [0, 1, 2])
@pytest.mark.usefixtures("two_gpus")
def test_three_workers_on_two_gpus_are_refused(wanted: str, local_rank: int) -> None:
    with pytest.raises(RecipeError, match=r'2 GPUs for 3 workers.* Use 2 workers at most, or set train.device = "cpu"'):
        assignment(local_rank, 3).device(wanted)
    assert assignment(local_rank, 3).device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_a_worker_started_late_needs_a_gpu_of_its_own_too() -> None:
    with pytest.raises(RecipeError, match="Use 2 workers at most"):
        assignment(2, 2).device("auto")


@pytest.mark.usefixtures("two_gpus")
def test_too_many_workers_are_refused_before_any_is_started(tmp_path: Path) -> None:
    def supervise(workers: int) -> Supervisor:
        observer: Any = None
        part: Any = None
        return Supervisor(part, recipe=recipes.check({}), folder=tmp_path, observer=observer, workers=workers)

    for start in (supervise, lambda workers: launch(workers, lambda *_: None, threads=1, device="auto")):
        with pytest.raises(RecipeError, match=r"`--workers 3`: this machine has 2 GPUs.* Use 2 workers at most"):
            start(3)
    answers: list[tuple[str, bool]] = []
    run_lock: Any = SimpleNamespace(answer=lambda request, text, done: answers.append((text, done)))
    supervisor = supervise(2)
    supervisor._training = True
    supervisor._resize(run_lock, WorkersRequest(name="a", workers=3))
    assert answers == [("at most 2 workers can be at work: each needs a GPU of its own", False)]
    assert supervisor._change is None


CPU, ONE, OTHER = Told(kind="cpu", host="a"), Told(kind="cuda", gpu="GPU-1"), Told(kind="cuda", gpu="GPU-2", host="b")
NONE = Told(fault="there is no GPU", host="c")


@pytest.mark.parametrize("everyone", [[CPU, CPU], [ONE, OTHER], [Told(kind="cuda")] * 2])
def test_workers_that_agree(everyone: list[Told]) -> None:
    compare(everyone)


@pytest.mark.parametrize(
    ("everyone", "message"),
    [
        ([OTHER, CPU, OTHER], r"workers 0, 2 \(b\) on 'cuda', worker 1 \(a\) on 'cpu'.*at most as many workers"),
        ([OTHER, ONE, OTHER], r"workers 0, 2 \(b\) on GPU-2\. Use 2 workers at most.*CUDA_VISIBLE_DEVICES"),
        ([CPU, NONE, NONE], r"workers 1, 2 \(c\): there is no GPU"),
    ],
    ids=["kinds", "shared", "fault"],
)
def test_workers_that_do_not_agree_are_named(everyone: list[Told], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        compare(everyone)
