"""The processes that a supervisor watches over: forked, listened to, ended.

Owns the children and their channels. Decides nothing; `supervisor.py` does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

from unisono.board import Board
from unisono.faults import Fault
from unisono.launch.channel import Channel, Message, pair
from unisono.launch.interrupts import ASKING
from unisono.launch.losses import End
from unisono.launch.member import DUMP, Part, Post, serve
from unisono.processes import fork

DUMP_SECONDS = 1.0  # to write stacks down


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """A worker's process. rank, generation: of the seat that it has, or had last; −1: none yet. waiting: for a seat.
    asking: it waits for an answer."""

    slot: int
    process: BaseProcess
    channel: Channel
    report: TextIO
    stacks: TextIO
    rank: int = -1
    generation: int = -1
    waiting: bool = False
    leaving: bool = False
    asking: bool = False

    def answer(self, message: Message) -> None:
        """Answer what it has asked."""
        self.asking = False
        self.channel.send(message)

    @property
    def number(self) -> int:
        """What it is called: its rank, or before it has one the rank that it will probably have."""
        return self.rank if self.rank >= 0 else self.slot

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid


class Crew:
    """All members of a run on this host. `wake` is a descriptor that ends a wait."""

    def __init__(
        self,
        part: Part,
        board: Board,
        *,
        memory: int,
        threads: int,
        device: str,
        faults: Sequence[Fault],
        wake: int,
    ) -> None:
        self.members: dict[int, Member] = {}
        self._part = part
        self._board = board
        self._memory = memory
        self._threads = threads
        self._device = device
        self._faults = tuple(faults)
        self._wake = wake

    def staying(self) -> list[Member]:
        """Members that have not been told to leave, by slot."""
        return [member for slot, member in sorted(self.members.items()) if not member.leaving]

    def hire(self, count: int) -> None:
        """Fork workers until `count` are staying, in the lowest slots that are free; one that a leaving member still
        has, with its GPU, is waited for."""
        free = [slot for slot in range(count) if slot not in self.members]
        for slot in free[: max(0, count - len(self.staying()))]:
            self._board.clear(slot)
            mine, theirs = pair()
            report, stacks = _new_file(), _new_file()
            post = Post(
                slot=slot,
                channel=theirs,
                board=self._board,
                memory=self._memory,
                threads=self._threads,
                device=self._device,
                workers=count,
                report=report,
                stacks=stacks,
                parent=os.getpid(),
                faults=self._faults,
            )
            process = fork(serve, (post, self._part), f"worker {slot}", hold=ASKING)
            theirs.close()
            self.members[slot] = Member(slot=slot, process=process, channel=mine, report=report, stacks=stacks)

    def seat(self, generation: int, chosen: Sequence[Member]) -> None:
        """Give the chosen members seats in a new group."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(len(chosen))
            port = listener.getsockname()[1] if len(chosen) > 1 else 0
            for rank, member in enumerate(chosen):
                member.rank, member.generation, member.waiting = rank, generation, False
                seat: Message = {
                    "rank": rank,
                    "workers": len(chosen),
                    "local_rank": rank,
                    "local_workers": len(chosen),
                    "port": port,
                    "generation": generation,
                }
                member.channel.send(seat, listener.fileno() if port and rank == 0 else -1)

    def let_go(self, members: Iterable[Member]) -> None:
        """Tell waiting members that they are not needed any more."""
        for member in members:
            if member.waiting:
                member.waiting, member.leaving = False, True
                member.channel.send({"leave": True})

    def wait(self, seconds: float, others: Iterable[int]) -> None:
        """Return when something may have happened to a member, or to `others` (descriptors), at the latest after
        `seconds`."""
        watched: list[Any] = [self._wake, *others]
        for member in self.members.values():
            watched += [member.process.sentinel, member.channel]
        if self._wake in wait(watched, seconds):
            with suppress(BlockingIOError):
                os.read(self._wake, 4096)

    def listen(self) -> list[tuple[Member, Message]]:
        """What members have said since."""
        return [(member, message) for member in list(self.members.values()) for message in member.channel.drain()]

    def reap(self) -> tuple[list[tuple[Member, Message]], list[tuple[Member, End]]]:
        """Take out the members that have ended; return their last words, and how they ended."""
        words: list[tuple[Member, Message]] = []
        ends: list[tuple[Member, End]] = []
        for member in list(self.members.values()):
            code = member.process.exitcode
            if code is None:
                continue
            words += [(member, message) for message in member.channel.drain()]
            member.channel.close()
            del self.members[member.slot]
            written = _read(member.report)
            report = json.loads(written) if written else None
            stacks = "" if code == -signal.SIGKILL else _read(member.stacks)
            member.report.close()
            member.stacks.close()
            ends.append((member, End(worker=member.number, code=code, report=report, stacks=stacks)))
        return words, ends

    def dismiss(self, members: Iterable[Member]) -> tuple[list[tuple[Member, Message]], list[tuple[Member, End]]]:
        """End members at once; return the last words of who has ended, and how."""
        chosen = list(members)
        for member in chosen:
            member.leaving = True
            member.process.kill()
        for member in chosen:
            member.process.join()
        return self.reap()

    def end(self) -> None:
        """Make sure that no child is left."""
        self.dismiss(self.members.values())

    @staticmethod
    def is_stopped(member: Member) -> bool:
        """Whether a member's process is stopped by a signal."""
        try:
            stat = Path(f"/proc/{member.pid}/stat").read_text(encoding="ascii")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    def dump_stacks(self, folder: Path, told: str) -> None:
        """Have every member write its stacks down, into `folder`/worker-N.txt under what it last said.

        A stopped one has to be continued for that; who is lost anyhow may be.
        """
        sizes = {slot: len(_read(member.stacks)) for slot, member in self.members.items()}
        rows = {slot: str(self._board.row(slot)) for slot in self.members}
        for member in self.members.values():
            with suppress(ProcessLookupError):
                os.kill(member.pid, DUMP)
                if self.is_stopped(member):
                    os.kill(member.pid, signal.SIGCONT)
        deadline = time.monotonic() + DUMP_SECONDS
        while time.monotonic() < deadline and any(
            len(_read(member.stacks)) <= sizes[slot] for slot, member in self.members.items()
        ):
            time.sleep(0.01)
        time.sleep(0.05)  # the rest of what has begun
        folder.mkdir(parents=True, exist_ok=True)
        for slot, member in self.members.items():
            stacks = _read(member.stacks)[sizes[slot] :] or "it wrote no stacks down\n"
            text = f"{told}\nworker {member.number}, process {member.pid}, was at {rows[slot]}\n\n{stacks}"
            (folder / f"worker-{member.number}.txt").write_text(text, encoding="utf-8")


def _new_file() -> TextIO:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


def _read(file: TextIO) -> str:
    """All of a file that another process writes."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode(errors="replace")
