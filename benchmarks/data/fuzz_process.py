"""One target under the fuzzer, in a process of its own: `fuzz.py` starts it, and again where an input ends it.

    python fuzz_process.py TARGET FOLDER SECONDS SEED

Runs in the environment with atheris. Owns time and memory limits of an input, and what is noted of a finding: the
first inputs of each kind of finding, and a count, in FOLDER/report.json. Findings do not end it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
LIMIT_SECONDS = 5.0
"""Of the processor's time, for an input of at most MOST_BYTES."""
SLOWER = 4
"""So many times longer may it take under the fuzzer, which counts every branch."""
MOST_BYTES = 2**14
MOST_GROWTH = 256 * 2**20
"""Of the highest resident memory, by one input."""
WALL_SECONDS = 200
"""After which libFuzzer ends the process: what hangs outside of Python cannot be interrupted otherwise."""
KEPT_OF_A_KIND = 3


class TooSlow(BaseException):
    """An input takes more of the processor's time than it may. No ordinary handler takes it for its own."""


class TooLarge(AssertionError):
    """An input takes more memory than it may."""


class Findings:
    """What is found, by kind: the exception and where it was raised."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._report = folder / "report.json"
        before = json.loads(self._report.read_text()) if self._report.exists() else {}
        self._counts: Counter[str] = Counter(before.get("findings", {}))
        self._executions = before.get("executions", 0)
        self._refused = before.get("refused", 0)
        self._written = 0.0

    def count(self, *, refused: bool) -> None:
        self._executions += 1
        self._refused += refused
        if time.monotonic() > self._written + 1:
            self.write()

    def add(self, content: bytes, error: BaseException) -> None:
        kind = describe(error)
        self._counts[kind] += 1
        if self._counts[kind] <= KEPT_OF_A_KIND:
            number = list(self._counts).index(kind)
            path = self._folder / f"finding-{number}-{self._counts[kind]}"
            path.write_bytes(content)
            told = "".join(traceback.format_exception(error))
            path.with_suffix(".txt").write_text(told, encoding="utf-8", errors="backslashreplace")
        self.write()

    def write(self) -> None:
        content = {"executions": self._executions, "refused": self._refused, "findings": self._counts}
        whole = self._report.with_suffix(".part")
        whole.write_text(json.dumps(content))
        whole.replace(self._report)
        self._written = time.monotonic()


def describe(error: BaseException) -> str:
    """The kind of a finding: findings of one kind have one cause, as a rule."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "unisono" in frame.filename or frame.filename.startswith(str(HERE))]
    frame = (own or frames)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}"


@contextmanager
def limits(slower: float = 1) -> Iterator[None]:
    """Raise TooSlow or TooLarge where an input takes too much."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {slower * LIMIT_SECONDS:g} s")

    before = _peak_bytes()
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, slower * LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (growth := _peak_bytes() - before) > MOST_GROWTH:
        raise TooLarge(f"memory grew by {growth / 2**20:.0f} MiB")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024


def mutate(content: bytes, most: int) -> bytes:
    """Change an input as libFuzzer does. `atheris.Mutate` of 3.0.0 says that Fuzz was not called, when it was."""
    from atheris.core_with_libfuzzer import Mutate

    return Mutate(content, most)


def main() -> None:
    """Fuzz one target for some seconds."""
    import atheris

    with atheris.instrument_imports(include=["unisono.data"]):
        import fuzz_run
    from fuzz_inputs import list_words, make_mutator, write_seeds

    target, folder, seconds, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    corpus, words = folder / "corpus", folder / "words"
    if not corpus.exists():
        write_seeds(target, corpus)
    words.write_text("\n".join(["# may not be empty", *list_words(target)]))
    findings = Findings(folder)

    def try_input(content: bytes) -> None:
        refused = False
        try:
            with limits(SLOWER):
                refused = fuzz_run.run_check(target, content)
        except (Exception, TooSlow) as error:  # noqa: BLE001 - whatever it is, it is a finding
            findings.add(content, error)
        findings.count(refused=refused)

    options = [f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={MOST_BYTES}", f"-dict={words}"]
    options += [
        f"-timeout={WALL_SECONDS}",
        "-rss_limit_mb=4000",
        f"-artifact_prefix={folder}/ended-",
        "-len_control=20",
    ]
    atheris.Setup(["fuzz", str(corpus), *options], try_input, custom_mutator=make_mutator(target, mutate))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
