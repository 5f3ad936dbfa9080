"""docs/tracking.md: its logger and its callback work as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import unisono
from unisono.tracking.events import Evaluated, StepDone
from unisono.tracking.logger import Cursor, LoggerContext

GUIDE = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text(encoding="utf-8")


def test_the_guides_classes_work(tmp_path: Path) -> None:
    first, second = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    found: dict[str, type] = {}
    exec(first, found)
    exec(second.partition("\ndone = ")[0], found)
    context = LoggerContext(
        recipe={},
        run_folder=tmp_path,
        folder=tmp_path / "csv",
        is_shared=False,
        project="p",
        cursor=Cursor(),
        memory={},
    )
    log = found["CsvLogger"](context)
    log.observe(
        StepDone(step=1, epoch=0.1, loss=0.5, gradient_norm=1, learning_rate=0.1, samples=8, tokens=8, seconds=1)
    )
    log.flush()
    log.close()
    assert (tmp_path / "csv" / "steps.csv").read_text() == "1,0.5\n"
    stop = found["StopAtLoss"](0.1)
    scored = [Evaluated(step=1, epoch=0.1, split="test", scores={"loss": loss}, best=False) for loss in (0.2, 0.05)]
    assert [stop.observe(event) for event in scored] == [None, unisono.STOP]
