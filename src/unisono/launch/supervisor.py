"""The supervisor of a run on this host: it owns workers, snapshot and ledger, and brings the run through losses.

    a worker ends, hangs, or another number of them is wanted → the group is dissolved: everybody drops the unfinished
    step → who is missing is replaced → all who wait get seats in a new group → it goes on from the last commit

Owns what is decided, and when. The processes are `crew.py`'s, checkpoints `writing.py`'s, hangs `watch.py`'s, the
budget `losses.py`'s. It computes nothing, holds no lock that a worker needs, and starts no thread, so it can fork at
any time.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from unisono import events
from unisono.board import MOST_FAULTS, REGROUP, RUNNING, STOP, Board
from unisono.engine.snapshot import Snapshot, new_file
from unisono.errors import Interrupted, Preempted, RecipeError, WorkerError
from unisono.faults import Fault
from unisono.launch.channel import Message
from unisono.launch.claim import Claim
from unisono.launch.crew import Crew, Member
from unisono.launch.devices import check_gpus, count_gpus
from unisono.launch.interrupts import Interrupts
from unisono.launch.losses import Budget, Change, Loss, find_verdict, name_loss
from unisono.launch.member import Part
from unisono.launch.watch import Watch
from unisono.launch.writing import Writing
from unisono.processes import forget_kernel_buffers
from unisono.recipe import Recipe
from unisono.run import remove_begun

MOST_WORKERS = 4096
LOOK_SECONDS = 0.2
MEETING_SECONDS = 2.0  # for workers that wait for one that was lost on the way to their meeting
ORPHAN_SECONDS = 1.0  # for a worker to end whom others have missed already
WRITING_SHARE = 0.5  # of the grace period, kept for writing the checkpoint
LAST_WRITING_SECONDS = 600.0
LAST_CHECKPOINT = "The last checkpoint, if there is one, is whole: go on with --resume."


class Supervisor:
    """Runs `part` in `workers` processes, whatever happens to them. `observer` hears of everything."""

    def __init__(
        self,
        part: Part,
        *,
        recipe: Recipe,
        folder: Path,
        observer: events.Observer,
        workers: int,
        faults: Sequence[Fault] = (),
    ) -> None:
        self._part = part
        self._recipe = recipe
        self._folder = folder
        self._observer = observer
        self._faults = faults
        self._wanted = workers
        if len(faults) > MOST_FAULTS:
            raise RecipeError(f"--fault: {len(faults)} faults are given; allowed are {MOST_FAULTS}. Inject fewer.")
        check_gpus(workers, recipe.train.device)
        self._gpus = count_gpus(recipe.train.device)
        self._board = Board(min(recipe.train.microbatches, MOST_WORKERS))
        self._memory = new_file()
        self._budget = Budget(recipe.recovery)
        self._claim: Claim | None = None
        self._error: Exception | None = None  # what ends the run
        self._has_ended = False  # the result has been told
        self._training = False  # the first group of workers has begun
        self._change: Change | None = None  # that has not been overcome yet
        self._hire_at = 0.0
        self._dissolved_at: float | None = None
        self._orphan: tuple[Member, str, float] | None = None  # who lost others that have not ended, why and when
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
        sys.stdout.flush()
        sys.stderr.flush()
        forget_kernel_buffers()
        if self._folder.exists():
            self._claim = Claim(self._folder)
        with Interrupts() as self._interrupts:
            train, keep = self._recipe.train, self._recipe.checkpoint.keep
            self._writing = Writing(self._folder / "checkpoints", keep, self._memory, self._tell)
            self._crew = Crew(
                self._part,
                self._board,
                memory=self._memory,
                threads=train.threads,
                device=train.device,
                faults=self._faults,
                wake=self._interrupts.descriptor,
            )
            self._watch = Watch(self._crew, self._board, self._folder, self._recipe.recovery.hang_factor)
            try:
                while self._error is None and (self._crew.members or not self._has_ended):
                    self._hear(self._crew.listen())
                    self._bury()
                    self._look()
                    self._form()
                    self._crew.wait(LOOK_SECONDS, self._writing.sentinels)
                self._dismiss(self._crew.staying())
            finally:
                self._leave()
        if self._error is not None:
            raise self._error

    def _leave(self) -> None:
        """Leave nothing behind."""
        self._crew.end()
        self._writing.finish(self._watch.limit_seconds or LAST_WRITING_SECONDS)
        if self._claim is not None:
            self._claim.release()
        if self._memory >= 0:
            os.close(self._memory)

    # What members say, and how they end

    def _hear(self, said: Sequence[tuple[Member, Message]]) -> None:
        for member, message in said:
            if "event" in message:
                self._tell(getattr(events, message["event"])(**message["fields"]))
            elif "waiting" in message:
                self._welcome(member, message["waiting"])
            elif "ask" in message:
                member.asking = True
                (self._writing.ask if message["ask"] == "save" else self._writing.settle)(member.answer)

    def _dismiss(self, members: Iterable[Member]) -> None:
        """End members at once; what they had said before is heard."""
        words, _ = self._crew.dismiss(members)
        self._hear(words)

    def _welcome(self, member: Member, why: str) -> None:
        """A member waits for a seat. If its group was not dissolved, another worker is about to end, or something has
        come between them."""
        member.waiting = True
        if self._board.request == REGROUP and self._change is not None and member.generation >= 0:
            self._change.stand_still(time.monotonic())
        if why and self._orphan is None and member.generation == self._board.generation:
            self._orphan = member, why, time.monotonic()

    def _bury(self) -> None:
        """See to the members that have ended."""
        words, ends = self._crew.reap()
        self._hear(words)
        missed = [(member, end) for member, end in ends if not (member.leaving or (self._has_ended and not end.code))]
        if not missed or self._has_ended:
            return
        if verdict := find_verdict([end for _, end in missed]):
            self._fail(self._named(str(verdict)) if isinstance(verdict, Interrupted) else verdict)
            return
        fresh = any(member.generation < 0 for member, _ in missed)
        self._lose(name_loss([end for _, end in missed], self._step), fresh=fresh)

    def _lose(self, loss: Loss, *, fresh: bool = False) -> None:
        """Workers have been lost: end the run, or dissolve the group and go on. `fresh`: some had no seat yet."""
        change, now = self._change, time.monotonic()
        if change is not None and change.lost and not change.seated and not fresh:
            change.lost += f"; {loss.what}"  # the same loss, noticed bit by bit
            return
        if end := self._budget.spend(loss):
            self._dismiss(self._crew.staying())
            trace = f"\n{loss.trace}" if loss.trace else ""
            self._fail(WorkerError(f"{end}. {self._rescue()}{trace}"))
            return
        if change is None:
            change = self._change = Change(since=now)
        change.lost += f"; {loss.what}" if change.lost else loss.what
        change.wasted += now - self._last_event if self._training else 0.0
        change.seated = False
        self._last_event = now
        self._hire_at = now + self._budget.backoff_seconds
        self._board.generation += 1  # everybody leaves the present group, at the next mark on the board
        self._dissolved_at, self._orphan = now, None
        self._watch.spare()
        if self._gpus:  # a broken nccl group cannot be left; on CPUs survivors keep what they have made ready
            self._dismiss(member for member in self._crew.staying() if member.generation >= 0)
        if self._recipe.recovery.on_loss == "shrink" and self._training:
            self._wanted = max(1, min(self._wanted, len(self._crew.staying())))

    # What is to be done by now

    def _look(self) -> None:
        self._writing.look(self._watch.limit_seconds)
        if self._has_ended:
            self._crew.let_go(self._crew.members.values())
            return
        if self._interrupts.asked:
            self._heed()
        now = time.monotonic()
        if self._error is not None or now < self._look_at:
            return
        self._look_at = now + LOOK_SECONDS
        if self._claim is not None and (wanted := self._claim.wanted_workers()):
            self._resize(self._claim, wanted)
        if self._dissolved_at is not None and now > self._dissolved_at + MEETING_SECONDS:
            at_work = [member for member in self._crew.staying() if not member.waiting]
            self._dismiss(member for member in at_work if self._board.row(member.slot).waiting == "join")
        if self._orphan is not None and now > self._orphan[2] + ORPHAN_SECONDS:
            member, why, _ = self._orphan
            self._lose(Loss(step=self._step, what=f"worker {member.number} lost the others ({why})"))
        if self._error is None and (found := self._watch.find()):
            told = self._watch.describe(found, self._step)
            self._dismiss(member for member, _ in found)
            self._lose(Loss(step=self._step, what=told))

    def _heed(self) -> None:
        """A signal has asked for the end."""
        if signal.SIGINT in self._interrupts.asked[1:]:
            self._writing.kill()
            self._fail(self._named(f"stopped at once. {LAST_CHECKPOINT}"))
        elif not self._training:
            self._dismiss(self._crew.staying())
            if self._training:  # it had just begun
                return
            remove_begun(self._folder)
            self._fail(self._named("stopped before the first step; nothing was left behind."))
        elif self._stop_at is None:
            self._board.request = STOP
            self._stop_at = time.monotonic() + self._recipe.recovery.grace_seconds * (1 - WRITING_SHARE)
        elif self._change is not None or time.monotonic() > self._stop_at:
            self._dismiss(self._crew.staying())  # the step does not end in time
            self._fail(self._named(f"stopped in the middle of a step. {self._rescue()}"))

    def _rescue(self) -> str:
        """Write the last commit from the snapshot, without the workers. Return how to go on."""
        step, seconds = self._step, self._recipe.recovery.grace_seconds * WRITING_SHARE
        if step < 1:
            return "Nothing had been committed." if self._memory >= 0 else LAST_CHECKPOINT
        if not self._writing.write_now(seconds):
            return f"Step {step} could not be saved. {LAST_CHECKPOINT}"
        return (
            f"Everything up to step {step} is saved. Go on with the same command and `--run-folder {self._folder} "
            "--resume`, on any number of workers."
        )

    def _named(self, message: str) -> Interrupted:
        """The end that the first signal asked for."""
        wanted_back = bool(self._interrupts.asked) and self._interrupts.asked[0] != signal.SIGINT
        return Preempted(message) if wanted_back else Interrupted(message)

    def _resize(self, claim: Claim, wanted: int) -> None:
        """Somebody wants another number of workers."""
        most = self._board.rows
        if wanted > most:
            claim.answer(f"at most {most} workers can share a step", done=False)
        elif 0 < self._gpus < wanted:
            claim.answer(f"at most {self._gpus} workers can be at work: each needs a GPU of its own", done=False)
        elif self._change is not None or not self._training or self._stop_at is not None:
            claim.answer("workers are being started, replaced or stopped just now; ask again in a moment", done=False)
        elif wanted == self._wanted:
            claim.answer(f"{wanted} workers are at work already", done=True)
        else:
            self._change = Change(since=time.monotonic(), before=self._wanted)
            self._wanted = wanted

    # Groups of workers

    def _form(self) -> None:
        """Hire who is missing; when everybody waits, give out seats."""
        if self._error is not None or self._has_ended or self._orphan is not None:
            return
        if time.monotonic() >= self._hire_at:
            self._crew.hire(self._wanted)
        staying = self._crew.staying()
        change = self._change
        resizing = change is not None and not change.lost and not change.seated and self._board.request == RUNNING
        if change is not None and resizing and all(one.waiting for one in staying if one.generation < 0):
            self._board.request = REGROUP  # newcomers are warm
        if len(staying) < self._wanted or not all(member.waiting for member in staying):
            return
        self._crew.let_go(staying[self._wanted :])
        self._board.generation += 1
        self._board.request = RUNNING if self._stop_at is None else STOP
        self._dissolved_at = None
        self._crew.seat(self._board.generation, staying[: self._wanted])
        if change is not None:
            change.seated = True

    def _tell(self, event: events.Event) -> None:
        """Tell the observer; a group that has begun anew ends what had changed."""
        if isinstance(event, events.RunStarted):
            change, goes_on = self._change, self._training and self._memory >= 0
            self._begin_training()
            if not goes_on:  # or is resumed from disk, like another run
                self._observe(event)
            for told in change.conclude(event, time.monotonic()) if change else []:
                self._observe(told)
            return
        if isinstance(event, events.StepDone):
            self._watch.learn(event.seconds)
        self._has_ended |= isinstance(event, events.RunEnded)
        self._observe(event)

    def _begin_training(self) -> None:
        self._training, self._change = True, None
        if self._claim is None:
            self._claim = Claim(self._folder)
        self._claim.tell(workers=self._wanted, most_workers=self._board.rows)

    def _observe(self, event: events.Event) -> None:
        if not isinstance(event, events.CheckpointWritten | events.Notice):  # they come from beside
            self._last_event = time.monotonic()
        self._observer.observe(event)
        if isinstance(event, events.Resized) and self._claim is not None:
            sizes = f"{event.before} → {event.workers} workers"
            self._claim.answer(f"{sizes} after step {event.step}, in {event.seconds:.2f} s", done=True)

    @property
    def _step(self) -> int:
        """The last committed step; −1 before any commit."""
        if self._memory < 0 or not Snapshot.is_laid_out(self._memory):
            return -1
        snapshot = Snapshot(self._memory)
        return int(snapshot.facts()["step"]) if snapshot.sequence else -1

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
