"""The process of a worker that a supervisor watches over: it takes a seat, works, and when its group of workers is
dissolved it drops the unfinished step and takes another seat.

Owns the worker's end of the channel. What a worker does is handed in; who watches is `supervisor.py`.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from unisono.engine import numerics
from unisono.engine.state import TrainState
from unisono.errors import LostPeerError
from unisono.exchange.protocol import Exchange
from unisono.exchange.watched import Watched
from unisono.processes.fault_injection import Fault
from unisono.processes.forking import end_with_parent
from unisono.processes.progress_table import Board, Pen
from unisono.runtime.background_writer import BackgroundWriter
from unisono.runtime.channel import Channel
from unisono.runtime.launchers.rank_assignment import Seat
from unisono.runtime.signals import ASKING
from unisono.runtime.supervisor_client import Link
from unisono.runtime.worker import guarded, keep_memory
from unisono.tracking import events

DUMP = signal.SIGUSR2
"""Makes a worker write all its stacks down, whatever it is at."""


class Part(Protocol):
    """What a supervised worker does; `run.Trainee` is one."""

    def warm(self, device: torch.device, workers: int, link: Link) -> None:
        """Make ready what needs no other worker."""
        ...

    def train(
        self, exchange: Exchange, device: torch.device, link: Link, *, local_rank: int, local_workers: int, again: bool
    ) -> bool:
        """Take part in a group of workers, the first one or `again`; return whether all is done, or another group is
        to go on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """What a worker's process is given when it is forked. memory: file of the run's snapshot. workers: how many there
    are to be. report, stacks: files without a name, for what it raises, and for what it is at."""

    slot: int
    channel: Channel
    board: Board
    memory: int
    threads: int
    device: str
    workers: int
    report: TextIO
    stacks: TextIO
    parent: int
    faults: tuple[Fault, ...] = ()


class Supervised:
    """The link of a worker to its supervisor."""

    def __init__(self, post: Post, pen: Pen) -> None:
        self.progress: Pen = pen
        self.memory = post.memory
        self._channel = post.channel
        self._board = post.board
        # without a snapshot, the worker has to write checkpoints itself
        self._writer = BackgroundWriter(self.tell) if post.memory < 0 else None

    @property
    def prepared(self) -> bool:
        return self._board.prepared

    @prepared.setter
    def prepared(self, done: bool) -> None:
        self._board.prepared = done

    def request(self) -> int:
        return self._board.request

    def tell(self, event: events.Event) -> None:
        self._channel.send({"event": type(event).__name__, "fields": dataclasses.asdict(event)})

    def save(self, state: TrainState, facts: Mapping[str, Any], folder: Path, keep: int) -> None:
        if self._writer is not None:
            self._writer.save(state, facts, folder, keep)
            return
        if state.exchange.rank == 0:
            self._ask("save")
        state.optimizer.arrays.pin()

    def settle(self) -> bool:
        if self._writer is not None:
            return self._writer.settle()
        return bool(self._ask("settle")["written"]) if self.progress.rank == 0 else True

    def close(self) -> None:
        """Finish what this worker writes itself."""
        if self._writer is not None:
            self._writer.close()

    def _ask(self, what: str) -> dict[str, Any]:
        self._channel.send({"ask": what})
        return self._channel.receive()[0]


def serve(post: Post, part: Part) -> None:
    """Live a worker's life, until all is done or the supervisor lets it go."""
    end_with_parent(post.parent)
    gc.freeze()  # what was inherited is nobody's garbage: collecting, after a loss, need not look at it
    faulthandler.enable(post.stacks)
    faulthandler.register(DUMP, post.stacks, all_threads=True)
    for signum in ASKING:  # a terminal or Slurm sends them to all; the supervisor answers
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    code = guarded(lambda: _serve(post, part), post.report.write, post.slot)
    post.report.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no clean-up of what was inherited from the parent


def _serve(post: Post, part: Part) -> None:
    pen = post.board.pen(post.slot, post.faults)
    link = Supervised(post, pen)
    pen.at("start")
    keep_memory()
    place = Seat(rank=post.slot, workers=post.workers, local_rank=post.slot, local_workers=post.workers)
    device = place.device(post.device)
    numerics.settle(threads=post.threads, device=device)
    part.warm(device, post.workers, link)
    why = ""
    _stand_up(pen)
    while True:
        post.channel.send({"waiting": why})
        seat, listener = post.channel.receive()
        if "leave" in seat:
            return
        try:
            if _sit(Seat(**seat, listener=listener), pen, part, device, link):
                break
            why = ""
        except LostPeerError as error:
            why = str(error)
        except BaseException:
            link.close()
            raise
        _stand_up(pen)
        gc.collect()  # the last group's memory, before the next one's is made; it may take longer than a step
    link.close()


def _stand_up(pen: Pen) -> None:
    """Belong to no group. Nobody suspects who waits for a seat."""
    pen.seat(-1, -1)
    pen.at("wait")


def _sit(seat: Seat, pen: Pen, part: Part, device: torch.device, link: Link) -> bool:
    """Belong to one group of workers. Return whether all is done; false: another group is to go on."""
    pen.seat(seat.rank, seat.generation)
    pen.at("join")
    pen.enter("join")
    try:
        exchange: Exchange = Watched(seat.join(device), pen)
    except RuntimeError as error:  # whatever a store or a backend says of others that do not come
        raise LostPeerError(f"the workers could not meet: {error}") from error
    pen.leave()
    try:
        return part.train(
            exchange,
            device,
            link,
            local_rank=seat.local_rank,
            local_workers=seat.local_workers,
            again=seat.generation > 1,
        )
    finally:
        with suppress(RuntimeError):  # what a backend says of a broken connection; the group is over all the same
            exchange.close()
