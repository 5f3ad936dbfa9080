"""What every test with several workers shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from worlds import Forked, fork

from unisono.exchange.protocol import Exchange


@pytest.fixture
def forked(tmp_path_factory: pytest.TempPathFactory) -> Forked:
    """`forked(workers, function)` calls `function(exchange)` in each worker; returns their (JSON) results by rank."""

    def run(workers: int, function: Callable[[Exchange], Any]) -> list[Any]:
        return fork(workers, function, tmp_path_factory.mktemp("forked"))

    return run


@pytest.fixture(autouse=True)
def _settled(settled: None) -> None:
    """Simulated workers compute in this process."""
