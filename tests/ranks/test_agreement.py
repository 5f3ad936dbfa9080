"""Workers that are not at one and the same state never add what they contribute."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from worlds import CPU, Forked, Heard, train_alone

import zoo
from unisono.config import recipe as recipes
from unisono.config.sections import Train
from unisono.data.columns import Columns
from unisono.data.feed import Feed
from unisono.data.order import Order
from unisono.engine.contribution import Contributor
from unisono.engine.loop import steps
from unisono.engine.optimizer import Optimizer
from unisono.engine.state import TrainState
from unisono.errors import LostPeerError, RecipeError, RunFolderError
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.exchange.solo import Solo
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.setup import Job, Resume
from unisono.storage import checkpoints
from unisono.storage.origin import COMMIT, Origin, compare
from unisono.tasks.own_inputs import open_own

SETTINGS: dict[str, Any] = {
    "train": {"samples_per_step": 20, "microbatches": 4, "epochs": 3.0, "learning_rate": 0.05},
    "checkpoint": {"every_steps": 1, "keep": 99},
}


def train(exchange: Exchange, folder: Path, resume: Resume = "auto") -> list[str]:
    """Train to the end; return the warnings."""
    recipe = recipes.check(SETTINGS)
    heard = Heard(folder)
    inputs = open_own(recipe, zoo.Classified(zoo.bag), zoo.words())
    train_alone(Job(recipe=recipe, folder=folder, resume=resume), inputs, exchange, [heard])
    return heard.warnings


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run of one worker, never interrupted, with a checkpoint of every step."""
    train(Solo(), tmp_path / "whole", "no")
    return tmp_path / "whole"


def take(whole: Path, folder: Path, *steps: int) -> None:
    """Give a folder some of the checkpoints."""
    for step in steps:
        path = checkpoints.name_checkpoint(whole / "checkpoints", step)
        shutil.copytree(path, checkpoints.name_checkpoint(folder / "checkpoints", step))


def alter(folder: Path, step: int) -> None:
    """Make a checkpoint that of another history: whole, and other weights."""
    found = checkpoints.read(checkpoints.verify(checkpoints.name_checkpoint(folder / "checkpoints", step)))
    for value in found.parameters.values():
        value += 1
    facts = {name: value for name, value in found.facts.items() if name not in ("format", "files")}
    checkpoints.write(dataclasses.replace(found, facts=facts), folder / "checkpoints", keep=99)


def damage(folder: Path, step: int) -> None:
    path = checkpoints.name_checkpoint(folder / "checkpoints", step) / "parameters.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("case", ["none", "another step", "another content", "damaged"])
def test_workers_that_would_resume_from_different_states_are_refused(
    case: str, whole: Path, tmp_path: Path, forked: Forked
) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder, steps_there in zip(folders, ([2], {"none": [], "another step": [1]}.get(case, [2])), strict=True):
        take(whole, folder, *steps_there)
    if case == "another content":
        alter(folders[1], 2)
    if case == "damaged":
        take(whole, folders[0], 3)
        take(whole, folders[1], 3)
        damage(folders[1], 3)

    def act(exchange: Exchange) -> str:
        try:
            train(exchange, folders[exchange.rank])
        except RunFolderError as error:
            return str(error)
        return "trained"

    found = forked(2, act)
    assert found[0] == found[1], found
    first, other = {
        "none": (2, rf"0, since '{folders[1]}' has no whole"),
        "another step": (2, r"1 \(content"),
        "another content": (2, r"2 \(content"),
        "damaged": (3, r"2 \(content"),
    }[case]
    assert re.search(
        rf"worker 0 on .*: after step {first} \(content .*\n *worker 1 on .*: after step {other}", found[0]
    )
    assert "--run-folder" in found[0] and "copy the newest checkpoint" in found[0]
    assert sorted(path.name for path in tmp_path.glob("*/checkpoints/*.damaged")) == []


def test_equal_checkpoints_in_different_folders_will_do(whole: Path, tmp_path: Path, forked: Forked) -> None:
    """Also where only one of them has a newer, damaged one."""
    folders = [tmp_path / "one", tmp_path / "other"]
    take(whole, folders[0], 2)
    take(whole, folders[1], 2, 3)
    damage(folders[1], 3)
    told = forked(2, lambda exchange: train(exchange, folders[exchange.rank]))
    (warning,) = told[0]
    assert str(folders[1]) in warning and "Not used; going on from step-00000002." in warning
    model = "model/model.safetensors"
    assert (folders[0] / model).read_bytes() == (whole / model).read_bytes()


@pytest.mark.parametrize("other", ["cuda", "none"])
def test_workers_that_do_not_compute_on_one_kind_of_device_are_refused(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any of them chooses how to exchange, so that none waits for the others in another place."""

    def join(rank: int) -> None:
        assignment = RankAssignment(rank=rank, workers=2, local_rank=rank, local_workers=2)
        with pytest.raises(RecipeError) as refused:
            if rank == 0:
                assignment.join(CPU)
            elif other == "none":
                assignment.refuse("there is no GPU")
            else:
                assignment.join(torch.device("cuda", 0))
        told = str(refused.value)
        assert re.search(
            {"cuda": r"worker 0 \(.*\) on 'cpu', worker 1 \(.*\) on 'cuda'", "none": r"worker 1 \(.*\): there is no"}[
                other
            ],
            told,
        )

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(RankAssignment, "_store", lambda self: torch.distributed.FileStore(str(tmp_path / "store"), 2))
    workers = [multiprocessing.get_context("fork").Process(target=join, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        worker.kill()
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_commit_that_only_some_have_seen_costs_their_group_not_the_run() -> None:
    one, other = (Origin(step=2, state=f"{COMMIT}{number}", place="in the snapshot") for number in (3, 4))
    compare([one, one])
    with pytest.raises(LostPeerError, match=r"commit 3.*\n.*commit 4"):
        compare([one, other])


def take_steps(exchange: Exchange, start: int) -> str:
    """Train a linear layer from a step on; return what it ends with."""
    source = Columns({name: torch.from_numpy(column) for name, column in zoo.words(12).items()})
    source.prefetchable = False
    task, settings = zoo.Classified(zoo.bag), Train(microbatches=4)
    torch.manual_seed(0)
    replica = zoo.replicate(task, exchange.rank, exchange.workers)
    order = Order(
        lengths=source.lengths, padded=True, samples_per_step=12, microbatches=4, seed=1, total_steps=4
    )  # fmt: skip
    state = TrainState(step=start, replica=replica, optimizer=Optimizer(replica, exchange, settings), exchange=exchange)
    contributor = Contributor(replica=replica, seed=2)
    try:
        for _ in steps(state, order, Feed(source, order, CPU), contributor, settings):
            return "added"
    except LostPeerError as error:
        return str(error)
    return "nothing to do"


def test_different_steps_are_never_added(forked: Forked) -> None:
    assert forked(2, lambda exchange: take_steps(exchange, 1)) == ["added"] * 2
    found = forked(2, lambda exchange: take_steps(exchange, exchange.rank))
    assert all("worker 0 at step 1 (group 0), worker 1 at step 2 (group 0)" in told for told in found), found


def test_different_groups_are_never_added() -> None:
    def act(exchange: Exchange) -> str:
        exchange.generation = 3 + exchange.rank
        return take_steps(exchange, 0)

    found = play(2, act)
    assert all("worker 0 at step 1 (group 3), worker 1 at step 1 (group 4)" in told for told in found), found
