"""What starts workers makes no difference to the bits; and whoever lends a process gets it back as it was."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import unisono
from learned import SETTINGS, STEPS, Dropped, Kept, make_columns
from toy import make_toy, run_python
from unisono.engine import numerics
from unisono.engine.caller_state import preserved
from unisono.errors import Interrupted, Preempted, RecipeError, RunFolderError
from unisono.exchange.solo import Solo
from unisono.processes.forking import fork
from unisono.runtime.launchers import launcher as launchers
from unisono.runtime.launchers.in_process import FolderHold, InProcess
from unisono.runtime.launchers.launcher import Training, choose, count_workers
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.launchers.spawn import find_unsendable
from unisono.runtime.supervisor_client import UnsupervisedClient
from unisono.runtime.worker import Act, Stop, memory_kept
from unisono.storage.run_lock import RunLock, ask_for_workers
from unisono.tracking import ledger

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "draw_curves", lambda lines, path: None)


@pytest.fixture
def unforked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be forked."""

    def refuse() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", refuse)


def train(folder: Path, task: unisono.Task | None = None, **options: Any) -> unisono.Trained:
    return unisono.train(task or Dropped(), make_columns(), run=folder, quiet=True, **{**SETTINGS, **options})


def hashes(run: unisono.Trained) -> tuple[str, str]:
    return run.weights_sha256, str(run.summary["optimizer_sha256"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, warm: None) -> unisono.Trained:
    """As two forked workers train it, with a checkpoint after every third step."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    return train(folder, workers=2, launcher="fork", checkpoint={"every_steps": 3, "keep": 9})


def read_checkpoints(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoints"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- one worker in this process


def test_in_process_has_the_same_bits_and_checkpoints(
    tmp_path: Path, expected: unisono.Trained, unforked: None
) -> None:
    run = train(tmp_path / "run", workers=1, profile=True, checkpoint={"every_steps": 3, "keep": 9})
    assert hashes(run) == hashes(expected)
    assert read_checkpoints(run.folder) == read_checkpoints(expected.folder) != {}
    assert (run.folder / "profile.md").exists() and not (run.folder / ".running").exists()
    assert run.summary["workers"] == 1 and (run.folder / "model" / "model.safetensors").exists()


def test_a_recipe_in_process(tmp_path: Path, trained: dict[int, Path]) -> None:
    """`trained` has one worker in this process, and two and three forked ones."""
    sums = {json.loads((run / "summary.json").read_text())["weights_sha256"] for run in trained.values()}
    assert len(sums) == 1
    report = unisono.evaluate(trained[1], workers=1, quiet=True)
    assert report == unisono.evaluate(trained[1], workers=2, quiet=True)


def test_evaluate_and_predict_in_process(trained: dict[int, Path], tmp_path: Path, unforked: None) -> None:
    assert unisono.evaluate(trained[2], workers=1, quiet=True)["samples"] > 0
    assert unisono.predict(trained[2], _texts(tmp_path), tmp_path / "out.csv", workers=1) == 2


def _texts(folder: Path) -> Path:
    path = folder / "in.csv"
    path.write_text("text\ngoal match\nsoup bread\n", encoding="utf-8")
    return path


def test_a_debugger_sees_the_task(tmp_path: Path, expected: unisono.Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """A breakpoint stops in this process and thread; so does a trace function, as pdb sets it."""
    stops: list[tuple[int, threading.Thread]] = []
    traced: set[str] = set()

    def trace(frame: FrameType, event: str, argument: object) -> None:
        traced.add(frame.f_code.co_name)

    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append((os.getpid(), threading.current_thread())))
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run = train(tmp_path / "run", Dropped(on_loss=breakpoint), workers=1)
    finally:
        sys.settrace(before)
    assert set(stops) == {(os.getpid(), threading.current_thread())} and len(stops) >= STEPS * 6
    assert {"build", "loss"} <= traced
    assert hashes(run) == hashes(expected)


def test_what_a_task_raises_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        train(tmp_path / "run", Dropped(on_loss=lambda: 1 / 0), workers=1)
    assert any(entry.name == "loss" for entry in raised.traceback)  # for a debugger that looks afterwards


@pytest.mark.parametrize("workers", [1, 2])
def test_in_a_thread(tmp_path: Path, expected: unisono.Trained, workers: int) -> None:
    """Signals stay the main thread's."""
    found: list[unisono.Trained] = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=lambda: found.append(train(tmp_path / "run", workers=workers)))
    thread.start()
    thread.join()
    assert hashes(found[0]) == hashes(expected)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize("workers", [1, 2])
def test_in_a_daemonic_process(tmp_path: Path, expected: unisono.Trained, workers: int) -> None:
    import multiprocessing

    def main() -> None:
        multiprocessing.current_process().daemon = True  # as multiprocessing.Pool has its workers
        (tmp_path / "hashes.json").write_text(json.dumps(hashes(train(tmp_path / "run", workers=workers))))

    process = fork(main, (), "daemonic")
    process.join()
    assert process.exitcode == 0
    assert tuple(json.loads((tmp_path / "hashes.json").read_text())) == hashes(expected)


def test_the_folder_is_held_and_a_resize_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisono.storage.run_lock.DYING_SECONDS", 0.0)
    monkeypatch.setattr("unisono.runtime.launchers.in_process.LOOK_SECONDS", 0.0)
    run, answers = tmp_path / "run", []

    def ask() -> None:
        try:
            ask_for_workers(run, 2)
        except RunFolderError as refused:
            answers.append(str(refused))

    asking = threading.Thread(target=ask)

    def disturb() -> None:
        if (run / ".running").exists() and not answers:
            with pytest.raises(RunFolderError) as refused:
                RunLock(run)
            answers.append(str(refused.value))
            asking.start()
            while not any(run.glob(".wanted-*")):
                assert asking.is_alive()
                time.sleep(0.01)

    train(run, Dropped(on_loss=disturb), workers=1)
    asking.join()
    assert "is being trained by process" in answers[0]
    assert "it is trained in the process of its caller, which is its only worker" in answers[1]


# ---- signals


class Pressed:
    """Sends this process signals at the losses of these numbers."""

    def __init__(self, **when: int) -> None:
        self._when = {number: getattr(signal, name) for name, number in when.items()}
        self._count = 0

    def __call__(self) -> None:
        self._count += 1
        if self._count in self._when:
            os.kill(os.getpid(), self._when[self._count])


@pytest.mark.parametrize(("name", "kind", "code"), [("SIGINT", Interrupted, 130), ("SIGTERM", Preempted, 75)])
def test_a_signal_stops_after_the_step_and_it_goes_on(
    tmp_path: Path, expected: unisono.Trained, name: str, kind: type[Interrupted], code: int
) -> None:
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Interrupted, match=r"stopped after step \d+ of 8, which is saved") as stopped:
        train(tmp_path / "run", Dropped(on_loss=Pressed(**{name: 15})), workers=1)
    assert type(stopped.value) is kind and stopped.value.exit_code == code
    assert signal.getsignal(getattr(signal, name)) == before
    assert hashes(train(tmp_path / "run", workers=2, resume=True)) == hashes(expected)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    press = Pressed(SIGTERM=15, SIGINT=16)
    with pytest.raises(Preempted, match="stopped at once"):
        train(tmp_path / "run", Dropped(on_loss=press), workers=1)
    assert press._count == 16


def test_an_interrupt_before_the_first_step_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="before the first step"):
        train(tmp_path / "run", Dropped(on_loss=Pressed(SIGINT=1)), workers=1)  # the probe
    assert not (tmp_path / "run").exists()


# ---- the caller's process


def describe_process() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "flushes": bool((torch.full((1,), 1e-38) * 1e-3 == 0).all()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "benchmark": torch.backends.cudnn.benchmark,
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": np.random.get_state()[1].tobytes(),
        "python": random.getstate(),
        "handlers": [
            signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
        ],
    }


def test_the_caller_gets_its_process_back(
    tmp_path: Path, expected: unisono.Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it was in does not reach the bits."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with preserved(), torch.no_grad():
        torch.set_num_threads(3)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.set_autocast_enabled("cpu", True)
        torch.manual_seed(11)
        before = describe_process()
        assert before["threads"] == 3 and before["autocast"] and not before["flushes"]
        run = train(tmp_path / "run", workers=1)
        assert describe_process() == before
        torch.set_default_dtype(torch.float64)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "failed", Dropped(on_loss=lambda: 1 / 0), workers=1)
        assert torch.get_default_dtype() == torch.float64 and torch.get_num_threads() == 3
    assert hashes(run) == hashes(expected)


def test_several_threads_flush_to_zero_within_and_not_after() -> None:
    """Threads that were at work before keep what they were started with, unless they are started anew."""

    def count_denormals() -> int:
        return int((torch.full((1 << 20,), 1e-38) * 1e-3 != 0).sum())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert count_denormals() == 1 << 20
        with preserved():
            numerics.settle(threads=2, device=torch.device("cpu"))
            assert count_denormals() == 0
        assert count_denormals() == 1 << 20
    finally:
        torch.set_num_threads(before)


def test_freed_memory_is_kept_within_and_returned_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, since glibc's settings stay. 256 MB blocks, which soon fault no more within."""

    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)

    def count_faults(times: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.ones(1 << 26)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def main() -> None:
        with memory_kept():
            count_faults(4)  # until there is a place where an aligned block fits
            kept = count_faults(4)
        os._exit(int(4 * kept >= count_faults(4)))

    process = fork(main, (), "memory")
    process.join()
    assert process.exitcode == 0


def test_a_module_that_a_task_keeps_is_given_back(tmp_path: Path) -> None:
    """So a second training, on any number of workers, begins from the same weights."""
    task = Kept()
    task.module.eval()
    before = {name: (value.clone(), value.data_ptr()) for name, value in task.module.state_dict().items()}
    runs = [train(tmp_path / str(number), task, workers=workers) for number, workers in enumerate((1, 2, 1))]
    assert len({hashes(run) for run in runs}) == 1
    for name, value in task.module.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.data_ptr() == before[name][1]
    assert not task.module.training and all(parameter.grad is None for parameter in task.module.parameters())


# ---- the choice


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def chosen(workers: int, device: str = "auto", **options: Any) -> tuple[str, int]:
        found, count = choose("auto", workers=workers, microbatches=8, device=device, **options)
        return type(found).__name__, count

    assert (chosen(1), chosen(1, supervised=True), chosen(2)) == (("InProcess", 1), ("Fork", 1), ("Fork", 2))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert (chosen(1), chosen(2), chosen(2, "cpu")) == (("InProcess", 1), ("Spawn", 2), ("Fork", 2))
    for name, value in {"RANK": 1, "WORLD_SIZE": 3, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    assert chosen(1) == ("Torchrun", 3)


def test_what_cannot_be_launched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"launcher 'rsh': allowed are auto, in_process, fork, spawn, torchrun"):
        train(tmp_path / "run", launcher="rsh")
    with pytest.raises(RecipeError, match='"in_process", workers = 2: this process is one worker'):
        train(tmp_path / "run", workers=2, launcher="in_process")
    with pytest.raises(RecipeError, match="this process is no worker: torchrun has not started it"):
        train(tmp_path / "run", launcher="torchrun")
    with pytest.raises(RecipeError, match="faults are injected into workers under a supervisor"):
        train(tmp_path / "run", workers=1, launcher="in_process", faults=["kill(worker=0, step=1, phase=update)"])
    assert not (tmp_path / "run").exists()


def test_one_worker_has_a_supervisor_where_one_is_asked_for(tmp_path: Path, expected: unisono.Trained) -> None:
    run = train(tmp_path / "run", workers=1, faults=["kill(worker=0, step=3, phase=update)"])
    assert run.summary["recoveries"] == 1 and hashes(run) == hashes(expected)
    me: list[int] = []
    train(tmp_path / "other", Dropped(on_loss=lambda: me.append(1)), workers=1, recovery={"restarts": 2}, max_steps=1)
    assert me == []  # another process has done it


# ---- a launcher of another package


class Threaded:
    """Has one worker in a thread of its own; a stand-in for one that starts workers elsewhere."""

    threads: tuple[str, ...] = ()

    def count(self, wanted: str | int, microbatches: int, device: str) -> int:
        return 1

    def train(self, training: Training) -> None:
        def act(assignment: RankAssignment, exchange: Any, device: torch.device, stop: Callable[[], int]) -> None:
            client = UnsupervisedClient([training.open_observer(False)], stop)
            training.runner.train(exchange, device, client, local_rank=0, local_workers=1, again=False)
            client.close()

        self.run(act, workers=1, threads=training.recipe.train.threads, device="cpu")

    def run(self, act: Act, *, workers: int, threads: int, device: str) -> bool:
        def main() -> None:
            Threaded.threads += (threading.current_thread().name,)
            place = RankAssignment(rank=0, workers=1, local_rank=0, local_workers=1)
            with preserved():
                numerics.settle(threads=threads, device=torch.device("cpu"))
                act(place, Solo(), torch.device("cpu"), Stop())

        thread = threading.Thread(target=main, name="elsewhere")
        thread.start()
        thread.join()
        return True


def test_a_package_can_bring_a_launcher(
    tmp_path: Path, expected: unisono.Trained, trained: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = EntryPoints([EntryPoint("threaded", "test_launchers:Threaded", launchers.ENTRY_POINTS)])
    monkeypatch.setattr(launchers, "entry_points", lambda group: declared.select(group=group))
    monkeypatch.setitem(sys.modules, "test_launchers", sys.modules[__name__])
    monkeypatch.setattr(Threaded, "threads", ())
    assert hashes(train(tmp_path / "run", launcher="threaded")) == hashes(expected)
    unisono.evaluate(trained[1], quiet=True, launcher="threaded")
    assert Threaded.threads == ("elsewhere", "elsewhere")
    assert hashes(train(tmp_path / "other", launcher=Threaded())) == hashes(expected)
    with pytest.raises(RecipeError, match="torchrun, threaded"):
        train(tmp_path / "none", launcher="rsh")


# ---- spawned workers


def test_spawned_workers_have_the_same_bits_and_are_replaced(tmp_path: Path, expected: unisono.Trained) -> None:
    kill = ["kill(worker=1, step=4, phase=update)"]
    run = train(tmp_path / "run", workers=2, launcher="spawn", faults=kill)
    assert hashes(run) == hashes(expected) and run.summary["recoveries"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_spawned_workers(tmp_path: Path, expected: unisono.Trained, workers: int) -> None:
    run = train(tmp_path / "run", workers=workers, launcher="spawn", checkpoint={"every_steps": 3, "keep": 9})
    assert hashes(run) == hashes(expected)
    assert read_checkpoints(run.folder) == read_checkpoints(expected.folder)


@pytest.mark.slow
def test_a_recipe_in_spawned_workers(tmp_path: Path, trained: dict[int, Path]) -> None:
    run = unisono.train(make_toy(tmp_path), workers=2, launcher="spawn", run=tmp_path / "run", quiet=True)
    assert run.weights_sha256 == json.loads((trained[1] / "summary.json").read_text())["weights_sha256"]
    report = unisono.evaluate(run.folder, workers=2, launcher="spawn", quiet=True)
    assert report == unisono.evaluate(run.folder, workers=1, quiet=True)


SCRIPT = """
import sys
import numpy as np
sys.path.insert(0, {tests!r})
import unisono
from learned import Dropped, SETTINGS, make_columns

class Mine(Dropped):
    pass

def main():
    run = unisono.train(Mine(), make_columns(), workers=2, launcher="spawn", quiet=True, run="run", **SETTINGS)
    print(run.weights_sha256)

{guard}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "sign"),
    [("if __name__ == '__main__':\n    main()", ""), ("main()", "Put what starts it under `if __name__")],
)
def test_a_script_whose_task_is_its_own(tmp_path: Path, expected: unisono.Trained, guard: str, sign: str) -> None:
    """A fresh interpreter imports the script; one without a guard would begin again and again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), guard=guard), encoding="utf-8")
    ended = run_python([script], tmp_path)
    assert (sign in ended.stderr) if sign else ended.stdout.strip() == expected.weights_sha256, ended.stderr
    assert bool(ended.returncode) == bool(sign)


def test_what_cannot_be_sent_is_named(tmp_path: Path) -> None:
    class Local(Dropped):
        pass

    with pytest.raises(
        RecipeError, match=r"task\.on_loss cannot be sent to a fresh interpreter: .*lambda(.|\n)*Move it"
    ):
        train(tmp_path / "run", Dropped(on_loss=lambda: None), workers=2, launcher="spawn")
    with pytest.raises(RecipeError, match=r'"spawn": task cannot be sent'):
        train(tmp_path / "run", Local(), workers=2, launcher="spawn")
    assert find_unsendable({"a": [1, threading.Lock()]}) == "'a'.1"
    assert not (tmp_path / "run").exists()


def test_an_interactive_session_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = type(sys)("__main__")
    session.Mine = type("Mine", (Dropped,), {"__module__": "__main__"})
    session.__spec__ = None
    monkeypatch.setitem(sys.modules, "__main__", session)
    with pytest.raises(RecipeError, match="interactive session"):
        train(tmp_path / "run", session.Mine(), workers=2, launcher="spawn")


# ---- a process group that exists already


def in_group(workers: int, main: Callable[[int], None]) -> None:
    """Call `main(rank)` in so many processes, in which torch.distributed is initialised."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]

    def join(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", port, workers, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
        main(rank)

    members = [fork(join, (rank,), f"member {rank}") for rank in range(workers)]
    for member in members:
        member.join()
    assert [member.exitcode for member in members] == [0] * workers


def test_in_a_process_group_of_the_caller(tmp_path: Path, expected: unisono.Trained) -> None:
    """The workers are its members; it is left as it was, for the caller to go on with."""

    def main(rank: int) -> None:
        found = [hashes(train(tmp_path / str(number))) for number in range(2)]
        total = torch.ones(1)
        dist.all_reduce(total)
        if rank == 0:
            (tmp_path / "found.json").write_text(json.dumps([*found, total.item()]))

    in_group(2, main)
    one, two, total = json.loads((tmp_path / "found.json").read_text())
    assert tuple(one) == tuple(two) == hashes(expected) and total == 2.0


def test_a_folder_at_work_is_refused_to_workers_of_another_program(tmp_path: Path, expected: unisono.Trained) -> None:
    """To all of them, by name; and while they have it, others are refused."""
    (tmp_path / "run").mkdir()

    def main(rank: int) -> None:
        refused = f"is being trained by process {os.getppid()} on {socket.gethostname()}"
        with pytest.raises(RunFolderError, match=refused):
            train(tmp_path / "run", resume="auto")
        dist.barrier()
        if rank == 0:
            (tmp_path / "refused").touch()
            wait_for(tmp_path / "free")
        dist.barrier()
        run = train(tmp_path / "run", Dropped(on_loss=lambda: look(rank)), resume="auto")
        assert hashes(run) == hashes(expected)

    def look(rank: int) -> None:
        if rank == 1 and not (tmp_path / "looked").exists():
            with pytest.raises(RunFolderError, match="is being trained by process"):
                RunLock(tmp_path / "run")
            (tmp_path / "looked").touch()

    held = RunLock(tmp_path / "run")
    held.tell(workers=1)

    def free() -> None:
        wait_for(tmp_path / "refused")
        held.release()
        (tmp_path / "free").touch()

    thread = threading.Thread(target=free)
    thread.start()
    try:
        in_group(2, main)
    finally:
        (tmp_path / "refused").touch()
        thread.join()
    assert (tmp_path / "looked").exists() and not (tmp_path / "run" / ".running").exists()


def test_workers_of_another_program_cannot_be_resized(tmp_path: Path) -> None:
    hold = FolderHold(tmp_path, 8, workers=2, refusal="another program has started its workers")
    hold.take()
    refused: list[str] = []

    def ask() -> None:
        with pytest.raises(RunFolderError) as raised:
            ask_for_workers(tmp_path, 3)
        refused.append(str(raised.value))

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive():
        hold.look()
    hold.close()
    assert "another program has started its workers" in refused[0]


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_auto_counts_what_is_there() -> None:
    assert count_workers("auto", 3, "cpu") <= 3 and count_workers(5, 3, "cpu") == 5
    assert InProcess().count("auto", 8, "cpu") == 1


def test_trainings_in_two_threads_of_one_process_wait_for_each_other(tmp_path: Path) -> None:
    """Generators and modes are the process's: without the lock most of these runs have other weights."""
    found: dict[str, str] = {}

    def run(name: str) -> None:
        trained = unisono.train(
            Noisy(), {"x": torch.arange(64.0)[:, None] / 64}, workers=1, run=tmp_path / name, quiet=True, epochs=2,
            samples_per_step=8, microbatches=4,
        )  # fmt: skip
        found[name] = trained.weights_sha256

    threads = [threading.Thread(target=run, args=(f"run-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found.values())) == 1


class Noisy(unisono.Task):
    """Draws from the global generator in each microbatch, and gives other threads time to do so."""

    def build(self) -> nn.Module:
        return nn.Linear(1, 1)

    def loss(self, module: nn.Module, microbatch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        time.sleep(1e-3)
        noise = torch.randn(len(microbatch["x"]), 1)
        return ((module(microbatch["x"]) - noise) ** 2).sum(), len(noise)

    def measure(self, module: nn.Module, microbatch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"loss": (module(microbatch["x"]) ** 2)[:, 0]}


def test_a_task_that_trains_within_its_own_training_is_refused(tmp_path: Path) -> None:
    class Nested(Noisy):
        def loss(self, module: nn.Module, microbatch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
            unisono.train(Noisy(), {"x": torch.ones(8, 1)}, workers=1, run=tmp_path / "inner", quiet=True)
            return super().loss(module, microbatch)

    with pytest.raises(unisono.RecipeError, match="calls unisono again"):
        unisono.train(Nested(), {"x": torch.ones(8, 1)}, workers=1, run=tmp_path / "outer", quiet=True)
