"""From sample numbers to tensors on this worker's device, a little ahead of their use.

Owns the prefetching. What it yields is a pure function of the step and the microbatch's number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from unisono.board import UNWATCHED, Progress
from unisono.data.order import Order, Step
from unisono.data.source import Source

AHEAD = 2  # microbatches


class Feed:
    """Loads this worker's microbatches of a step, in rising order."""

    def __init__(self, source: Source, order: Order, device: torch.device, progress: Progress = UNWATCHED) -> None:
        self._source = source
        self._order = order
        self._device = device
        self._progress = progress
        self.waited_seconds = 0.0  # for data, since the start
        self._thread = ThreadPoolExecutor(1, "unisono-feed") if source.prefetchable else None
        self._coming: dict[tuple[int, int], Future[dict[str, Tensor]]] = {}

    def load(self, step: Step, mine: range) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (number, microbatch) for each of `mine`; begin to load what this worker will probably want next."""
        wanted = [(step, number) for number in mine]
        if step.number + 1 < self._order.total_steps and self._thread is not None:
            following = self._order.step(step.number + 1)
            wanted += [(following, number) for number in mine[:AHEAD] if number < len(following.microbatches)]
        self._coming = {key: future for key, future in self._coming.items() if key[0] == step.number}
        for position, number in enumerate(mine):
            for when, which in wanted[position : position + 1 + AHEAD]:
                self._request(when, which)
            self._progress.at("load", step.number, number)
            began = time.perf_counter()
            microbatch = self._coming.pop((step.number, number)).result() if self._thread else self._take(step, number)
            self.waited_seconds += time.perf_counter() - began
            yield number, self._move(microbatch)

    def take(self, step: Step, number: int) -> dict[str, Tensor]:
        """Return one microbatch of a step, whoever else loads it."""
        return self._move(self._take(step, number))

    def close(self) -> None:
        """Stop loading ahead."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _move(self, microbatch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: column.to(self._device, non_blocking=True) for name, column in microbatch.items()}

    def _request(self, step: Step, number: int) -> None:
        key = (step.number, number)
        if self._thread is not None and key not in self._coming:
            self._coming[key] = self._thread.submit(self._take, step, number)

    def _take(self, step: Step, number: int) -> dict[str, Tensor]:
        return self._source.take(step.microbatches[number], epoch=step.epoch)
