"""What one worker was doing, and for how long: marks of the loop's verbs, kept for the newest steps.

The loop marks each verb anyway, for the progress table; a `Profile` gets the same marks and reads the clock. The time
between two marks is a *span*, and belongs to one of the phases:

    data        waiting for a microbatch, and moving it to the device
    forward     the task's loss · backward from there to the end of the contribution: gradients, buffers' changes
    tree        adding this worker's contributions, and making the tally; at the end also all workers' nodes, unless the
                update does: on one host they are read in place, so adding is most of the transport, too
    exchange    communicating with other workers, and reading all workers' new weights
    wait        for the last worker to reach an exchange; separated from it where workers are compared
    assist      computing for workers that are late, while waiting in an exchange; counted where that began
    optimiser   the update of this worker's shard
    other       what remains: planning the step, an audit

Spans touch, so the phases add up to the step. Work after a commit (report, evaluate, save) is kept for the trace, and
belongs to no step. On a GPU each mark waits for the device, or time would be counted in the wrong phase.

Owns the clock and a worker's spans. Compares no workers; `tracking/profile_report.py` does.
"""

from __future__ import annotations

import dataclasses
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisono.engine.contribution import Contributes, Contribution, Contributor
from unisono.exchange.protocol import Exchange
from unisono.processes.progress_table import Progress

PHASES = ("data", "forward", "backward", "tree", "exchange", "wait", "assist", "optimiser", "other")
MOST_STEPS = 500
"""Steps that are kept, the newest: a long run's profile stays small."""
VERBS = {
    "begin": "other",
    "load": "data",
    "contribute": "forward",
    "audit": "other",
    "reduce": "tree",
    "update": "optimiser",
    "commit": "exchange",
}
"""Verb of the loop → the phase that it begins."""

Span = tuple[str, int, int, int]
"""Phase, or name of a call of the exchange; microbatch, or −1; start and end, nanoseconds of the monotonic clock."""
Shape = tuple[tuple[int, ...], ...]
"""The shape of each column of a microbatch."""


@dataclass(slots=True, kw_only=True)
class Recorded:
    """One worker's part of a step, and the work after it. `first`: the first step of a group of workers, which touches
    memory for the first time."""

    rank: int
    workers: int
    first: bool
    spans: list[Span] = field(default_factory=list)
    microbatches: list[tuple[int, Shape]] = field(default_factory=list)


class Profile:
    """A `Progress` that passes marks on to another one, and records their times.

    Attributes:
        steps: committed steps by number, the newest MOST_STEPS.
        buffer_bytes: the bytes of the tree's buffers.
        gradient_bytes: the most that contributions of a group's first step took at one time beside them.
    """

    def __init__(self) -> None:
        self.steps: dict[int, Recorded] = {}
        self.buffer_bytes = self.gradient_bytes = 0
        self._buffers: set[int] = set()  # addresses
        self._gradients: list[weakref.ref[Tensor]] = []  # of the first step
        self._step = -1
        self._recorded: Recorded | None = None
        self._within = False  # inside a step
        self._phase, self._microbatch, self._since = "", -1, 0
        self._settle: Callable[[], None] = _nothing

    def join(self, exchange: Exchange, progress: Progress, device: torch.device) -> Exchange:
        """Begin with a new group of workers; return its exchange, with marks around each call."""
        self._progress, self._rank, self._workers = progress, exchange.rank, exchange.workers
        self._first, self._within, self._recorded = True, False, None
        self._buffers, self._gradients, self.buffer_bytes = set(), [], 0
        if device.type == "cuda":
            self._settle = lambda: torch.cuda.synchronize(device)
        return Timed(exchange, self)

    def told(self) -> dict[str, Any]:
        """The spans as plain values, and the identity of their clock."""
        steps = {
            step: {"rank": one.rank, "workers": one.workers, "first": one.first, "spans": one.spans}
            for step, one in self.steps.items()
        }
        return {"host": _name_host(), "steps": steps}

    def at(self, phase: str, step: int = -1, microbatch: int = -1) -> None:
        if phase in VERBS:
            self.turn(VERBS[phase], microbatch)
            if phase == "begin":
                self._begin(step)
        elif self._within or phase != self._phase:  # each phase after a step is one span
            self.turn(phase)
            if self._within:
                self._keep()
        self._progress.at(phase, step, microbatch)

    def enter(self, call: str) -> None:
        """A call of the exchange begins."""
        self._outer = self._phase, self._microbatch
        if self._within:
            self.turn(call)

    def leave(self, assisted_seconds: float = 0.0) -> None:
        """The call ends, and the phase before it continues. assisted_seconds: the part of it spent on others' work."""
        if self._within:
            began, self._since = self._since, self._since + round(assisted_seconds * 1e9)
            if self._recorded is not None and self._since > began:
                self._recorded.spans.append(("assist", -1, began, self._since))
            self.turn(*self._outer)

    def turn(self, phase: str, microbatch: int = -1) -> None:
        """One span ends, another begins."""
        self._settle()
        now = time.monotonic_ns()
        if self._recorded is not None:
            self._recorded.spans.append((self._phase, self._microbatch, self._since, now))
        self._phase, self._microbatch, self._since = phase, microbatch, now

    def mark(self, contributor: Contributor) -> Contributor:
        """The same contributor, with a mark where its backward pass begins."""
        return dataclasses.replace(contributor, halfway=self._go_back)

    def watch(self, contributor: Contributes) -> Contributes:
        """The same contributor, with a mark after each contribution."""
        return _Watched(contributor, self)

    def hold(self, buffer: Tensor) -> None:
        """The engine got a buffer of the exchange; within a step, it is the tree's."""
        if self._within:
            self._buffers.add(buffer.untyped_storage().data_ptr())
            self.buffer_bytes += buffer.nbytes

    def note(self, number: int, microbatch: Mapping[str, Tensor], found: Contribution) -> None:
        """Microbatch `number` of the present step has contributed."""
        if self._recorded is not None:
            shape = tuple(tuple(column.shape) for column in microbatch.values())
            self._recorded.microbatches.append((number, shape))
        if self._first:
            self._gradients += [weakref.ref(part) for part in found.parts if part is not None]
            held = [one() for one in self._gradients]
            with suppress(RuntimeError, NotImplementedError):  # a tensor without memory of its own takes none
                self.gradient_bytes = max(self.gradient_bytes, storage_bytes(held, besides=self._buffers))

    def _go_back(self) -> None:
        self.turn("backward", self._microbatch)

    def _begin(self, step: int) -> None:
        self._step, self._within = step, True
        self._recorded = Recorded(rank=self._rank, workers=self._workers, first=self._first)

    def _keep(self) -> None:
        """The step is committed."""
        assert self._recorded is not None
        self._within = self._first = False
        self.steps.pop(self._step, None)  # of a step that was computed again, the last time counts
        self.steps[self._step] = self._recorded
        if len(self.steps) > MOST_STEPS:
            del self.steps[next(iter(self.steps))]


def storage_bytes(tensors: Sequence[Tensor | None], *, besides: set[int] | None = None) -> int:
    """Bytes of the memory in which tensors lie, each storage counted once, except those at the addresses `besides`."""
    parts = [part for one in tensors if one is not None for part in _dense_parts(one)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(size for address, size in storages.items() if address not in (besides or ()))


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]


def _name_host() -> str:
    """A value that is the same for all processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _nothing() -> None:
    return


class _Watched:
    """A contributor that marks the beginning of the tree's time."""

    def __init__(self, inner: Contributes, profile: Profile) -> None:
        self._inner = inner
        self._profile = profile

    def contribute(self, step: int, number: int, microbatch: dict[str, Tensor]) -> Contribution:
        found = self._inner.contribute(step, number, microbatch)
        self._profile.turn("tree", number)
        self._profile.note(number, microbatch, found)
        return found


class Timed:
    """Another `Exchange`, with a mark before and after each call."""

    def __init__(self, exchange: Exchange, profile: Profile) -> None:
        self.rank = exchange.rank
        self.workers = exchange.workers
        self.offload = exchange.offload
        self.generation = exchange.generation
        self._exchange = exchange
        self._profile = profile

    def new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        buffer = self._exchange.new_buffer(elements, dtype)
        self._profile.hold(buffer)
        return buffer

    def name(self, buffer: Tensor) -> int:
        return self._exchange.name(buffer)

    def add_integers(self, values: Tensor) -> Tensor:
        with self._marked("add_integers"):
            return self._exchange.add_integers(values)

    def to_owners(
        self, nodes: Sequence[Tensor], names: Sequence[Sequence[int]], *, shard_size: int, dtype: torch.dtype
    ) -> list[Tensor]:
        with self._marked("to_owners"):
            return self._exchange.to_owners(nodes, names, shard_size=shard_size, dtype=dtype)

    def gather_shards(self, shard: Tensor, flat: Tensor, names: Sequence[int] | None = None) -> None:
        with self._marked("gather_shards"):
            self._exchange.gather_shards(shard, flat, names)

    def gather_bytes(self, content: bytes) -> list[bytes]:
        with self._marked("gather_bytes"):
            return self._exchange.gather_bytes(content)

    def send_to_first(self, content: bytes) -> list[bytes]:
        with self._marked("send_to_first"):
            return self._exchange.send_to_first(content)

    def wait_for_all(self) -> None:
        with self._marked("wait_for_all"):
            self._exchange.wait_for_all()

    @contextmanager
    def _marked(self, call: str) -> Iterator[None]:
        self._profile.enter(call)
        before = self._given()
        yield
        self._profile.leave(self._given() - before)

    def _given(self) -> float:
        return self.offload.given_seconds if self.offload else 0.0

    def close(self) -> None:
        self._exchange.close()
