"""The screen: a loss is told in words on every way of telling, and what is told twice is seen once."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
from typing import Any

import pytest
from rich.console import Console

from unisono.tracking import events
from unisono.tracking import terminal as screen
from unisono.tracking.terminal import JsonLines, Lines, Live, Pace, Quiet, tell

STARTED = events.RunStarted(
    name="toy", folder="run", workers=3, device="cpu", threads=1, microbatches_each=[2, 1, 1], samples_per_step=16,
    train_samples=96, steps=40, steps_per_epoch=6, start_step=0, parameters=10, fingerprint="f", pure=True,
)  # fmt: skip
RECOVERED = events.Recovered(
    step=34, what="worker 1 was killed by SIGKILL", workers=3, wasted_seconds=0.1, seconds=0.3
)  # fmt: skip
RESIZED = events.Resized(step=34, before=2, workers=1, seconds=0.84)
CORRUPTED = events.Corrupted(step=35, microbatch=3, workers=[1, 2], parameters=["heads[a].weight", "b", "c", "d", "e"])
RECOVERED_WORDS = "worker 1 was killed by SIGKILL: going on from step 34 with 3 workers, 0.4 s lost"
CORRUPTED_WORDS = (
    "worker 1 or 2 computed wrong bits for microbatch 3 of step 35, in heads[a].weight, b, c and 2 more; the step was "
    "not committed"
)


def done(step: int, samples: int = 16, seconds: float = 0.5) -> events.StepDone:
    return events.StepDone(
        step=step, epoch=step / 6, loss=0.5, gradient_norm=1.0, learning_rate=0.1, samples=samples, tokens=0, seconds=seconds
    )  # fmt: skip


class Paper:
    """Has what stands in for standard output at the least: neither `isatty` nor `flush`."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def test_output_without_isatty_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = Paper()
    monkeypatch.setattr(sys, "stdout", paper)
    chosen = screen.choose_screen(quiet=False, as_json=False)
    assert type(chosen) is Lines
    chosen.observe(STARTED)
    screen.choose_screen(quiet=False, as_json=True).observe(RESIZED)
    lines = paper.text.splitlines()
    assert lines[0].startswith("toy: 3 workers on cpu") and json.loads(lines[-1])["event"] == "Resized"


def evaluated(step: int, accuracy: float = 0.5) -> events.Evaluated:
    return events.Evaluated(step=step, epoch=step / 6, split="validation", scores={"accuracy": accuracy}, best=False)


def ended(share: float = 0.931, recoveries: int = 2, resumes: int = 0, **seconds: float) -> events.RunEnded:
    summary: dict[str, Any] = {
        "steps": 40, "seconds": 20.0, "samples_per_second": 32.0, "test": None, "weights_sha256": "w", "optimizer_sha256": "o",
        "recoveries": recoveries, "resumes": resumes, "goodput": {"wall_seconds": 20.0, "share": share, "seconds": seconds},
    }  # fmt: skip
    return events.RunEnded(folder="run", summary=summary)


def test_words() -> None:
    pace = Pace()
    assert tell(RECOVERED, pace) == [RECOVERED_WORDS]
    assert tell(RESIZED, pace) == ["going on from step 34 with 1 worker instead of 2, after 0.8 s"]
    assert tell(CORRUPTED, pace) == [f"warning: {CORRUPTED_WORDS}"]
    one = dataclasses.replace(CORRUPTED, workers=[1], parameters=["b"])
    assert "worker 1 computed" in tell(one, pace)[0] and "in b; the step" in tell(one, pace)[0]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (ended(steps=16.0, start=2.1, data=0.04, evaluation=0.42, saving=0.0, recovery=1.2, waste=0.0),
         "goodput 93.1 %: start 2.1 s, evaluation 0.4 s, recovery 1.2 s (2 recoveries)"),
        (ended(recoveries=1, resumes=1, waste=3.0), "goodput 93.1 %: waste 3.0 s (1 recovery, 1 resume)"),
        (ended(share=1.0, recoveries=0, steps=20.0), "goodput 100.0 %"),
    ],
)  # fmt: skip
def test_goodput_at_the_end(event: events.RunEnded, line: str) -> None:
    lines = tell(event, Pace())
    assert line in lines
    assert lines[0].startswith("40 steps in 20.0 s") and lines[-1].startswith("run folder run")


def test_where_a_worker_failed_is_shown_below_the_recovery() -> None:
    event = dataclasses.replace(RECOVERED, trace='  File "task.py", line 3, in loss\nValueError: no')
    assert tell(event, Pace())[0].splitlines() == [
        RECOVERED_WORDS, '      File "task.py", line 3, in loss', "    ValueError: no",
    ]  # fmt: skip


def test_json_on_the_screen_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    JsonLines().observe(evaluated(1, accuracy=math.nan))
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["scores"] == {"accuracy": None}


def test_steps_that_the_ledger_has_not_are_not_among_those_timed() -> None:
    event = ended()
    (line, *_) = tell(dataclasses.replace(event, summary={**event.summary, "timed_steps": 12}), Pace())
    assert line == "12 of 40 steps in 20.0 s, 32 samples/s"


def test_quiet_warns(capsys: pytest.CaptureFixture[str]) -> None:
    for event in (STARTED, done(1), RECOVERED, RESIZED, CORRUPTED, events.Notice(message="no warning")):
        Quiet().observe(event)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"warning: {RECOVERED_WORDS}", f"warning: {CORRUPTED_WORDS}"]


def test_json_is_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    JsonLines().observe(RECOVERED)
    assert json.loads(capsys.readouterr().out) == {"event": "Recovered", **dataclasses.asdict(RECOVERED)}


def test_lines_tell_an_evaluation_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    for event in (STARTED, done(1), evaluated(1), RECOVERED, done(1), evaluated(1), done(2), evaluated(2)):
        lines.observe(event)
    out = capsys.readouterr().out
    assert RECOVERED_WORDS in out.splitlines()
    assert out.count("after step 1 ") == 1 and out.count("after step 2 ") == 1
    assert out.count("step 1/40") == 1


def test_pace_counts_a_step_once() -> None:
    pace = Pace()
    pace.begin(STARTED)
    assert [pace.count(done(step)) for step in (1, 2, 2, 1, 3)] == [True, True, False, False, True]
    assert "32 samples/s" in pace.facts(done(3))  # 3 * 16 samples in 3 * 0.5 s
    pace.begin(dataclasses.replace(STARTED, start_step=2))
    assert not pace.count(done(2)), "the step that a run goes on from was told by an earlier session"
    assert pace.count(done(3))


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(
        screen,
        "Console",
        lambda **options: Console(file=written, force_terminal=True, width=200, color_system="standard", **options),
    )
    monkeypatch.setattr(screen, "SECONDS_BETWEEN_REFRESHES", -1.0)
    return written


def test_the_bar_outlives_a_loss(terminal: io.StringIO) -> None:
    live = Live()
    for event in (STARTED, done(1), done(2), RECOVERED, done(2), done(1), CORRUPTED, done(3)):
        live.observe(event)
    written = terminal.getvalue()
    assert f"\x1b[33m{RECOVERED_WORDS}\x1b[0m" in written
    assert f"\x1b[33mwarning: {CORRUPTED_WORDS}\x1b[0m" in written, "brackets are text"
    assert "step 3/40" in written[written.rindex(CORRUPTED_WORDS) :]
    assert "step 1/40" not in written[written.rindex(RECOVERED_WORDS) :], "told twice"
    live.observe(ended(steps=20.0))
    assert "goodput 93.1 % (2 recoveries)" in terminal.getvalue()
    live.close()


def test_a_second_start_makes_no_second_bar(terminal: io.StringIO) -> None:
    live = Live()
    for event in (STARTED, done(1), done(2), dataclasses.replace(STARTED, start_step=1), done(2)):
        live.observe(event)
    before = len(terminal.getvalue())
    live.observe(done(3))
    assert re.findall(r"step (\d+)/40", terminal.getvalue()[before:]) == ["3"]
    live.close()


def test_a_live_terminal_obeys_no_text(terminal: io.StringIO) -> None:
    live = Live()
    live.observe(events.Notice(message="class 'a\x1b[2J\rb' :bug: [red]"))
    live.close()
    assert "class 'a\\u001b[2J\\u000db' :bug: [red]" in terminal.getvalue()
