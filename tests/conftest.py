"""What tests share: one thread each, a worker's state for those that ask, trained runs, the command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from toy import Command, make_toy
from unisono.engine import numerics
from unisono.exchange.protocol import Exchange
from unisono.runtime.launchers.rank_assignment import RankAssignment

hypothesis.settings.register_profile("quick", deadline=None, max_examples=20)  # no test may fail by being slow
hypothesis.settings.register_profile("full", deadline=None, max_examples=100)  # pytest --hypothesis-profile=full
hypothesis.settings.load_profile("quick")
torch.set_num_threads(1)  # here, before any test module computes something; it also keeps forking safe

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background jobs have it, and all that they start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def settled() -> Iterator[None]:
    """The state of a worker; not for all tests, since hypothesis refuses to draw floats under flush-to-zero."""
    numerics.settle(threads=1, device=torch.device("cpu"))
    yield
    torch.set_flush_denormal(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def my_rank() -> Iterator[Callable[[], int]]:
    """Tells whoever asks, in a process forked later, its rank among the workers: for a model that must not know it."""
    found = [0]

    def join(self: RankAssignment, device: torch.device) -> Exchange:
        found[0] = self.rank
        return honest(self, device)

    honest = RankAssignment.join
    with pytest.MonkeyPatch.context() as patch:  # its own: a test may undo its patches halfway
        patch.setattr(RankAssignment, "join", join)
        yield lambda: found[0]


@pytest.fixture(scope="session")
def warm() -> None:
    """Import once what every forked worker would import for itself: it takes longer than training the toy."""
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import torch._inductor.config

    import unisono.api.application
    import unisono.api.verification
    import unisono.data.prepare
    import unisono.tasks.text.classification

    numerics.battery(torch.device("cpu"))
    assert matplotlib and unisono


@pytest.fixture(scope="session")
def trained(warm: None, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run folders of the toy, trained by 1, 2 and 3 workers."""
    import unisono

    folder = tmp_path_factory.mktemp("trained")
    recipe = make_toy(folder)
    return {
        workers: unisono.train(recipe, workers=workers, run=folder / f"run-{workers}", quiet=True).folder
        for workers in (1, 2, 3)
    }


@pytest.fixture
def command(warm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Call the command line in this process, within tmp_path; returns exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        from unisono import cli
        from unisono.runtime.signals import ASKING

        monkeypatch.setattr(sys, "argv", ["unisono", *map(str, arguments)])
        capfd.readouterr()
        handlers = {signum: signal.getsignal(signum) for signum in ASKING}
        with pytest.raises(SystemExit) as end:
            cli.main()
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        code = end.value.code
        out, err = capfd.readouterr()
        return (code if isinstance(code, int) else int(code is not None)), out, err

    monkeypatch.chdir(tmp_path)
    return call
