"""Real workers for a test: forked processes that exchange over gloo."""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from unisono.exchange.protocol import Exchange
from unisono.launch.local import launch
from unisono.launch.seat import Seat
from unisono.launch.worker import Stop

Forked = Callable[[int, Callable[[Exchange], Any]], list[Any]]
DEADLINE_SECONDS = 60


def fork(workers: int, function: Callable[[Exchange], Any], folder: Path) -> list[Any]:
    """Call `function(exchange)` in each worker; return their (JSON) results in order of rank."""

    def act(seat: Seat, exchange: Exchange, device: torch.device, stop: Stop) -> None:
        faulthandler.dump_traceback_later(DEADLINE_SECONDS - 5, file=sys.__stderr__)  # where does it hang?
        (folder / f"{seat.rank}.json").write_text(json.dumps(function(exchange)), encoding="utf-8")

    with _deadline(DEADLINE_SECONDS):
        launch(workers, act, threads=1, device="cpu")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(workers)]


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
