"""The benchmark beside peers: what is computed from journals and figures, and that every environment is pinned."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import environments
import journal
import verdict
from journal import Step
from verdict import Figures

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


def figures(speed: float, first: float = 1.0, largest: float = 1.0, every: float = 1.0) -> Figures:
    return Figures(
        samples_per_second=speed, first_step_seconds=first, largest_process_mb=largest, all_processes_mb=every
    )


def test_a_step_ends_when_its_last_worker_ends() -> None:
    assert journal.read_peer("1 1 10.5\n0 1 10.0\n0 2 11.0\n1 2 11.5\n") == [
        Step(number=1, time=10.5),
        Step(number=2, time=11.5),
    ]


def test_half_a_line_is_left_out() -> None:
    assert journal.read_peer("0 1 10.0\n0 2 1") == [Step(number=1, time=10.0)]


def test_a_missing_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="missing"):
        journal.read_peer("0 1 10.0\n0 3 11.0\n")


def test_unisonos_ledger_is_read() -> None:
    lines = [
        {"event": "RunStarted", "when": 1.0},
        {"event": "StepDone", "step": 1, "when": 2.0, "loss": 3.0},
        {"event": "CheckpointWritten", "step": 1, "when": 2.5},
        {"event": "StepDone", "step": 2, "when": 4.0, "loss": 1.0},
    ]
    ledger = "".join(json.dumps(line) + "\n" for line in lines)
    assert journal.read_unisono(ledger) == [Step(number=1, time=2.0), Step(number=2, time=4.0)]
    assert journal.mean_loss(ledger) == 2.0


def test_the_warm_up_is_not_timed() -> None:
    steps = [Step(number=number, time=when) for number, when in ((1, 100.0), (2, 110.0), (3, 112.0), (4, 114.0))]
    assert journal.samples_per_second(steps, warm_up=2, samples_per_step=32) == 16.0
    with pytest.raises(ValueError, match="nothing is left"):
        journal.samples_per_second(steps, warm_up=4, samples_per_step=32)


def test_a_failure_is_explained_by_its_last_error() -> None:
    output = (
        "Loading weights\n[rank0]: Traceback (most recent call last):\n[rank0]: RuntimeError: no kernel for this\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n============\n"
    )
    assert journal.explain(output, 1) == "ended with 1: RuntimeError: no kernel for this"
    assert journal.explain("killed\n", -9) == "ended with -9: killed"
    assert journal.explain("", 1) == "ended with 1: it said nothing"


def test_ratios_are_of_neighbours() -> None:
    ours, theirs = [figures(10), figures(1), figures(9)], [figures(5), figures(1), figures(3)]
    assert verdict.ratios(ours, theirs).values == (2.0, 1.0, 3.0)
    assert verdict.ratios(ours, theirs).median == 2.0
    with pytest.raises(ValueError):
        verdict.ratios(ours, theirs[:2])


def test_what_peers_do_better_follows_from_the_figures() -> None:
    runs = {
        "mine": [figures(10, 2, 500, 900), figures(12, 2, 500, 900)],
        "fast": [figures(20, 4, 600, 900), figures(24, 4, 600, 900)],
        "lean": [figures(5, 1, 100, 950), figures(6, 1, 100, 950)],
    }
    said = verdict.better(runs, "mine", ["mine"], {"mine": "us", "fast": "the fast one", "lean": "the lean one"})
    assert said == (
        "**What the peers do better** than us: samples/s: the fast one (2.00 times); first step, s: the lean one "
        "(2.00 times); largest process, MB: the lean one (5.00 times); all processes, MB: none."
    )


def test_a_table_has_equal_keys_and_says_what_failed() -> None:
    runs = {"mine": [figures(10)], "other": [figures(5)]}
    titles = {"mine": "us", "other": "them", "broken": "neither"}
    rows = verdict.table(runs, {"mine": "us"}, titles, {"broken": "ended with 1: no such thing"})
    assert [list(row) for row in rows] == [list(rows[0])] * 3
    assert [row["us / it"] for row in rows] == ["–", "2.00 (2.00 to 2.00)", "–"]
    assert rows[2]["failed"] == "ended with 1: no such thing"
    assert "failed" not in verdict.table(runs, {"mine": "us"}, titles, {})[0]


@pytest.mark.parametrize("name", environments.REQUIREMENTS)
def test_every_package_of_an_environment_is_pinned(name: str) -> None:
    lines = environments.pins(name).read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert [line for line in pinned if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    for wish in (environments.TORCH, *environments.REQUIREMENTS[name]):
        assert re.sub(r"\[.*\]", "", wish) in pinned


def test_torch_is_the_projects_own() -> None:
    constraints = (PEERS.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert environments.TORCH in constraints


def test_every_pins_file_belongs_to_an_environment() -> None:
    assert {path.stem for path in (PEERS / "pins").iterdir()} == set(environments.REQUIREMENTS)
