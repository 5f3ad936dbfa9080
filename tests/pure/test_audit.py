"""Who computed wrong bits: the verdict of an audit, and an audit in a run whose worker errs once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import unisono
from toy import make_toy
from unisono.determinism import keys
from unisono.engine.assignment import shares
from unisono.engine.audit import find_wrong
from unisono.tasks.text.classification import TextClassification

RIGHT, WRONG, OTHER = {"loss": "1", "weight": "a"}, {"loss": "1", "weight": "b"}, {"loss": "1", "weight": "c"}


@pytest.mark.parametrize(
    ("first", "again", "votes", "suspects"),
    [
        (WRONG, RIGHT, [RIGHT, RIGHT, RIGHT], [0]),  # the owner erred once
        (RIGHT, WRONG, [RIGHT, RIGHT, RIGHT], [1]),  # the auditor erred once
        (WRONG, RIGHT, [WRONG, RIGHT, RIGHT], [0]),  # the owner always errs
        (RIGHT, WRONG, [RIGHT, WRONG, RIGHT], [1]),
        (WRONG, RIGHT, [RIGHT, RIGHT, OTHER], [0, 2]),  # and a third one, too
        (WRONG, RIGHT, [WRONG, RIGHT], [0, 1]),  # two workers, each sure of itself
        (WRONG, RIGHT, [RIGHT, RIGHT], [0]),  # two workers, one of them was not
        (WRONG, RIGHT, [RIGHT], [0]),  # one worker differs from itself
    ],
)
def test_the_minority_is_wrong(
    first: dict[str, str], again: dict[str, str], votes: list[dict[str, str]], suspects: list[int]
) -> None:
    auditor = 1 if len(votes) > 1 else 0
    assert find_wrong(first=first, owner=0, again=again, auditor=auditor, votes=votes) == (suspects, ["weight"])


def err_once(monkeypatch: pytest.MonkeyPatch, my_rank: Callable[[], int], sign: Path, worker: int) -> None:
    """Let the worker of this rank compute one loss slightly wrong, once `sign` is there; then take it away."""
    honest: Callable[..., tuple[torch.Tensor, int]] = TextClassification.loss

    def loss(self: TextClassification, module: nn.Module, microbatch: object) -> tuple[torch.Tensor, int]:
        total, terms = honest(self, module, microbatch)
        if sign.exists() and my_rank() == worker:
            sign.unlink()
            total = total * (1 + 1e-6)
        return total, terms

    monkeypatch.setattr(TextClassification, "loss", loss)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(("workers", "worker"), [pytest.param(3, 2, marks=pytest.mark.slow), (2, 0), (1, 0)])
def test_an_audit_finds_who_erred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, my_rank: Callable[[], int], workers: int, worker: int
) -> None:
    """An audit looks at one microbatch of a step: with this seed, at the one in which the worker errs, its first."""
    recipe, sign = make_toy(tmp_path), tmp_path / "err"
    first = shares(4, workers)[worker].start
    seed = next(seed for seed in range(100) if keys.key(seed, "audit", 0) % 4 == first)
    err_once(monkeypatch, my_rank, sign, worker)
    monkeypatch.setattr("unisono.runtime.setup._try_out", lambda run: [])  # it would meet the error first
    sign.touch()
    run, quiet = (
        unisono.train(
            recipe, workers=count, run=tmp_path / name, quiet=True, allow_impure=True,
            overrides=["train.max_steps=3", f"train.audit_every={every}", f"train.seed={seed}"],
        )
        for count, name, every in ((workers, "run", 1), (1, "quiet", 0))
    )  # fmt: skip
    assert not sign.exists()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if line["event"] == "Corrupted"]
    assert found["workers"] == [worker] and found["step"] == 1
    assert "loss" in found["parameters"]
    assert run.weights_sha256 == quiet.weights_sha256
    assert run.summary["recoveries"] == 1


def test_audits_change_no_bit(trained: dict[int, Path], tmp_path: Path) -> None:
    recipe = make_toy(tmp_path)
    expected = json.loads((trained[1] / "summary.json").read_text())["weights_sha256"]
    run = unisono.train(recipe, workers=3, run=tmp_path / "run", quiet=True, overrides=["train.audit_every=2"])
    assert run.weights_sha256 == expected and run.summary["recoveries"] == 0
