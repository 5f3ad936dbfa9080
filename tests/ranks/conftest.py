"""Real workers for a test: forked processes that exchange over gloo."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch

from unisono.exchange.protocol import Exchange
from unisono.launch.local import launch
from unisono.launch.seat import Seat
from unisono.launch.worker import Stop

Forked = Callable[[int, Callable[[Exchange], Any]], list[Any]]


@pytest.fixture
def forked(tmp_path_factory: pytest.TempPathFactory) -> Forked:
    """`forked(workers, function)` calls `function(exchange)` in each worker; returns their (JSON) results by rank."""

    def run(workers: int, function: Callable[[Exchange], Any]) -> list[Any]:
        folder = tmp_path_factory.mktemp("forked")

        def act(seat: Seat, exchange: Exchange, device: torch.device, stop: Stop) -> None:
            (folder / f"{seat.rank}.json").write_text(json.dumps(function(exchange)), encoding="utf-8")

        with _deadline(60):
            launch(workers, act, threads=1, device="cpu")
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(workers)]

    return run


@contextmanager
def _deadline(seconds: int) -> Iterator[None]:
    """Make a hanging world fail instead of hanging the tests."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"the forked workers have not ended after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _settled(settled: None) -> None:
    """Played workers compute in this process."""
