"""The notation of faults, and that each strikes where, and as often as, it says."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy import is_alive
from unisono.errors import RecipeError
from unisono.processes.fault_injection import KINDS, Fault, parse, strike
from unisono.processes.progress_table import PHASES

ANY_FAULT = st.builds(
    Fault,
    kind=st.sampled_from(sorted(KINDS)),
    worker=st.integers(-1, 99),
    step=st.integers(0, 10**6),
    phase=st.sampled_from(PHASES),
    microbatch=st.integers(-1, 99),
    times=st.integers(0, 99),
)


@given(ANY_FAULT)
def test_what_is_written_is_read(fault: Fault) -> None:
    assert parse(str(fault), PHASES) == fault
    spaced = str(fault).replace("(", " ( ").replace(",", " , ").replace("=", " = ").replace(")", " ) ")
    assert parse(spaced, PHASES) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("kill(worker=1, step=7, phase=update)", Fault(kind="kill", worker=1, step=7, phase="update")),
        ("kill(1, 7, update)", Fault(kind="kill", worker=1, step=7, phase="update")),
        ("kill(phase=update)", Fault(kind="kill", worker=0, step=1, phase="update")),
        ("hang(0,3,contribute,2,4)", Fault(kind="hang", worker=0, step=3, phase="contribute", microbatch=2, times=4)),
        ("fail(2, step=5, phase=load, times=3)", Fault(kind="fail", worker=2, step=5, phase="load", times=3)),
    ],
)
def test_ways_to_write(text: str, fault: Fault) -> None:
    assert parse(text, PHASES) == fault


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kill",
        "kill()",
        "nonsense",
        "explode(worker=1, step=7, phase=update)",
        "kill(worker=1, step=7)",
        "kill(worker=1, step=7, phase=lunch)",
        "kill(worker=one, step=7, phase=update)",
        "kill(worker=1, step=7.5, phase=update)",
        "kill(worker=1, step=, phase=update)",
        "kill(worker=1, step=7, phase=update, colour=3)",
        "kill(worker=1, step=7, phase=update, kind=3)",
        "kill(worker=1, step=7, phase=update) and more",
        "kill(worker=1; step=7; phase=update)",
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(text, PHASES)
    assert repr(text) in str(refused.value)
    assert all(kind in str(refused.value) for kind in KINDS)
    assert all(phase in str(refused.value) for phase in PHASES)


def test_strikes_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    struck: list[tuple[int, str, int, int]] = []
    place = (0, "", 0, 0)
    monkeypatch.setitem(KINDS, "fail", lambda: struck.append(place))
    faults = [
        parse(text, PHASES)
        for text in (
            "fail(worker=1, step=2, phase=load)",
            "fail(worker=0, step=3, phase=load, microbatch=1, times=2)",
            "fail(worker=0, step=3, phase=update, times=0)",
        )
    ]
    counts: Counter[int] = Counter()

    def count(number: int) -> int:
        counts[number] += 1
        return counts[number] - 1

    for _ in range(3):  # the same steps again, as after a loss
        for worker in (0, 1):
            for step in range(4):
                for phase in ("load", "update"):
                    for microbatch in (0, 1):
                        place = (worker, phase, step, microbatch)
                        strike(faults, count, worker, phase, step, microbatch)
    assert struck == [(0, "load", 2, 1), (1, "load", 1, 0), (0, "load", 2, 1)]


def suffer(kind: str) -> int:
    """A process that does itself this harm."""
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        KINDS[kind]()
        os._exit(0)
    return pid


@pytest.mark.parametrize(("kind", "code"), [("kill", -signal.SIGKILL), ("crash", -signal.SIGSEGV), ("quit", 9)])
def test_harm_that_ends_a_process(kind: str, code: int) -> None:
    _, status = os.waitpid(suffer(kind), 0)
    assert os.waitstatus_to_exitcode(status) == code


@pytest.mark.parametrize(("kind", "state"), [("stop", "T"), ("hang", "R"), ("block", "S")])
def test_harm_that_keeps_a_process_from_going_on(kind: str, state: str) -> None:
    pid = suffer(kind)
    try:
        deadline = time.monotonic() + 120
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.05)
        assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_harm_of_an_exception() -> None:
    with pytest.raises(OSError, match="requested"):
        KINDS["fail"]()
