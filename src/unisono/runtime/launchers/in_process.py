"""The one worker that is this process itself: nothing is forked, and a debugger sees everything.

Owns what the run borrows from the caller's process: its signals in the main thread, its state, and the run folder's
lock. A crash of the task is a crash of this process; only a supervisor survives one (`fork.py`, `spawn.py`).
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from unisono.backends.built_module import BuiltModule
from unisono.engine import numerics
from unisono.engine.caller_state import preserved
from unisono.errors import Interrupted, Preempted, RecipeError
from unisono.exchange.solo import Solo
from unisono.processes.progress_table import RUNNING, STOP
from unisono.runtime.launchers.launcher import Training, count_workers
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.signals import ASKING, in_main_thread, take_noted
from unisono.runtime.supervisor_client import UnsupervisedClient
from unisono.runtime.worker import Act, Stop, memory_kept
from unisono.storage.run_folder import remove_begun
from unisono.storage.run_lock import RunLock
from unisono.tracking import events

LOOK_SECONDS = 0.2
_ONLY_WORKER = "it is trained in the process of its caller, which is its only worker"
_one_at_a_time = threading.Lock()
_inside: list[int] = []  # the thread that has the lock
PLACE = RankAssignment(rank=0, workers=1, local_rank=0, local_workers=1)


class InProcess:
    """Launches one worker: this process."""

    def count(self, wanted: str | int, microbatches: int, device: str) -> int:
        """One."""
        if wanted != "auto" and count_workers(wanted, microbatches, device) != 1:
            raise RecipeError(
                f'launcher "in_process", workers = {wanted}: this process is one worker. Use workers = 1, or another '
                "launcher."
            )
        return 1

    def train(self, training: Training) -> None:
        """Train here; afterwards this process is as before.

        Raises:
            Interrupted, Preempted: a signal stopped the run.
            Exception: what the task raises, as it raises it.
        """
        if training.faults:
            raise RecipeError('launcher "in_process": faults are injected into workers under a supervisor. Use "fork".')
        train = training.recipe.train
        with _alone():
            observer, hold = training.open_observer(False), FolderHold(training.folder, train.microbatches)
            self._train(training, observer, hold)

    def _train(self, training: Training, observer: events.Observer, hold: FolderHold) -> None:
        train = training.recipe.train
        with preserved(), memory_kept(), StopRequests(hold) as requests:
            client = UnsupervisedClient([hold, observer], requests)
            built: list[BuiltModule] = []
            training.runner.on_built = lambda model: built.extend(BuiltModule.of(model))
            try:
                requests.begin()
                hold.take()
                device = PLACE.device(train.device)
                numerics.settle(threads=train.threads, device=device)
                training.runner.train(Solo(device), device, client, local_rank=0, local_workers=1, again=False)
            except Interrupted as error:
                raise requests.name(error) from None
            finally:
                requests.is_over = True  # another signal must not keep the following from its end
                client.close()
                for module in built:
                    module.restore()

    def run(self, act: Act, *, workers: int, threads: int, device: str) -> bool:
        """Run `act` here; afterwards this process is as before."""
        with _alone(), preserved(), StopRequests() as requests:
            chosen = PLACE.device(device)
            numerics.settle(threads=threads, device=chosen)
            try:
                act(PLACE, Solo(chosen), chosen, Stop())
            except Interrupted as error:
                raise requests.name(error) from None
        return True


@contextmanager
def _alone() -> Iterator[None]:
    """Within, no other thread computes here: generators, threads and modes belong to the whole process. Another thread
    waits; the same one, in a task, would wait for itself.

    Raises:
        RecipeError: this thread is within already.
    """
    me = threading.get_ident()
    if _inside == [me]:
        raise RecipeError(
            'launcher "in_process": a task of this process calls unisono again. Use workers = 2, or launcher = "fork".'
        )
    with _one_at_a_time:
        _inside.append(me)
        try:
            yield
        finally:
            _inside.clear()


class FolderHold:
    """Locks the run's folder for this process, as soon as the folder exists. An `events.Observer`."""

    def __init__(self, folder: Path, most_workers: int, *, workers: int = 1, refusal: str = _ONLY_WORKER) -> None:
        self.folder = folder
        self._facts = {"workers": workers, "most_workers": most_workers}  # at most: that another launcher could have
        self._refusal = refusal
        self._lock: RunLock | None = None
        self._look_at = 0.0

    def take(self) -> None:
        """Take the lock, where there is a folder already. Raises RunFolderError where another process has it."""
        if self._lock is None and self.folder.exists():
            self._lock = RunLock(self.folder)
            self._lock.tell(**self._facts)

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            self.take()

    def look(self) -> None:
        """Answer a request for another number of workers: it is refused."""
        now = time.monotonic()
        if self._lock is not None and now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            while (request := self._lock.next_request()) is not None:
                self._lock.answer(request, self._refusal, done=False)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None


class StopRequests:
    """Within, in the main thread: the first signal requests a stop after the step, Ctrl-C after it a stop at once. In
    other threads signals stay as they are. When called, it returns what is requested; after the first call, a request
    waits for the end of a step."""

    def __init__(self, hold: FolderHold | None = None) -> None:
        self._hold = hold
        self._asked: list[signal.Signals] = []
        self._begun = False
        self.is_over = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        for signum in ASKING if in_main_thread() else ():
            before = signal.getsignal(signum)
            if before is not None and (signum != signal.SIGHUP or before != signal.SIG_IGN):  # as nohup has it
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def __call__(self) -> int:
        """progress_table.STOP or RUNNING."""
        self._begun, self.is_over = True, False
        if self._hold is not None:
            self._hold.look()
        return STOP if self._asked else RUNNING

    def begin(self) -> None:
        """Act on signals that came before the handlers were set."""
        for signum in take_noted():
            self._note(signum, None)

    def name(self, error: Interrupted) -> Interrupted:
        """The error for the stop that the first signal requested."""
        if not self._begun and self._hold is not None:
            error = Interrupted(f"stopped before the first step; {remove_begun(self._hold.folder)}")
        wanted_back = bool(self._asked) and self._asked[0] != signal.SIGINT
        return Preempted(str(error)) if wanted_back else error

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked.append(signal.Signals(signum))
        if self.is_over:
            return
        if not self._begun:
            self.is_over = True
            raise Interrupted("stopped before the first step.")
        if signal.SIGINT in self._asked[1:]:
            self.is_over = True
            raise Interrupted(
                "stopped at once. The last checkpoint, if there is one, is whole: go on with --resume (resume=True)."
            )
        if len(self._asked) == 1:
            with suppress(OSError, AttributeError):  # the terminal itself may be closed
                print("\nstopping after this step; Ctrl-C to stop at once", file=sys.stderr, flush=True)
