"""docs/parallel.md, README.md and the example: what they show is what happens."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def read_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def run_blocks(blocks: list[str]) -> None:
    """Run blocks one after the other in one namespace; a comment after `print` is what it prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        shown = [line.rpartition("# ")[2] for line in block.splitlines() if line.startswith("print(") and "# " in line]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "docs/parallel.md", "exec"), names)
        assert printed.getvalue().splitlines() == shown


def test_the_guide_is_true() -> None:
    blocks = read_blocks(ROOT / "docs" / "parallel.md")
    assert len(blocks) >= 8
    run_blocks([block for block in blocks if "runs on Ray" not in block])


def test_the_readme_is_true() -> None:
    (block,) = [block for block in read_blocks(ROOT / "README.md") if "parallel" in block]
    run_blocks([block])


@pytest.mark.slow
def test_the_guide_is_true_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'unisono[ray]'")
    blocks = read_blocks(ROOT / "docs" / "parallel.md")
    script = "\n".join([blocks[0], *(block for block in blocks if "runs on Ray" in block)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.stdout == "[0, 3, 12, 27, 48, 75]\n" * 2, done.stderr


def test_the_example_gives_one_number() -> None:
    script = ROOT / "examples" / "parallel" / "pi.py"
    printed = {
        subprocess.run(
            [sys.executable, script, "--tasks", "5", "--workers", workers], capture_output=True, text=True, timeout=180
        ).stdout
        for workers in ("1", "3")
    }
    (line,) = printed
    assert re.fullmatch(r"pi is about 3\.14\d+ \(5 million darts\)\n", line)
