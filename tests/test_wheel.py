"""What users install: built without a compiler, complete, and able to train from an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from toy import make_toy

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as build; print(build.build_sdist('dist')); print(build.build_wheel('dist'))"


def run(arguments: list[object], folder: Path, **variables: str) -> str:
    process = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=os.environ | variables, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def copy_source(folder: Path) -> None:
    folder.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))


@pytest.mark.slow
def test_a_wheel_without_a_compiler_trains(tmp_path: Path) -> None:
    """Fails if an extension were required, or a file is not declared: the page's template, types, the kernels' header."""
    source, installed, empty = tmp_path / "source", tmp_path / "installed", tmp_path / "empty"
    copy_source(source)
    run(["-c", BUILD], source, CC="/bin/false")
    (sdist,), (wheel,) = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {path.name for path in (ROOT / "src/unisono/kernels").iterdir() if path.suffix in (".c", ".h", ".pyi")}
    assert {f"src/unisono/kernels/{name}" for name in kernels} <= sources
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(installed)
    assert {"unisono/py.typed", "unisono/data/screening/report_page.html", "unisono/kernels/_update.pyi"} <= names
    assert not [name for name in names if name.endswith((".so", ".c", ".h"))]
    empty.mkdir()
    make_toy(empty)
    place = {"PYTHONPATH": str(installed)}
    assert str(installed) in run(["-c", "import unisono.kernels; print(unisono.kernels.__file__)"], empty, **place)
    run(["-m", "unisono", "train", "toy.toml", "--workers", 2, "--run-folder", "run"], empty, **place)
    assert json.loads((empty / "run" / "summary.json").read_text())["test"]["accuracy"] > 0.9
    assert len(list((empty / "datasets").glob("*/report.html"))) == 1
