"""What the tests of faults share: a run to which nothing has happened."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from histories import OFTEN, Quiet

from toy import make_toy
from unisono.processes.fault_injection import KINDS
from unisono.tracking import ledger as metrics


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No curves are drawn: they take a quarter of a run's time."""
    monkeypatch.setattr(metrics, "draw_curves", lambda lines, path: None)


@pytest.fixture(scope="session")
def quiet(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    import unisono

    folder = tmp_path_factory.mktemp("quiet")
    recipe = make_toy(folder)
    run = unisono.train(recipe, workers=1, run=folder / "run", quiet=True, overrides=OFTEN).folder
    return Quiet(recipe=recipe, run=run)


@pytest.fixture
def disturbed(quiet: Quiet, tmp_path: Path) -> Callable[..., Path]:
    """`disturbed(*faults, workers=…, **settings)` trains the same; returns its run folder."""
    import unisono

    def train(*faults: str, overrides: tuple[str, ...] = (), run: str = "run", **options: Any) -> Path:
        given = (*OFTEN, *overrides)
        return unisono.train(
            quiet.recipe, run=tmp_path / run, quiet=True, overrides=given, faults=faults, **options
        ).folder

    return train


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that holds up a run: the fault "pause" lasts until it is removed. So a test acts at a known place of the
    run, however slow the machine is."""
    hold = tmp_path / "hold"
    hold.touch()

    def pause() -> None:
        while hold.exists():
            time.sleep(0.005)

    monkeypatch.setitem(KINDS, "pause", pause)
    return hold
