"""What the tests of faults share: a run to which nothing has happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from histories import OFTEN, Quiet

from toy import make_toy
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
