"""From sample numbers to tensors on this worker's device, a little ahead of their use.

Owns the prefetching. What it yields is a pure function of the step and the microbatch's number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from unisono.data.loaders import Key, LoaderPool, Wanted
from unisono.data.order import Order, Step
from unisono.data.source import Source
from unisono.processes.progress_table import UNWATCHED, Progress

TOGETHER, TOGETHER_BYTES = 2, 1 << 20
"""The thread loads two microbatches at once, or as many as have this size together. The hand-over of one takes fifteen
times as long as the loading of a few short texts."""

STEPS_AHEAD = 16  # at most, for which loaders load: a worker may have only one microbatch in each step


class Feed:
    """Loads this worker's microbatches of a step, in rising order.

    loaders: how many processes load ahead from a source that is not prefetchable; 0: it is read in this thread.
    """

    def __init__(
        self, source: Source, order: Order, device: torch.device, progress: Progress = UNWATCHED, loaders: int = 0
    ) -> None:
        self._source = source
        self._order = order
        self._device = device
        self._progress = progress
        self.waited_seconds = 0.0  # for data, since the start
        self._thread = ThreadPoolExecutor(1, "unisono-feed") if source.prefetchable else None
        self._together = TOGETHER
        self._coming: dict[Key, Future[dict[Key, dict[str, Tensor]]]] = {}
        prepare = self._pin if device.type == "cuda" else None
        self._pool = LoaderPool(source, loaders, prepare) if loaders and not source.prefetchable else None
        self._shares: dict[int, range] = {}  # last ones, by the number of a step's microbatches

    def load(self, step: Step, mine: range) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (number, microbatch) for each of `mine`; begin to load what this worker will probably need next."""
        together = self._together
        wanted = [(step, number) for number in mine]
        if step.number + 1 < self._order.total_steps and self._thread is not None:
            following = self._order.step(step.number + 1)
            wanted += [(following, number) for number in mine[:together] if number < len(following.microbatches)]
        self._coming = {key: coming for key, coming in self._coming.items() if key[0] == step.number}
        self._shares[len(step.microbatches)] = mine
        for position, number in enumerate(mine):
            if position % together == 0:
                self._request(wanted[position : position + together])
                self._request(wanted[position + together : position + 2 * together])
            if self._pool is not None:
                self._pool.want(self._plan(step, mine[position:], self._pool.depth))
            self._progress.at("load", step.number, number)
            began = time.perf_counter()
            microbatch = self._loaded(step, number)
            self.waited_seconds += time.perf_counter() - began
            yield number, self._move(microbatch)

    def take(self, step: Step, number: int) -> dict[str, Tensor]:
        """Return one microbatch of a step, whether or not it is one of this worker's own."""
        return self._move(self._take(step, number))

    def close(self) -> None:
        """Stop loading ahead."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()

    def _move(self, microbatch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: column.to(self._device, non_blocking=True) for name, column in microbatch.items()}

    def _pin(self, microbatch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A copy in page-locked memory, which moves to the device while the device computes."""
        with torch.cuda.device(self._device):
            return {name: column.pin_memory() for name, column in microbatch.items()}

    def _plan(self, step: Step, left: range, depth: int) -> list[Wanted]:
        """The rest of a step, and what this worker will probably need of the next ones: at most `depth`.

        A step's shares are known when it begins; most equal those of the last step of the same size. A wrong guess
        costs time, and changes no bit.
        """
        plan = [self._want(step, number) for number in left[:depth]]
        last = min(step.number + STEPS_AHEAD, self._order.total_steps - 1)
        for ahead in range(step.number + 1, last + 1):
            if len(plan) >= depth:
                break
            following = self._order.step(ahead)
            count = len(following.microbatches)
            share = self._shares.get(count, self._shares[len(step.microbatches)])
            plan += [self._want(following, number) for number in share if number < count]
        return plan[:depth]

    @staticmethod
    def _want(step: Step, number: int) -> Wanted:
        repeats = None if step.repeats is None else step.repeats[number]
        return Wanted(key=(step.number, number), samples=step.microbatches[number], epoch=step.epoch, repeats=repeats)

    def _request(self, wanted: list[tuple[Step, int]]) -> None:
        lacking = {(step.number, number): step for step, number in wanted if (step.number, number) not in self._coming}
        if self._thread is not None and lacking:
            self._coming |= dict.fromkeys(lacking, self._thread.submit(self._take_all, lacking))

    def _loaded(self, step: Step, number: int) -> dict[str, Tensor]:
        key = (step.number, number)
        if self._pool is not None:
            return self._pool.result(key)
        return self._coming.pop(key).result().pop(key) if self._thread is not None else self._take(step, number)

    def _take_all(self, wanted: dict[Key, Step]) -> dict[Key, dict[str, Tensor]]:
        found = {key: self._take(step, key[1]) for key, step in wanted.items()}
        if self._device.type == "cuda":
            found = {key: self._pin(microbatch) for key, microbatch in found.items()}
        largest = max(sum(column.nbytes for column in microbatch.values()) for microbatch in found.values())
        self._together = max(TOGETHER, TOGETHER_BYTES // max(largest, 1))
        return found

    def _take(self, step: Step, number: int) -> dict[str, Tensor]:
        if step.repeats is None:
            return self._source.take(step.microbatches[number], epoch=step.epoch)
        return self._source.take(step.microbatches[number], epoch=step.epoch, repeats=step.repeats[number])
