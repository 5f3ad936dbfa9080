"""Faults as data: what fails, in which worker, at which step and phase; so that a failing case can be repeated.

    kill(worker=1, step=7, phase=update)      at step 7 (from 1), worker 1 is killed when it is about to update
    hang(worker=0, step=3, phase=contribute, microbatch=2)
    kill(worker=2, step=5, phase=reduce, times=3)

Owns the notation and the effects. Phases are those of `progress_table.PHASES`; nothing is active unless requested.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from unisono.errors import RecipeError


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _quit() -> None:
    os._exit(9)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang() -> None:
    while True:
        pass


def _block() -> None:
    reading, _ = os.pipe()
    os.read(reading, 1)


def _fail() -> None:
    raise OSError("a fault that was requested")


def _pause() -> None:
    time.sleep(1.0)


KINDS: dict[str, Callable[[], None]] = {
    "kill": _kill,  # SIGKILL, as the kernel's out-of-memory killer sends
    "crash": _crash,  # a segmentation fault
    "quit": _quit,  # the process ends without a report
    "stop": _stop,  # SIGSTOP
    "hang": _hang,  # a live-lock
    "block": _block,  # a read that never returns
    "fail": _fail,  # an exception
    "pause": _pause,  # one second; the run must go on
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. `step` counts from 1, as everything that a user sees; `microbatch` −1: any; it is injected `times`
    times."""

    kind: str
    worker: int
    step: int
    phase: str
    microbatch: int = -1
    times: int = 1

    def __str__(self) -> str:
        more = "".join(
            f", {name}={value}" for name, value, usual in
            (("microbatch", self.microbatch, -1), ("times", self.times, 1)) if value != usual
        )  # fmt: skip
        return f"{self.kind}(worker={self.worker}, step={self.step}, phase={self.phase}{more})"


def parse(text: str, phases: Sequence[str]) -> Fault:
    """Read a fault from its notation.

    Raises:
        RecipeError: it cannot be parsed; the message says what is allowed.
    """
    names = [field.name for field in fields(Fault) if field.name != "kind"]
    found = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    given: dict[str, str] = {}
    for position, part in enumerate(found[2].split(",") if found else ()):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        given |= {name: value} if equals else {names[min(position, len(names) - 1)]: name}
    numbers = {name: value for name, value in given.items() if name != "phase"}
    fits = found and found[1] in KINDS and given.get("phase") in phases and given.keys() <= set(names)
    if not found or not fits or not all(re.fullmatch(r"-?\d+", value) for value in numbers.values()):
        raise RecipeError(
            f"--fault {text!r}: allowed is KIND(worker=N, step=N, phase=PHASE[, microbatch=N][, times=N]), where KIND "
            f"is {', '.join(KINDS)}, and PHASE {', '.join(phases)}."
        )
    whole = {name: int(value) for name, value in numbers.items()}
    return Fault(kind=found[1], phase=given["phase"], **{"worker": 0, "step": 1, **whole})


def strike(
    faults: Sequence[Fault], count: Callable[[int], int], worker: int, phase: str, step: int, microbatch: int
) -> None:
    """Inject the fault that was requested here, if any. `step` counts from 0; `count(number)` returns how often a
    fault has been injected already."""
    for number, fault in enumerate(faults):
        here = (fault.worker, fault.step - 1, fault.phase) == (worker, step, phase)
        if here and fault.microbatch in (-1, microbatch) and count(number) < fault.times:
            KINDS[fault.kind]()
