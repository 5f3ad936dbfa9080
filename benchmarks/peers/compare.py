"""Training side by side: unisono against what people use, each started by its own command.

    python benchmarks/peers/compare.py                                      everything, hours on two cores
    python benchmarks/peers/compare.py --quick                              less of it, in half an hour
    python benchmarks/peers/compare.py --peers ddp-tuned hf --workloads news --precision float32 --repeats 5
    python benchmarks/peers/compare.py --attention-dropout 0 ...            lets the peers use torch's fused attention

Prints a table for each workload and precision, and one on what 1 and 2 workers agree in. Runs alternate, A B C A B C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for its neighbours, also when this module is imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py
import environments
from journal import samples_per_second
from prepared import WORKLOADS, Prepared, prepare
from record import Cell, record
from sides import AS_IT_COMES, PEERS, UNISONO, FailedRunError, Run, Settings, Side, train
from verdict import Figures, better, table

WORKERS = 2
SIDES = UNISONO | PEERS
TITLES = {name: side.title for name, side in SIDES.items()}
OURS = {"unisono": "unisono 8", "unisono-2": "unisono 2"}
AGREEMENT_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Steps of a run: to warm up, and to be timed."""

    warm_up: int
    timed: int


LENGTHS = {
    ("news", "float32"): Length(warm_up=3, timed=8),
    ("news", "bf16"): Length(warm_up=1, timed=2),
    ("tweets", "float32"): Length(warm_up=3, timed=12),
    ("tweets", "bf16"): Length(warm_up=1, timed=3),
    ("small", "float32"): Length(warm_up=50, timed=400),
    ("small", "bf16"): Length(warm_up=20, timed=100),
}


def judge(run: Run, prepared: Prepared, length: Length) -> Figures:
    """The figures of one run."""
    size = prepared.workload.samples_per_step
    return Figures(
        samples_per_second=samples_per_second(run.steps, warm_up=length.warm_up, samples_per_step=size),
        first_step_seconds=run.first_step_seconds,
        largest_process_mb=run.largest_process / 2**20,
        all_processes_mb=run.all_processes / 2**20,
    )


def warm(prepared: Prepared, peers: Sequence[str]) -> None:
    """Run each peer once, untimed: DeepSpeed compiles at its first start, and files come from the disk."""
    for lock in environments.folder("deepspeed").glob("compiled/*/lock"):  # left by a first start that was interrupted
        lock.unlink()
    for peer in peers:
        try:
            train(PEERS[peer], prepared, Settings(workers=WORKERS, steps=1, precision="float32", attention_dropout=0.1))
        except FailedRunError as error:
            print(f"{TITLES[peer]} failed in its first run: {error}", file=sys.stderr, flush=True)


def compare(
    prepared: Prepared, peers: Sequence[str], settings: Settings, length: Length, repeats: int, name: str
) -> None:
    """Run all sides in turns, and print their table."""
    runs: dict[str, list[Figures]] = {}
    failed: dict[str, str] = {}
    for _ in range(repeats):
        for side in (*UNISONO, *peers):
            if side in failed:
                continue
            try:
                run = train(SIDES[side], prepared, settings)
            except FailedRunError as error:
                failed[side] = str(error)
                runs.pop(side, None)
                print(f"{TITLES[side]} failed: {error}", file=sys.stderr, flush=True)
                continue
            figures = judge(run, prepared, length)
            runs.setdefault(side, []).append(figures)
            print(
                f"{name}: {side}: {figures.samples_per_second:.1f} samples/s, "
                f"first step {figures.first_step_seconds:.1f} s, "
                f"{figures.largest_process_mb:.0f} and {figures.all_processes_mb:.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    title = (
        f"{prepared.workload.what}, {settings.precision}, attention dropout {settings.attention_dropout:g}: "
        f"{WORKERS} workers of 1 thread, {repeats} × {length.timed} steps in turns"
    )
    shown = {side: TITLES[side] for side in (*UNISONO, *peers)}
    record(name, title, table(runs, OURS, shown, failed))
    for mine in OURS:
        if mine in runs:
            print(better(runs, mine, list(OURS), TITLES) + "\n", flush=True)


def compare_workers(prepared: Prepared, peers: Sequence[str], attention_dropout: float) -> None:
    """Train each side with 1 and with 2 workers, and print whether they agree."""
    sides = [SIDES[name] for name in ("unisono", *peers)]
    if "hf" in peers:
        sides.append(AS_IT_COMES)
    rows = [_agree(side, prepared, attention_dropout) for side in sides]
    title = (
        f"1 worker and 2: {prepared.workload.what}, float32, dropout 0.1, {AGREEMENT_STEPS} steps; the loss is the "
        "mean of these steps, as each side reports it"
    )
    record("peers_workers", title, rows)


def _agree(side: Side, prepared: Prepared, attention_dropout: float) -> dict[str, Cell]:
    runs: dict[int, Run] = {}
    try:
        for workers in (1, 2):
            settings = Settings(
                workers=workers, steps=AGREEMENT_STEPS, precision="float32", attention_dropout=attention_dropout
            )
            runs[workers] = train(side, prepared, settings)
    except FailedRunError as error:
        return {"side": side.title, "same weights": str(error), "loss, 1 worker": "–", "loss, 2 workers": "–"}
    one, two = runs[1], runs[2]
    return {
        "side": side.title,
        "same weights": "yes" if one.weights_sha256 == two.weights_sha256 else "no",
        "loss, 1 worker": f"{one.loss:.7f}",
        "loss, 2 workers": f"{two.loss:.7f}",
    }


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), help="default: all")
    parser.add_argument("--precision", default="float32,bf16", help="float32, bf16, or both with a comma between")
    parser.add_argument("--attention-dropout", type=float, default=0.1, help="0.1 is what config.json gives users")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="timed steps of a run; default: by workload and precision")
    parser.add_argument("--quick", action="store_true", help="news and small, float32, 2 repeats, half the steps")
    parser.add_argument("--no-agreement", action="store_true", help="leave out the table of 1 and 2 workers")
    given = parser.parse_args()
    given.precision = given.precision.split(",")
    if unknown := set(given.precision) - {"float32", "bf16"}:
        parser.error(f"--precision: {', '.join(sorted(unknown))}; allowed are float32 and bf16")
    if given.quick:
        given.precision, given.repeats = ["float32"], 2
    if given.workloads is None:
        given.workloads = ["news", "small"] if given.quick else list(WORKLOADS)
    return given


def main() -> None:
    """Make environments and workloads, and compare."""
    given = parse()
    for name in dict.fromkeys(PEERS[peer].environment for peer in given.peers):
        environments.make(name)
    small = prepare("small")
    warm(small, given.peers)
    if not given.no_agreement:
        compare_workers(small, given.peers, given.attention_dropout)
    for workload in given.workloads:
        prepared = prepare(workload)
        for precision in given.precision:
            usual = LENGTHS[workload, precision]
            timed = given.steps or (max(1, usual.timed // 2) if given.quick else usual.timed)
            length = Length(warm_up=usual.warm_up, timed=timed)
            settings = Settings(
                workers=WORKERS,
                steps=length.warm_up + length.timed,
                precision=precision,
                attention_dropout=given.attention_dropout,
            )
            name = f"peers_{workload}_{precision}"
            if given.attention_dropout != 0.1:
                name += f"_attention_dropout_{given.attention_dropout:g}"
            compare(prepared, given.peers, settings, length, given.repeats, name)


if __name__ == "__main__":
    main()
