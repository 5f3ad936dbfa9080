"""How the workers of a host meet: where no other user can speak, and without a name server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import unisono
from learned import SETTINGS, Dropped, make_columns
from unisono.errors import LostPeerError
from unisono.exchange import shared_memory
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
