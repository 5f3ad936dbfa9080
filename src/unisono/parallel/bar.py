"""A bar on stderr for a call's progress, by the rich library."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A context that gives a function: called with the number of finished items, it shows them."""

    def __init__(self, total: int | None) -> None:
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._total = total

    def __enter__(self) -> Callable[[int], None]:
        self._progress.start()
        self._bar = self._progress.add_task("", total=self._total)
        return self._show

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _show(self, done: int) -> None:
        self._progress.update(self._bar, completed=done)
