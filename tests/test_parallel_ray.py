"""The engine "ray", on real Ray clusters of this host: the results are those of local processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from unisono import parallel
from unisono.errors import ParallelError, TaskError, WorkerError
from unisono.parallel import connection as connection_module

TOKEN = "0123456789abcdef" * 4
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": TOKEN,
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONHASHSEED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of two CPUs with a small store, to which this process is connected; its address."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'unisono[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        import ray

        connection_module.connection._present(dict(SETTINGS))
        ray.init(
            address="local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, logging_level="ERROR",
            log_to_driver=False,
        )  # fmt: skip
        patch.setattr(connection_module.connection, "seeded", True)  # each actor starts a second sooner
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors need not import this file, and torch
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()
    connection_module.connection._present({"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE")})


def draw(item: Any) -> tuple[Any, float, float, float, int]:
    return item, random.random(), np.random.random(), torch.rand(()).item(), parallel.key()


@pytest.mark.slow
def test_results_are_those_of_local_processes(cluster: str) -> None:
    expected = list(parallel.map(draw, range(40), workers=2))
    assert list(parallel.map(draw, range(40), workers=2, engine="ray")) == expected


@pytest.mark.slow
def test_sums_have_the_bits_of_the_tree(cluster: str) -> None:
    def bracket(a: str, b: str) -> str:
        return f"({a}{b})"

    assert parallel.map_reduce(str, bracket, range(7), workers=2, engine="ray") == "(((01)(23))((45)6))"


class Mine:
    """A class of this script, which no other process can import by the name it has here."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mine) and self.value == other.value


Mine.__module__ = "__main__"


@pytest.mark.slow
def test_values_come_back_equal_and_are_the_callers_own(cluster: str) -> None:
    items: list[Any] = [
        np.arange(100_000.0),
        np.arange(10)[::2],
        pa.table({"a": list(range(50_000)), "b": ["x"] * 50_000}),
        pa.table({"a": list(range(50_000))}).slice(5, 7),
        torch.arange(50_000).to(torch.bfloat16),
        torch.rand(3, requires_grad=True),
        {"a": [None, "é", b"\0"]},
        Mine(3),
    ]

    def touch(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            item += 1
        return item

    back = list(parallel.map(touch, items, workers=1, engine="ray"))
    np.testing.assert_array_equal(back[0], items[0] + 1)
    np.testing.assert_array_equal(back[1], items[1] + 1)
    assert back[2].equals(items[2]) and back[3].equals(items[3])
    assert torch.equal(back[4], items[4]) and torch.equal(back[5], items[5]) and back[5].requires_grad
    assert back[6:] == items[6:]
    back[0][:] = 0  # not in Ray's store, which is read-only


@pytest.mark.slow
def test_more_passes_through_than_the_store_holds(cluster: str) -> None:
    """200 MB each way, kept by the caller, through a store of 100 MB."""
    items = (np.full(1 << 19, number) for number in range(50))
    kept = list(parallel.map(lambda item: item + 1, items, workers=1, engine="ray"))
    assert all((array == number + 1).all() for number, array in enumerate(kept))


@pytest.mark.slow
def test_batches_cannot_be_seen(cluster: str) -> None:
    kept: dict[str, np.ndarray] = {}
    shared = [0]

    def task(item: tuple[int, list[int]]) -> tuple[np.ndarray, int]:
        buffer = kept.setdefault("buffer", np.zeros(1))
        buffer[0] = item[0]
        item[1][0] += 1
        return buffer, item[1][0]

    back = list(parallel.map(task, ((number, shared) for number in range(300)), workers=1, engine="ray"))
    assert [(array[0], count) for array, count in back] == [(number, 1) for number in range(300)]


@pytest.mark.slow
def test_sets_have_one_order(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each Python process orders texts in sets by a seed of its own, unless it is given one: so each actor is."""
    monkeypatch.setattr(connection_module.connection, "seeded", False)
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    assert set(parallel.map(lambda item: os.environ["PYTHONHASHSEED"], range(9), workers=1, engine="ray")) == {"5"}


@pytest.mark.slow
def test_failures_are_told_as_by_local_processes(cluster: str) -> None:
    def task(item: int) -> Any:
        if item == 3:
            raise ValueError("not 3")
        return item

    quarantine: list[parallel.Failure] = []
    assert len(list(parallel.map(task, range(9), workers=1, engine="ray", quarantine=quarantine))) == 8
    assert (quarantine[0].number, quarantine[0].error) == (3, "ValueError: not 3")
    assert isinstance(quarantine[0].exception, ValueError)
    with pytest.raises(TaskError, match="combine failed: ZeroDivisionError"):
        parallel.map_reduce(abs, lambda a, b: 1 // 0, range(9), workers=1, engine="ray")


def count_file(path: Path) -> int:
    with path.open("ab") as file:
        file.write(b"x")
    return path.stat().st_size


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced(cluster: str, tmp_path: Path) -> None:
    def task(item: int) -> float:
        if item == 7 and count_file(tmp_path / "tries") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return random.random()

    expected = list(parallel.map(lambda item: random.random(), range(20), workers=2))
    assert list(parallel.map(task, range(20), workers=1, engine="ray")) == expected


@pytest.mark.slow
def test_a_task_that_ends_its_worker_each_time_is_named(cluster: str) -> None:
    def task(item: int) -> int:
        if item == 2:
            os._exit(3)
        return item

    quarantine: list[parallel.Failure] = []
    results = list(parallel.map(task, range(6), workers=1, engine="ray", quarantine=quarantine))
    assert results == [0, 1, 3, 4, 5]
    assert [failure.number for failure in quarantine] == [2] and "3 times" in quarantine[0].error


@pytest.mark.slow
def test_a_task_that_takes_too_long_is_ended(cluster: str) -> None:
    def task(item: int) -> tuple[int, int]:
        if item == 3:
            time.sleep(600)
        return item, parallel.key()

    quarantine: list[parallel.Failure] = []
    results = list(parallel.map(task, range(6), workers=1, engine="ray", timeout_seconds=2.0, quarantine=quarantine))
    assert results == [(number, key) for number, key in results if number != 3] and len(results) == 5
    assert quarantine[0].error == "it took longer than timeout_seconds"


@pytest.mark.slow
def test_closing_the_results_ends_the_actors_and_leaves_the_users_connection(cluster: str) -> None:
    import ray

    results = parallel.map(lambda item: os.getpid(), iter(int, 1), workers=1, engine="ray")
    process = next(results)
    results.close()
    deadline = time.monotonic() + 120
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{process}").exists()
    assert ray.is_initialized()


@pytest.mark.slow
def test_more_workers_than_cpus_wait_for_their_turn(cluster: str) -> None:
    assert list(parallel.map(abs, range(20), workers=4, engine="ray")) == list(range(20))


@pytest.mark.slow
def test_auto_is_one_worker_per_cpu_of_the_cluster(cluster: str) -> None:
    assert parallel.Ray().count("auto") == 2
    assert parallel.Ray().count(5) == 5


@pytest.mark.slow
def test_modules_of_the_caller_are_found(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beside a script, or on a path of its own, as far as the host has them."""
    (tmp_path / "module_of_the_caller.py").write_text("def double(item):\n    return 2 * item\n")
    monkeypatch.syspath_prepend(tmp_path)
    from module_of_the_caller import double

    assert list(parallel.map(double, range(3), workers=1, engine="ray")) == [0, 2, 4]


@pytest.mark.slow
def test_functions_that_cannot_be_sent_say_so(cluster: str) -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(ParallelError, match="the function cannot be sent to a Ray cluster"):
        list(parallel.map(lambda item: lock, range(2), workers=1, engine="ray"))


@pytest.mark.slow
def test_actors_that_cannot_live_end_the_call(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that cannot be put together at the other end: its module is not there, say."""
    from unisono.parallel import ray_actors as cluster_module

    class Absent:
        def __call__(self, item: int) -> int:
            return item

        def __reduce__(self) -> Any:
            return exec, ("import a_module_that_is_not_there",)

    monkeypatch.setattr(cluster_module, "FRUITLESS", 2)
    with pytest.raises(WorkerError, match="2 Ray actors in a row ended before they were ready"):
        list(parallel.map(Absent(), range(2), workers=1, engine="ray"))


SCRIPT = """
import sys
from unisono import parallel
engine = parallel.Ray(address=sys.argv[1] or None, token=sys.argv[2] or None)
assert "ray" not in sys.modules
results = list(parallel.map(lambda item: (item + 1, tuple(set("abcdef"))), range(3), workers=2, engine=engine))
print([number for number, _ in results], len({order for _, order in results}))
import ray
assert not ray.is_initialized()
"""


def run_script(address: str, token: str, **settings: str) -> subprocess.CompletedProcess[str]:
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, address, token],
        capture_output=True, text=True, timeout=180, env=cleared | {"RAY_USAGE_STATS_ENABLED": "0"} | settings,
    )  # fmt: skip


@pytest.mark.slow
def test_an_existing_cluster_is_used_by_its_address_and_token(cluster: str) -> None:
    done = run_script(cluster, TOKEN)
    assert done.stdout == "[1, 2, 3] 1\n", done.stderr


@pytest.mark.slow
def test_a_wrong_token_is_refused(cluster: str) -> None:
    done = run_script(cluster, "f" * 64, RAY_NUM_REDIS_GET_RETRIES="1")
    assert done.returncode != 0 and "ParallelError" in done.stderr and "token" in done.stderr


@pytest.mark.slow
def test_without_a_cluster_one_is_started_with_authentication_and_without_telemetry(tmp_path: Path) -> None:
    """At home nothing is written: the token is in the environment of the cluster's processes alone."""
    pytest.importorskip("ray")
    done = run_script("", "", HOME=str(tmp_path))
    assert done.stdout == "[1, 2, 3] 1\n", done.stderr
    assert not (tmp_path / ".ray").exists()


def test_importing_does_not_import_ray() -> None:
    asked = "import sys; from unisono import parallel; parallel.Ray; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("arguments", [{"address": 3}, {"address": ""}, {"token": b"a"}])
def test_arguments_that_cannot_be_used_say_what_can(arguments: dict[str, Any]) -> None:
    with pytest.raises(ParallelError, match="allowed are texts, or None"):
        parallel.Ray(**arguments)


def test_an_old_ray_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__="2.53.1"))
    with pytest.raises(ParallelError, match=r"Ray 2\.53\.1 is installed; allowed are versions from 2\.54"):
        list(parallel.map(abs, [1], workers=1, engine="ray"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ParallelError, match=r"pip install 'unisono\[ray\]'"):
        list(parallel.map(abs, [1], workers=1, engine="ray"))
