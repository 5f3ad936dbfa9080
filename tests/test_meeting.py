"""How the workers of a host meet: where no other user can speak, and without a name server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import unisono
from learned import SETTINGS, Dropped, make_columns
from unisono.errors import LostPeerError
from unisono.exchange import meeting
from unisono.exchange.meeting import SocketMeeting
from unisono.tracking import ledger

pytestmark = pytest.mark.usefixtures("warm")

FAULTS = ("kill(worker=1, step=2, phase=update)", "kill(worker=0, step=4, phase=reduce)")
LISTENING = "0A"  # the state of a socket, in /proc/net/tcp


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "draw_curves", lambda lines, path: None)


def train(folder: Path, task: unisono.Task | None = None, **options: Any) -> unisono.Trained:
    return unisono.train(task or Dropped(), make_columns(), run=folder, quiet=True, **{**SETTINGS, **options})


def find_ports(processes: set[int]) -> set[int]:
    """The TCP ports on which these processes listen."""
    mine = set()
    for process in processes:
        with suppress(OSError):
            for file in Path(f"/proc/{process}/fd").iterdir():
                with suppress(OSError):
                    mine.add(str(file.readlink()))
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTENING and f"socket:[{row[9]}]" in mine}


def find_family() -> set[int]:
    """This process and its descendants."""
    family, unseen = set(), [os.getpid()]
    while unseen:
        family.add(process := unseen.pop())
        with suppress(OSError):
            for thread in Path(f"/proc/{process}/task").iterdir():
                unseen += map(int, (thread / "children").read_text().split())
    return family


@contextmanager
def attacked() -> Iterator[set[int]]:
    """Meanwhile, garbage is written to every port on which this process or a descendant listens; yields these."""
    before, found, done = find_ports(find_family()), set(), threading.Event()

    def attack() -> None:
        while not done.wait(0.005):
            for port in find_ports(find_family()) - before:
                found.add(port)
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as end:
                    end.sendall(b"\x07" * 64)

    thread = threading.Thread(target=attack)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("launcher", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_no_port_is_opened_and_garbage_for_one_changes_nothing(tmp_path: Path, launcher: str) -> None:
    """At the start, and after each loss."""
    expected = train(tmp_path / "expected", workers=1)
    with attacked() as ports:
        run = train(tmp_path / "run", workers=2, launcher=launcher, faults=FAULTS)
    assert run.summary["recoveries"] == 2 and run.weights_sha256 == expected.weights_sha256
    assert ports == set()


# A name server that does not answer costs nothing only where none is asked. Torch and gloo ask in C.
LOOK_UPS = r"""
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void note(const char *name) {
    int file = open(getenv("LOOK_UPS"), O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (file >= 0) { if (write(file, name, strlen(name)) < 0) {} close(file); }
}
int getaddrinfo(const char *a, const char *b, const void *c, void *d) { if (a) note("getaddrinfo "), note(a); return -3; }
int getnameinfo(const void *a, unsigned b, char *c, unsigned d, char *e, unsigned f, int flags) {
    if (!(flags & 1)) note("getnameinfo "); return -3; }
void *gethostbyname(const char *a) { note("gethostbyname "); return 0; }
void *gethostbyaddr(const void *a, unsigned b, int c) { note("gethostbyaddr "); return 0; }
"""
TRAIN = """
import sys
from learned import SETTINGS, Dropped, make_columns
import unisono
from unisono.exchange import shared_memory
if sys.argv[2] == "sockets":
    shared_memory.can_share = lambda meeting: False
faults = ["kill(worker=1, step=2, phase=update)"]
run = unisono.train(Dropped(), make_columns(), run=sys.argv[1], workers=2, faults=faults, quiet=True, **SETTINGS)
print(run.weights_sha256, run.summary["recoveries"])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("way", ["memory", "sockets"])
def test_no_name_is_looked_up_on_one_host(tmp_path: Path, way: str) -> None:
    """Neither at the start nor after a loss; nor where workers share no memory, and gloo connects them."""
    (tmp_path / "look_ups.c").write_text(LOOK_UPS, encoding="utf-8")
    library, found = tmp_path / "look_ups.so", tmp_path / "found"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "look_ups.c"], check=True)
    here = str(Path(__file__).parent)
    variables = {**os.environ, "LD_PRELOAD": str(library), "LOOK_UPS": str(found), "PYTHONPATH": here}
    ended = subprocess.run(
        [sys.executable, "-c", TRAIN, tmp_path / "run", way],
        env=variables,
        capture_output=True,
        text=True,
    )
    expected = train(tmp_path / "expected", workers=1).weights_sha256
    assert ended.stdout.split() == [expected, "1"], ended.stderr
    assert not found.exists(), found.read_text()
    command = [sys.executable, "-c", "import socket\ntry: socket.gethostbyname('localhost')\nexcept OSError: pass"]
    subprocess.run(command, env=variables, check=True)
    assert found.exists()  # it would have been noticed


def meet(*acts: Callable[[SocketMeeting], Any]) -> list[Any]:
    """What each worker, a thread, returned or raised; worker 0 has a socket to each of the others."""
    pairs = [socket.socketpair() for _ in acts[1:]]
    descriptors = [[near.detach() for near, _ in pairs], *([far.detach()] for _, far in pairs)]
    found: list[Any] = [None] * len(acts)

    def work(rank: int) -> None:
        meeting = SocketMeeting(descriptors[rank], rank)
        try:
            found[rank] = acts[rank](meeting)
        except LostPeerError as error:
            found[rank] = error
        finally:
            meeting.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_hear_all_words_in_order() -> None:
    def act(rank: int) -> Callable[[SocketMeeting], Any]:
        return lambda meeting: [meeting.gather(what, f"{rank}\n{what * 100_000}") for what in ("ü", "b")]

    words = [[f"{rank}\n{what * 100_000}" for rank in range(4)] for what in ("ü", "b")]
    assert meet(*map(act, range(4))) == [words] * 4


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_all_leave_when_one_does(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: with no deadline they would wait for ever otherwise."""
    monkeypatch.setattr(meeting, "JOIN_SECONDS", None)

    def act(rank: int) -> Callable[[SocketMeeting], Any]:
        return lambda meeting: meeting.gather("a", "1") and (rank == lost or meeting.gather("b", "2"))

    found = meet(*map(act, range(3)))
    assert found.pop(lost) is True and all(isinstance(one, LostPeerError) for one in found)


def test_who_does_not_come_in_time_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "JOIN_SECONDS", 0.05)
    left = threading.Event()

    def act(meeting: SocketMeeting) -> Any:
        try:
            return meeting.gather("a", "1")
        finally:
            left.set()

    assert isinstance(meet(act, lambda meeting: left.wait())[0], LostPeerError)
