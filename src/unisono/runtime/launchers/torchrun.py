"""The worker that another program has started: torchrun, or code that has initialised torch.distributed in this
process.

Owns only this process's part. The program that started the other workers is responsible for them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unisono.engine.caller_state import preserved
from unisono.errors import Interrupted, Preempted, RecipeError, RunFolderError
from unisono.exchange.protocol import Exchange
from unisono.processes.forking import end_with_parent
from unisono.runtime.launchers.in_process import FolderHold
from unisono.runtime.launchers.launcher import Training
from unisono.runtime.launchers.rank_assignment import RankAssignment, count_peers, find_assignment
from unisono.runtime.signals import in_main_thread
from unisono.runtime.supervisor_client import UnsupervisedClient
from unisono.runtime.worker import STOPPING, Act, Stop, work

_REFUSAL = "another program has started its workers (torchrun); stop it, and start that program with another number"


class Torchrun:
    """Joins the workers among which this process is one."""

    def count(self, wanted: str | int, microbatches: int, device: str) -> int:
        """As many as there are, whatever number is requested."""
        if not (workers := count_peers()):
            raise _refuse()
        return workers

    def train(self, training: Training) -> None:
        """Be one worker of a training, to its end."""

        train = training.recipe.train

        def act(assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop) -> None:
            hold = FolderHold(
                training.folder, train.microbatches, workers=assignment.workers, refusal=_REFUSAL
            )  # worker 0's, which alone writes there
            observers = [hold, training.open_observer(False)] if assignment.rank == 0 else []

            def request() -> int:
                hold.look()
                return stop()

            client = UnsupervisedClient(observers, request)
            try:
                _take(hold, exchange)
                rank, workers = assignment.local_rank, assignment.local_workers
                training.runner.train(exchange, device, client, local_rank=rank, local_workers=workers, again=False)
            except Interrupted as error:  # torchrun passes on only the signals that reclaim the machine
                raise Preempted(str(error)) from None
            finally:
                client.close()

        self.run(act, workers=training.workers, threads=train.threads, device=train.device)

    def run(self, act: Act, *, workers: int, threads: int, device: str) -> bool:
        """Run `act` in this process, which is one worker. True in worker 0."""
        from torch.distributed.elastic.multiprocessing.errors import record

        assignment = find_assignment()
        if assignment is None:
            raise _refuse()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed agent cannot end it
            end_with_parent(os.getppid())
        with preserved(), _handlers_kept():
            record(
                lambda: work(assignment, act, threads=threads, wanted_device=device)
            )()  # torchrun reads the error file that this writes
        return assignment.rank == 0


def _take(hold: FolderHold, exchange: Exchange) -> None:
    """Lock the run folder, if it exists already. Raises RunFolderError on all workers where another run has it."""
    refused = ""
    if exchange.rank == 0:
        try:
            hold.take()
        except RunFolderError as error:
            refused = str(error)
    if why := exchange.gather_bytes(refused.encode())[0]:
        raise RunFolderError(why.decode())


def _refuse() -> RecipeError:
    return RecipeError(
        'launcher "torchrun": this process is no worker: torchrun has not started it (RANK, WORLD_SIZE, LOCAL_RANK and '
        "LOCAL_WORLD_SIZE are not set), and torch.distributed is not initialised. Start it with torchrun, or use "
        "another launcher."
    )


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Afterwards the signals are handled as before."""
    numbers = (*STOPPING, signal.SIGUSR1) if in_main_thread() else ()
    before = {signum: signal.getsignal(signum) for signum in numbers}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)
