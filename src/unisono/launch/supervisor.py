"""The supervisor of a run on this host: it owns the workers, the snapshot and the ledger, and brings a run through losses.

    a worker ends, hangs, or is not wanted any more → the group is dissolved: everybody drops the unfinished step
    → who is missing is replaced → all who wait get seats in a new group → it goes on from the last commit

Owns what is decided, and when; the processes are `crew.py`'s, checkpoints `writing.py`'s, the budget `budget.py`'s. It
computes nothing, holds no lock that a worker needs, and starts no thread, so that it can fork at any time.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unisono import errors, events
from unisono.board import REGROUP, RUNNING, STOP, Board
from unisono.engine.snapshot import Snapshot, new_file
from unisono.errors import Interrupted, Preempted, UnisonoError, WorkerError
from unisono.faults import Fault
from unisono.launch.budget import Budget, Loss
from unisono.launch.channel import Message
from unisono.launch.claim import Claim
from unisono.launch.crew import Crew, End, Member
from unisono.launch.interrupts import Interrupts
from unisono.launch.local import forget_kernel_buffers
from unisono.launch.member import Part
from unisono.launch.watch import FIRST_STEP_PATIENCE, Stuck, find_stuck
from unisono.launch.writing import Writing
from unisono.recipe import Recipe
from unisono.run import tell_saved

MOST_WORKERS = 4096
LOOK_SECONDS = 0.2
MEETING_SECONDS = 2.0  # for workers of a dissolved group that wait for one that never came
WRITING_SHARE = 0.5  # of the grace period is kept for writing the checkpoint


class Supervisor:
    """Runs `part` in `workers` processes, whatever happens to them.

    `observer` hears of everything.
    """

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
        self._board = Board(min(max(recipe.train.microbatches, 1), MOST_WORKERS))
        self._memory = new_file()
        self._budget = Budget(recipe.recovery)
        self._claim: Claim | None = None
        self._error: Exception | None = None  # what ends the run
        self._ended: events.RunEnded | None = None
        self._training = False  # the first group has joined
        self._changing: _Change | None = None  # a loss or a resize that has not been overcome yet
        self._hire_at = 0.0
        self._dissolved_at: float | None = None
        self._last_event = time.monotonic()
        self._longest_step = 0.0
        self._hangs = 0
        self._stop_at: float | None = None
        self._settling: list[Member] = []  # who waits for a checkpoint to be written
        self._saving: tuple[Member, float] | None = None  # who waits for the one before, and since when

    def run(self) -> None:
        """Train to the end.

        Raises:
            UserError, DivergedError: as a worker raised it.
            WorkerError: a fault repeats, or the budget is spent; with the worker's rank and, of an exception, its traceback.
            Interrupted, Preempted: a signal stopped the run.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        forget_kernel_buffers()
        if self._folder.exists():
            self._claim = Claim(self._folder)
        with tempfile.TemporaryDirectory(prefix="unisono-") as scratch, Interrupts() as self._interrupts:
            self._writing = Writing(
                self._folder / "checkpoints", self._recipe.checkpoint.keep, self._memory, Path(scratch)
            )
            self._crew = Crew(
                self._part,
                self._board,
                memory=self._memory,
                threads=self._recipe.train.threads,
                device=self._recipe.train.device,
                scratch=Path(scratch),
                faults=self._faults,
                wake=self._interrupts.descriptor,
            )
            try:
                while self._error is None and not (self._ended and not self._crew.members):
                    self._crew.wait(LOOK_SECONDS if self._crew.members else 0.0)
                    self._hear(self._crew.listen())
                    self._bury()
                    self._look()
                    self._form()
            finally:
                self._crew.end()
                self._end_writing()
                if self._claim is not None:
                    self._claim.release()
                if self._memory >= 0:
                    os.close(self._memory)
        if self._error is not None:
            raise self._error

    # What members say, and how they end

    def _hear(self, said: Sequence[tuple[Member, Message]]) -> None:
        for member, message in said:
            if "event" in message:
                self._tell(getattr(events, message["event"])(**message["fields"]))
            elif "waiting" in message:
                self._welcome(member, message["waiting"])
            elif "save" in message:
                self._saving = (member, time.monotonic())
            elif "settle" in message:
                self._settling.append(member)

    def _welcome(self, member: Member, why: str) -> None:
        """A member waits for a seat. If its group was not dissolved, something has come between its workers."""
        member.waiting = True
        if why and member.generation == self._board.generation:
            self._lose(Loss(step=self._step, what=f"worker {member.rank} lost the others ({why})"))

    def _bury(self) -> None:
        """See to the members that have ended."""
        words, ends = self._crew.reap()
        self._hear(words)
        missed = [end for end in ends if not (end.code == 0 and (end.member.leaving or self._ended))]
        if not missed:
            return
        for end in sorted(missed, key=lambda end: end.report["when"] if end.report else 0.0):
            if end.report and end.report["known"] and not end.report["symptom"]:
                self._fail(_rebuild(end.report))
                return
        if self._ended is None:
            self._lose(_name_loss(missed, self._step))

    def _lose(self, loss: Loss) -> None:
        """Workers have been lost: end the run, or dissolve the group and go on."""
        if self._changing is not None and self._changing.loss and not self._changing.seated:
            self._changing.what += f"; {loss.what}"  # part of the same loss, or of overcoming it
            if not loss.cause and not self._changing.hired:
                return
        if end := self._budget.spend(loss):
            saved = " The last checkpoint, if there is one, is whole: go on with --resume."
            self._fail(WorkerError(f"{end}{saved}" + (f"\n{loss.trace}" if loss.trace else "")))
            return
        now = time.monotonic()
        if self._changing is None or not self._changing.loss:
            wasted = now - self._last_event if self._training else 0.0
            self._changing = _Change(what=loss.what, loss=True, since=now, wasted=wasted, before=self._wanted)
        self._changing.seated = False
        self._hire_at = now + self._budget.backoff_seconds
        self._dissolve()
        if self._recipe.recovery.on_loss == "shrink" and self._training:
            self._wanted = max(1, min(self._wanted, len(self._crew.members)))

    def _dissolve(self) -> None:
        """Everybody leaves the present group, at the next mark on the board."""
        self._board.generation += 1
        self._board.request = STOP if self._stop_at is not None else RUNNING
        self._dissolved_at = time.monotonic()

    # What is to be done by now

    def _look(self) -> None:
        now = time.monotonic()
        if (told := self._writing.look()) is not None:
            self._tell(told)
        self._answer_savers(now)
        if self._interrupts.asked:
            self._heed(now)
        if self._claim is not None and self._ended is None and (wanted := self._claim.wanted_workers()):
            self._resize(wanted)
        if self._ended is not None:
            self._crew.let_go(self._crew.members.values())
        elif self._error is None:
            self._find_hangs(now)

    def _answer_savers(self, now: float) -> None:
        """Begin to write what a worker has asked for, when what came before is written."""
        limit = self._limit_seconds
        if self._saving is not None and limit and self._writing.busy_seconds > limit:
            self._writing.kill()  # a disk that hangs: training goes on
            self._look_at_writing()
        if self._saving is not None and not self._writing.busy_seconds:
            member, since = self._saving
            facts = Snapshot(self._memory).facts()
            if facts["step"] != self._writing.step:
                self._writing.begin(facts, now - since)
            member.channel.send({"accepted": True})
            self._saving = None
        if self._settling and not self._writing.busy_seconds:
            for member in self._settling:
                member.channel.send({"written": self._writing.last_written})
            self._settling = []

    def _look_at_writing(self) -> None:
        if (told := self._writing.look()) is not None:
            self._tell(told)

    def _heed(self, now: float) -> None:
        """A signal has asked for the end."""
        if self._ended is not None:
            return
        kind = Interrupted if self._interrupts.asked[0] == signal.SIGINT else Preempted
        if len(self._interrupts.asked) > 1:
            self._fail(kind("stopped at once. The last checkpoint, if there is one, is whole: go on with --resume."))
        elif not self._training:
            self._fail(kind("stopped before the first step; nothing was left behind."))
        elif self._stop_at is None:
            self._stop_at = now + self._recipe.recovery.grace_seconds * (1 - WRITING_SHARE)
            self._board.request = STOP
        elif now > self._stop_at:
            self._fail(self._save_in_haste(kind))

    def _save_in_haste(self, kind: type[Interrupted]) -> Interrupted:
        """The step does not end in time: write the last commit from the snapshot, without the workers."""
        self._crew.end()
        left = self._recipe.recovery.grace_seconds * WRITING_SHARE
        if self._memory < 0 or not Snapshot.is_laid_out(self._memory):
            return kind("stopped in the middle of a step. The last checkpoint, if there is one, is whole: use --resume.")
        facts = Snapshot(self._memory).facts()
        if facts["step"] != self._writing.step:
            self._writing.kill()
            self._look_at_writing()
            self._writing.begin(facts)
        if (told := self._writing.finish(left)) is not None:
            self._tell(told)
        if not self._writing.last_written:
            return kind("stopped; the last step could not be saved. Go on from the last checkpoint with --resume.")
        total = Snapshot(self._memory).description.extra["total_steps"]
        return kind(tell_saved(facts["step"], total, self._folder))

    def _resize(self, wanted: int) -> None:
        """Somebody wants another number of workers."""
        assert self._claim is not None
        if wanted > self._recipe.train.microbatches:
            self._claim.answer(f"there are {self._recipe.train.microbatches} microbatches a step", done=False)
        elif self._changing is not None or not self._training:
            self._claim.answer("workers are being started, or replaced. Try again in a moment", done=False)
        elif wanted == self._wanted:
            self._claim.answer(f"{wanted} workers are at work already", done=True)
        else:
            self._changing = _Change(what="", loss=False, since=time.monotonic(), wasted=0.0, before=self._wanted)
            self._wanted = wanted

    def _find_hangs(self, now: float) -> None:
        """Find who makes no progress; have all stacks written down; treat it as lost."""
        limit = self._limit_seconds
        members = {member.rank: member for member in self._crew.members.values() if not member.waiting}
        if self._dissolved_at is not None and now - self._dissolved_at > MEETING_SECONDS:
            # who is still in a meeting that one of them never reached would wait for it for long
            self._crew.kill(m for m in members.values() if self._board.row(m.slot).waiting == "join")
        if not limit:
            return
        rows = {rank: self._board.row(member.slot) for rank, member in members.items()}
        stopped = self._crew.stopped()
        found = find_stuck(
            rows, {rank: stopped[member.slot] for rank, member in members.items()}, now=now, limit_seconds=limit
        )
        if found:
            self._end_hang(found, members)

    def _end_hang(self, found: Sequence[Stuck], members: dict[int, Member]) -> None:
        self._hangs += 1
        told = "; ".join(map(str, found))
        folder = self._folder / "hangs" / f"{self._hangs:03d}-step-{self._step + 1:08d}"
        try:
            self._crew.dump_stacks(folder, told)
            told += f"; all stacks are in {folder}"
        except OSError as error:
            told += f"; stacks could not be written: {error}"
        lost = [members[stuck.rank] for stuck in found]
        self._crew.kill(lost)
        for member in lost:
            member.process.join()
        words, _ = self._crew.reap()
        self._hear(words)  # one that was continued to write its stacks down may have gone on
        self._lose(Loss(step=self._step, what=told))

    @property
    def _limit_seconds(self) -> float:
        """How long a worker may be without progress; 0: for ever."""
        factor = self._recipe.recovery.hang_factor
        return factor * (max(1.0, self._longest_step) if self._longest_step else FIRST_STEP_PATIENCE)

    # Groups of workers

    def _form(self) -> None:
        """Hire who is missing; when everybody waits, give out seats."""
        if self._error is not None or self._ended is not None:
            return
        members = self._crew.members
        staying = [member for member in members.values() if not member.leaving]
        if len(staying) < self._wanted and time.monotonic() >= self._hire_at:
            self._crew.hire(len(members) + self._wanted - len(staying))
            if self._changing is not None:
                self._changing.hired = True
        fresh = [member for member in staying if member.generation < 0]
        seated = [member for member in staying if member.generation >= 0]
        if self._changing is not None and not self._changing.loss and self._dissolved_at is None:
            if all(member.waiting for member in fresh) and not any(member.waiting for member in seated):
                self._board.request = max(self._board.request, REGROUP) if self._board.request != STOP else STOP
        if len(staying) >= self._wanted and all(member.waiting for member in staying):
            chosen = sorted(staying, key=lambda member: member.slot)[: self._wanted]
            self._crew.let_go(set(staying) - set(chosen))
            self._board.generation += 1
            self._board.request = STOP if self._stop_at is not None else RUNNING
            self._dissolved_at = None
            self._crew.seat(self._board.generation, chosen)
            if self._changing is not None:
                self._changing.seated = True

    def _tell(self, event: events.Event) -> None:
        """Tell the observers; a group that begins anew ends what had changed."""
        if isinstance(event, events.RunStarted):
            change, self._changing = self._changing, None
            again = self._training and self._memory >= 0
            self._begin_training()
            if change is not None and again:
                self._observe(_conclude(change, event))
            if again:
                return
        if isinstance(event, events.StepDone):
            self._longest_step = max(self._longest_step, event.seconds)
        self._observe(event)
        if isinstance(event, events.RunEnded):
            self._ended = event

    def _begin_training(self) -> None:
        if self._claim is None:
            self._claim = Claim(self._folder)
        self._claim.tell(workers=self._wanted, microbatches=self._recipe.train.microbatches)
        self._training = True

    def _observe(self, event: events.Event) -> None:
        if not isinstance(event, events.CheckpointWritten | events.Notice):
            self._last_event = time.monotonic()
        self._observer.observe(event)
        if isinstance(event, events.Resized) and self._claim is not None:
            self._claim.answer(
                f"{event.before} → {event.workers} workers after step {event.step}, in {event.seconds:.2f} s", done=True
            )

    @property
    def _step(self) -> int:
        """The last committed step; −1 before any commit."""
        if self._memory < 0 or not Snapshot.is_laid_out(self._memory):
            return -1
        snapshot = Snapshot(self._memory)
        return int(snapshot.facts()["step"]) if snapshot.sequence else -1

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error

    def _end_writing(self) -> None:
        """What is being written is finished, unless it hangs."""
        if (told := self._writing.finish(self._limit_seconds or 600.0)) is not None:
            self._observe(told)


class _Change:
    """A loss or a resize that is being overcome. hired: somebody has been started for it; seated: all have been given
    seats since."""

    def __init__(self, *, what: str, loss: bool, since: float, wasted: float, before: int) -> None:
        self.what, self.loss, self.since, self.wasted, self.before = what, loss, since, wasted, before
        self.hired = self.seated = False


def _conclude(change: _Change, started: events.RunStarted) -> events.Event:
    seconds = time.monotonic() - change.since
    if change.loss:
        return events.Recovered(
            step=started.start_step,
            what=change.what,
            workers=started.workers,
            wasted_seconds=change.wasted,
            seconds=seconds,
        )
    return events.Resized(
        step=started.start_step, before=change.before, workers=started.workers, seconds=seconds
    )


def _name_loss(ends: Sequence[End], step: int) -> Loss:
    """A loss in words: every member that has ended."""
    told, trace, cause = [], "", ""
    for end in ends:
        who = f"worker {end.member.rank if end.member.rank >= 0 else end.member.slot}"
        if end.report:
            told.append(f"{who} failed")
            cause = f"{end.report['kind']}: {end.report['message']}"
            trace = trace or str(end.report["traceback"])
        elif end.code < 0:
            hint = " (out of memory? dmesg tells)" if end.code == -signal.SIGKILL else ""
            told.append(f"{who} was killed by {signal.Signals(-end.code).name}{hint}")
            trace = trace or (end.stacks if end.code != -signal.SIGKILL else "")
        else:
            told.append(f"{who} ended with exit code {end.code}")
    return Loss(step=step, what=", ".join(told), cause=cause, trace=trace)


def _rebuild(report: dict[str, Any]) -> Exception:
    """The error that a worker raised on purpose."""
    kind = getattr(errors, report["kind"], None)
    if isinstance(kind, type) and issubclass(kind, UnisonoError):
        return kind(report["message"])
    return WorkerError(report["message"])
