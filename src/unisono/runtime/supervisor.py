"""The supervisor of a run on this host: it owns workers, snapshot and ledger, and brings the run through losses.

    a worker ends, hangs, or another number of them is requested → the group is dissolved: every worker drops the
    unfinished step → missing workers are replaced → all waiting workers get rank assignments in a new group → it
    goes on from the last commit

Owns what is decided, and when. The processes belong to `worker_pool.py`, checkpoints to `checkpoint_writer.py`,
hangs to `hang_detection.py`, the budget to `restart_budget.py`. It computes nothing, holds no lock that a worker
needs, and starts no thread, so it can fork at any time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from unisono.config.recipe import Recipe
from unisono.engine.snapshot import Snapshot, new_file
from unisono.errors import Interrupted, ObserverError, Preempted, RecipeError, WorkerError
from unisono.processes.fault_injection import Fault
from unisono.processes.forking import flush_output, forget_kernel_buffers
from unisono.processes.limits import allow_files, explain
from unisono.processes.progress_table import FINISH, MOST_FAULTS, REGROUP, RUNNING, STOP, ProgressTable
from unisono.runtime.channel import Message
from unisono.runtime.checkpoint_writer import CheckpointWriter
from unisono.runtime.hang_detection import HangDetector
from unisono.runtime.launchers.devices import check_gpus, count_gpus
from unisono.runtime.restart_budget import Change, Loss, RestartBudget, find_verdict, name_loss
from unisono.runtime.signals import StopSignals
from unisono.runtime.supervised_worker import Workload
from unisono.runtime.worker_pool import StartWorker, WorkerHandle, WorkerPool, start_forked
from unisono.storage.run_folder import remove_begun
from unisono.storage.run_lock import RunLock, WorkersRequest
from unisono.tracking import events

MOST_WORKERS = 4096
LOOK_SECONDS = 0.2
MEETING_SECONDS = 2.0  # for workers that wait for one that was lost on the way to their meeting
ORPHAN_SECONDS = 1.0  # for a worker to end after others have lost its connection
WRITING_SHARE = 0.5  # of the grace period, kept for writing the checkpoint
LAST_WRITING_SECONDS = 600.0
LAST_CHECKPOINT = "The last checkpoint, if there is one, is whole: go on with --resume (resume=True)."


class Supervisor:
    """Runs `workload` in `workers` processes, through every loss of a worker.

    observer: sees every event. may_stop: it may return events.STOP; each step then waits until the observer has seen
    all events before it, so that the run ends at the same step at any speed of the workers.
    start: how each worker is started.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        recipe: Recipe,
        folder: Path,
        observer: events.Observer,
        workers: int,
        faults: Sequence[Fault] = (),
        may_stop: bool = False,
        start: StartWorker = start_forked,
    ) -> None:
        self._workload = workload
        self._start = start
        self._recipe = recipe
        self._folder = folder
        self._observer = observer
        self._faults = faults
        self._wanted = workers
        if len(faults) > MOST_FAULTS:
            raise RecipeError(f"--fault: {len(faults)} faults are given; allowed are {MOST_FAULTS}. Inject fewer.")
        check_gpus(workers, recipe.train.device)
        self._gpus = count_gpus(recipe.train.device)
        self._progress_table = ProgressTable(min(recipe.train.microbatches, MOST_WORKERS))
        self._progress_table.observers_first = may_stop
        self._is_finishing = False  # the observer has requested the end
        self._memory = new_file()
        self._budget = RestartBudget(recipe.recovery)
        self._run_lock: RunLock | None = None
        self._resizing: WorkersRequest | None = None  # it has no answer yet
        self._error: Exception | None = None  # what ends the run
        self._has_ended = False  # the result has been reported
        self._training = False  # the first group of workers has begun
        self._change: Change | None = None  # from which the run has not recovered yet
        self._start_at = 0.0
        self._dissolved_at: float | None = None
        self._orphan: tuple[WorkerHandle, str, float] | None = None  # it lost a worker that has not ended; why; when
        self._stop_at: float | None = None
        self._last_event = time.monotonic()
        self._look_at = 0.0

    def run(self) -> None:
        """Train to the end.

        Raises:
            UserError, DivergedError: as a worker raised it.
            WorkerError: a fault repeats, or the budget is spent; with the worker's rank and, of an exception, its
                traceback.
            Interrupted, Preempted: a signal stopped the run.
        """
        flush_output()
        forget_kernel_buffers()
        if self._folder.exists():
            self._run_lock = RunLock(self._folder)
        with StopSignals() as self._interrupts:
            train, keep = self._recipe.train, self._recipe.checkpoint.keep
            self._checkpoint_writer = CheckpointWriter(self._folder, keep, self._memory, self._tell)
            self._pool = WorkerPool(
                self._workload,
                self._start,
                self._progress_table,
                memory=self._memory,
                threads=train.threads,
                device=train.device,
                faults=self._faults,
                wake=self._interrupts.descriptor,
            )
            self._hang_detector = HangDetector(
                self._pool, self._progress_table, self._folder, self._recipe.recovery.hang_factor
            )
            try:
                while self._error is None and (self._pool.handles or not self._has_ended):
                    self._handle_messages(self._pool.listen())
                    self._reap()
                    self._check()
                    self._form_group()
                    self._pool.wait(LOOK_SECONDS, self._checkpoint_writer.sentinels)
                self._terminate(self._pool.staying())
            finally:
                self._leave()
        if self._error is not None:
            raise self._error

    def _leave(self) -> None:
        """Release everything."""
        self._pool.end()
        self._checkpoint_writer.finish(self._hang_detector.limit_seconds or LAST_WRITING_SECONDS)
        if self._run_lock is not None:
            self._run_lock.release()
        self._progress_table.close()
        if self._memory >= 0:
            os.close(self._memory)

    # Messages of workers, and their ends

    def _handle_messages(self, said: Sequence[tuple[WorkerHandle, Message]]) -> None:
        for handle, message in said:
            if "event" in message:
                self._tell(getattr(events, message["event"])(**message["fields"]))
                self._progress_table.count_heard(handle.slot)
            elif "waiting" in message:
                self._on_ready(handle, message["waiting"])
            elif "ask" in message:
                handle.asking = True
                (self._checkpoint_writer.ask if message["ask"] == "save" else self._checkpoint_writer.settle)(
                    handle.answer
                )

    def _terminate(self, handles: Iterable[WorkerHandle]) -> None:
        """Kill workers at once; their earlier messages are handled."""
        words, _ = self._pool.terminate(handles)
        self._handle_messages(words)

    def _on_ready(self, handle: WorkerHandle, why: str) -> None:
        """A worker waits for a rank assignment. If its group was not dissolved, another worker is about to end, or a
        connection between them has failed."""
        handle.waiting = True
        if self._progress_table.request == REGROUP and self._change is not None and handle.generation >= 0:
            self._change.stand_still(time.monotonic())
        if why and self._orphan is None and handle.generation == self._progress_table.generation:
            self._orphan = handle, why, time.monotonic()

    def _reap(self) -> None:
        """Handle the workers that have ended."""
        words, ends = self._pool.reap()
        self._handle_messages(words)
        missed = [(handle, end) for handle, end in ends if not (handle.leaving or (self._has_ended and not end.code))]
        if not missed or self._has_ended:
            return
        if verdict := find_verdict([end for _, end in missed]):
            self._fail(self._named(str(verdict)) if isinstance(verdict, Interrupted) else verdict)
            return
        fresh = any(handle.generation < 0 for handle, _ in missed)
        self._lose(name_loss([end for _, end in missed], self._step), fresh=fresh)

    def _lose(self, loss: Loss, *, fresh: bool = False) -> None:
        """Workers have been lost: end the run, or dissolve the group and go on. `fresh`: some had no rank yet."""
        change, now = self._change, time.monotonic()
        if change is not None and change.lost and not change.assigned and not fresh:
            change.lost += f"; {loss.what}"  # the same loss, noticed in several parts
            change.frames = change.frames or loss.frames
            return
        if end := self._budget.spend(loss):
            self._terminate(self._pool.staying())
            trace = f"\n{loss.trace}" if loss.trace else ""
            self._fail(WorkerError(f"{end}. {self._rescue()}{trace}"))
            return
        if change is None:
            change = self._change = Change(since=now)
        change.lost += f"; {loss.what}" if change.lost else loss.what
        change.frames = loss.frames or change.frames
        change.wasted += now - self._last_event if self._training else 0.0
        change.assigned = False
        self._last_event = now
        self._start_at = now + self._budget.backoff_seconds
        self._progress_table.generation += 1  # every worker leaves the present group, at its next mark
        self._dissolved_at, self._orphan = now, None
        self._hang_detector.spare()
        if self._gpus:  # a broken nccl group cannot be left; on CPUs survivors keep what they have prepared
            self._terminate(handle for handle in self._pool.staying() if handle.generation >= 0)
        if self._recipe.recovery.on_loss == "shrink" and self._training:
            self._wanted = max(1, min(self._wanted, len(self._pool.staying())))

    # What is due

    def _check(self) -> None:
        self._checkpoint_writer.look(self._hang_detector.limit_seconds)
        if self._has_ended:
            self._pool.release(self._pool.handles.values())
            return
        if self._interrupts.asked:
            self._handle_signals()
        now = time.monotonic()
        if self._error is not None or now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        if self._run_lock is not None and self._resizing is None and (request := self._run_lock.next_request()):
            self._resize(self._run_lock, request)
        if self._dissolved_at is not None and now > self._dissolved_at + MEETING_SECONDS:
            at_work = [handle for handle in self._pool.staying() if not handle.waiting]
            self._terminate(handle for handle in at_work if self._progress_table.row(handle.slot).waiting == "join")
        if self._orphan is not None and now > self._orphan[2] + ORPHAN_SECONDS:
            handle, why, _ = self._orphan
            self._lose(Loss(step=self._step, what=f"worker {handle.number} lost the others ({why})"))
        if self._error is None and (found := self._hang_detector.find()):
            told = self._hang_detector.describe(found, self._step)
            self._terminate(handle for handle, _ in found)
            self._lose(Loss(step=self._step, what=told), fresh=any(handle.generation < 0 for handle, _ in found))

    def _handle_signals(self) -> None:
        """A signal has requested the end."""
        if signal.SIGINT in self._interrupts.asked[1:]:
            self._checkpoint_writer.kill()
            self._fail(self._named(f"stopped at once. {LAST_CHECKPOINT}"))
        elif not self._training:
            self._terminate(self._pool.staying())
            if self._training:  # it had just begun
                return
            self._fail(self._named(f"stopped before the first step; {remove_begun(self._folder)}"))
        elif self._stop_at is None:
            self._progress_table.request = STOP
            self._stop_at = time.monotonic() + self._recipe.recovery.grace_seconds * (1 - WRITING_SHARE)
        elif self._change is not None or time.monotonic() > self._stop_at:
            self._terminate(self._pool.staying())  # the step does not end in time
            self._fail(self._named(f"stopped in the middle of a step. {self._rescue()}"))

    def _rescue(self) -> str:
        """Write the last commit from the snapshot, without the workers. Return how to go on."""
        step, seconds = self._step, self._recipe.recovery.grace_seconds * WRITING_SHARE
        if step < 1:
            return "Nothing had been committed." if self._memory >= 0 else LAST_CHECKPOINT
        if not self._checkpoint_writer.write_now(seconds):
            return f"Step {step} could not be saved. {LAST_CHECKPOINT}"
        return (
            f"Everything up to step {step} is saved. Go on with the same command and `--run-folder "
            f"{self._checkpoint_writer.place} --resume` (run=…, resume=True), on any number of workers."
        )

    def _named(self, message: str) -> Interrupted:
        """The error for the end that the first signal requested."""
        wanted_back = bool(self._interrupts.asked) and self._interrupts.asked[0] != signal.SIGINT
        return Preempted(message) if wanted_back else Interrupted(message)

    def _resize(self, run_lock: RunLock, request: WorkersRequest) -> None:
        """Handle a request for another number of workers; while one is being fulfilled, the next ones wait."""
        most, wanted = self._progress_table.rows, request.workers

        def answer(text: str, *, done: bool = False) -> None:
            run_lock.answer(request, text, done=done)

        if wanted > most:
            answer(f"at most {most} workers can share a step")
        elif 0 < self._gpus < wanted:
            answer(f"at most {self._gpus} workers can be at work: each needs a GPU of its own")
        elif self._change is not None or not self._training or self._stop_at is not None:
            answer("workers are being started, replaced or stopped just now; ask again in a moment")
        elif wanted == self._wanted:
            answer(f"{wanted} workers are at work already", done=True)
        else:
            try:
                allow_files(wanted)
            except RecipeError as error:
                answer(str(error))
                return
            self._resizing = request
            self._change = Change(since=time.monotonic(), before=self._wanted)
            self._wanted = wanted

    # Groups of workers

    def _form_group(self) -> None:
        """Start missing workers; when every worker waits, give out rank assignments."""
        if self._error is not None or self._has_ended or self._orphan is not None:
            return
        if time.monotonic() >= self._start_at:
            try:
                self._pool.start_workers(self._wanted)
            except OSError as error:
                self._terminate(self._pool.staying())
                why = f"a worker cannot be started: {explain(error) or error}"
                self._fail(WorkerError(f"{why} {self._rescue()}" if self._training else why))
                return
        staying = self._pool.staying()
        change = self._change
        resizing = (
            change is not None and not change.lost and not change.assigned and self._progress_table.request == RUNNING
        )
        if change is not None and resizing and all(one.waiting for one in staying if one.generation < 0):
            self._progress_table.request = REGROUP  # the new workers are ready
        if len(staying) < self._wanted or not all(handle.waiting for handle in staying):
            return
        self._pool.release(staying[self._wanted :])
        self._progress_table.generation += 1
        going_on = FINISH if self._is_finishing else RUNNING
        self._progress_table.request = going_on if self._stop_at is None else STOP
        self._dissolved_at = None
        self._pool.assignment(self._progress_table.generation, staying[: self._wanted])
        if change is not None:
            change.assigned = True

    def _tell(self, event: events.Event) -> None:
        """Pass an event to the observer; when a new group has begun, the change is complete."""
        if isinstance(event, events.RunStarted):
            change, goes_on = self._change, self._training and self._memory >= 0
            self._begin_training()
            if not goes_on:  # or resumed from disk, like a new run
                self._observe(event)
            for told in change.conclude(event, time.monotonic()) if change else []:
                self._observe(told)
            return
        if isinstance(event, events.StepDone):
            self._hang_detector.learn(event.seconds)
        self._has_ended |= isinstance(event, events.RunEnded)
        self._observe(event)

    def _begin_training(self) -> None:
        self._training, self._change = True, None
        if self._run_lock is None:
            self._run_lock = RunLock(self._folder)
        self._run_lock.tell(workers=self._wanted, most_workers=self._progress_table.rows)

    def _observe(self, event: events.Event) -> None:
        if not isinstance(event, events.CheckpointWritten | events.Notice):  # they come from outside the workers
            self._last_event = time.monotonic()
        try:
            if self._observer.observe(event) == events.STOP:
                self._finish()
        except ObserverError as error:
            self._terminate(self._pool.staying())
            end = ObserverError(f"{error} {'The run itself is complete.' if self._has_ended else self._rescue()}")
            end.__cause__ = error.__cause__
            self._fail(end)
        if isinstance(event, events.Resized) and self._run_lock is not None and self._resizing is not None:
            told = f"{event.before} → {event.workers} workers after step {event.step}, in {event.seconds:.2f} s"
            self._run_lock.answer(self._resizing, told, done=True)
            self._resizing = None

    def _finish(self) -> None:
        """The observer has requested the end: the next step is the last one."""
        self._is_finishing = True
        if self._stop_at is None:
            self._progress_table.request = FINISH

    @property
    def _step(self) -> int:
        """The last committed step; −1 before any commit."""
        if self._memory < 0 or not Snapshot.is_laid_out(self._memory):
            return -1
        snapshot = Snapshot(self._memory)
        return int(snapshot.facts()["step"]) if snapshot.sequence else -1

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
