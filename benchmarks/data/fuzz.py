"""Fuzzing of readers and screening, guided by coverage: no crash, no hang, no record lost without a reason.

    python benchmarks/data/fuzz.py --minutes 10                     a share of it for each target
    python benchmarks/data/fuzz.py --minutes 2 --target jsonl csv
    python benchmarks/data/fuzz.py --target csv --input FILE        one input again

atheris (libFuzzer) changes inputs wherever that reaches new code in `unisono.data`. It lives in an environment of its
own, `benchmarks/.envs/fuzz`, made when missing, which borrows everything else from this one. What must hold is in
`fuzz_checks.py` and `fuzz_texts.py`. Owns the processes, one after the other, and their report. An input that ends its
process (a crash, or a hang outside of Python) is a finding; fuzzing goes on behind it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for record.py
from fuzz_inputs import TARGETS
from record import RESULTS, Cell, record

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = HERE.parent / ".envs" / "fuzz"
REQUIREMENTS = ["atheris==3.0.0"]
SOURCES = ROOT / "src" / "unisono" / "data"
READERS = (
    "input_splits",
    "delimited",
    "lines",
    "column_batch",
    "read",
    "staging",
    "rules",
    "near_duplicates",
    "screen",
    "decisions",
    "write",
)
MODULES = {
    **dict.fromkeys(("jsonl", "csv", "tsv"), READERS),
    **dict.fromkeys(("gz", "bz2", "xz", "zst"), (*READERS, "compressed")),
    "parquet": (*READERS, "parquet"),
    "folder": (*READERS, "locations"),
    "screen": ("staging", "rules", "near_duplicates", "screen", "decisions"),
    "review": ("staging", "rules", "near_duplicates", "screen", "decisions", "parts", "review", "report_page", "write"),
}
"""Whose lines are counted as reached, by target."""
STARTS_AT_MOST = 50


@dataclass(slots=True)
class Outcome:
    """What became of a target. findings: how often, by kind. ended: inputs that ended their process."""

    target: str
    seconds: float = 0.0
    executions: int = 0
    refused: int = 0
    inputs: int = 0
    edges: int = 0
    lines: str = ""
    findings: dict[str, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)


def prepare() -> Path:
    """Return the Python that has atheris; make its environment first if it is missing or has another version."""
    python, ready = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "ready"
    borrowed = sysconfig.get_path("purelib")
    wanted = "\n".join([*REQUIREMENTS, borrowed])
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        print(f"making {ENVIRONMENT.relative_to(ROOT)}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *REQUIREMENTS], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        link = ENVIRONMENT / "lib" / version / "site-packages" / "borrowed.pth"
        link.write_text(f"import site; site.addsitedir({borrowed!r})\n", encoding="utf-8")
        ready.write_text(wanted, encoding="utf-8")
    return python


def fuzz(target: str, seconds: float, seed: int, folder: Path) -> Outcome:
    """Fuzz a target for so many seconds; its corpus and findings are left in `folder`."""
    outcome = Outcome(target)
    began = time.monotonic()
    for start in range(STARTS_AT_MOST):
        left = int(began + seconds - time.monotonic())
        if left < 1:
            break
        command = [str(prepare()), "-W", "ignore", str(HERE / "fuzz_process.py")]
        command += [target, str(folder), str(left), str(seed + start)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        told = done.stdout.decode("utf-8", "backslashreplace")
        outcome.edges = max([outcome.edges, *map(int, re.findall(r"cov: (\d+)", told))])
        artifacts = sorted(path for path in folder.glob("ended-*") if path.name not in outcome.ended)
        outcome.ended += [path.name for path in artifacts]
        if done.returncode == 0:
            break
        (folder / f"ended-{start}.txt").write_text(told[-20_000:], encoding="utf-8")
        if not artifacts:  # not the fault of an input
            outcome.ended.append(f"start {start}: {told[-500:]}")
            break
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").exists() else {}
    outcome.executions, outcome.refused = report.get("executions", 0), report.get("refused", 0)
    outcome.findings = report.get("findings", {})
    outcome.inputs = len(list((folder / "corpus").glob("*")))
    outcome.seconds = time.monotonic() - began
    return outcome


def keep(outcome: Outcome, folder: Path) -> None:
    """Keep the inputs of findings, and tell how to repeat them."""
    kept = RESULTS / "failed" / f"fuzz-{outcome.target}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for path in [*folder.glob("finding-*"), *folder.glob("ended-*")]:
        shutil.copy(path, kept)
    for kind, count in outcome.findings.items():
        print(f"{outcome.target}: {kind}, {count} times", file=sys.stderr)
    for path in sorted(path for path in kept.iterdir() if path.suffix != ".txt"):
        print(f"again: python benchmarks/data/fuzz.py --target {outcome.target} --input {path.relative_to(ROOT)}")


def repeat(target: str, path: Path) -> None:
    """Try an input once more, under the same limits, without the fuzzer. Raises what is found."""
    import fuzz_run
    from fuzz_process import limits

    with limits():
        refused = fuzz_run.run_check(target, path.read_bytes())
    print("refused, as it should be" if refused else "nothing found")


def count_lines(target: str, corpus: Path) -> str:
    """Try all inputs of a corpus, and return how many lines of the target's modules they reach, of how many.

    Lines that only an import reaches (definitions, constants) are not counted.
    """
    import fuzz_run

    wanted = {str(path) for name in MODULES[target] for path in SOURCES.rglob(f"{name}.py")}
    every = {(path, line) for path in wanted for line in _list_lines(path)}
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in wanted:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        for path in sorted(corpus.iterdir()):
            try:
                fuzz_run.run_check(target, path.read_bytes())
            except Exception:  # noqa: BLE001 - it has been counted where it was found
                continue
    finally:
        sys.settrace(None)
    return f"{len(reached & every):,} of {len(every):,}"


def _list_lines(path: str) -> set[int]:
    """The lines of a module's functions."""
    found: set[int] = set()
    waiting = [compile(Path(path).read_text(encoding="utf-8"), path, "exec")]
    while waiting:
        code = waiting.pop()
        waiting += [one for one in code.co_consts if isinstance(one, CodeType)]
        if code.co_flags & inspect.CO_NEWLOCALS:  # a function
            found |= {line for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    return found


def main() -> None:
    """Fuzz targets one after the other, or repeat one input; end with an error if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--target", nargs="+", choices=[*TARGETS, "all"], default=["all"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, help="try this input again, with the one target that is given")
    given = parser.parse_args()
    if given.input:
        repeat(given.target[0], given.input)
        return
    targets = list(TARGETS) if "all" in given.target else given.target
    outcomes = []
    for target in targets:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            outcome = fuzz(target, 60 * given.minutes / len(targets), given.seed, Path(place))
            outcome.lines = count_lines(target, Path(place) / "corpus")
            if outcome.findings or outcome.ended:
                keep(outcome, Path(place))
        outcomes.append(outcome)
        print(outcome, file=sys.stderr, flush=True)
    record("data_fuzz", f"Fuzzing, {given.minutes:g} minutes, seed {given.seed}", [_row(one) for one in outcomes])
    if any(outcome.findings or outcome.ended for outcome in outcomes):
        sys.exit(1)


def _row(outcome: Outcome) -> dict[str, Cell]:
    return {
        "target": outcome.target,
        "seconds": round(outcome.seconds),
        "executions": f"{outcome.executions:,}",
        "refused": f"{outcome.refused / max(outcome.executions, 1):.0%}",
        "inputs kept": f"{outcome.inputs:,}",
        "edges reached": f"{outcome.edges:,}",
        "lines reached": outcome.lines,
        "findings": len(outcome.findings) + len(outcome.ended),
    }


if __name__ == "__main__":
    main()
