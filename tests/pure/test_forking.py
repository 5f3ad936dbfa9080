"""Cores that a process may use, and children of a process that multiprocessing forbids them."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from unisono.processes.forking import count_cores, fork

CORES = len(os.sched_getaffinity(0))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, 1),  # of the group around it
        ("0::/elsewhere", {"cpu.max": "100000 100000"}, 1),  # a container sees its own group as the root
        ("0::/", {"cpu.max": "100100 100000"}, 2),  # rounded up
        ("0::/", {"cpu.max": "max 100000"}, CORES),
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("4:cpuacct,cpu:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CORES),
        ("3:cpuset:/\n0::/", {}, CORES),
    ],
)
def test_a_quota_counts(tmp_path: Path, membership: str, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        write(tmp_path / "groups" / name, text + "\n")
    write(tmp_path / "membership", membership + "\n")
    assert count_cores(tmp_path / "groups", tmp_path / "membership") == min(cores, CORES)


def test_without_proc_the_affinity_counts(tmp_path: Path) -> None:
    assert count_cores(tmp_path, tmp_path / "none") == CORES


def test_a_daemonic_process_may_fork() -> None:
    """And is daemonic again afterwards: the interpreter ends such processes with their parent."""
    told = multiprocessing.get_context("fork").SimpleQueue()

    def daemon() -> None:
        child = fork(lambda: told.put(multiprocessing.current_process().daemon), (), "child")
        child.join()
        told.put((child.exitcode, multiprocessing.current_process().daemon))

    process = multiprocessing.get_context("fork").Process(target=daemon, daemon=True)
    process.start()
    process.join()
    assert (told.get(), told.get()) == (False, (0, True))
