"""The ledger and the screen as one observer, so that both report the same.

Owns only their order: the ledger completes a run's summary before the screen shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from unisono.tracking import events
from unisono.tracking.ledger import Ledger
from unisono.tracking.terminal import choose_screen


class Reporter:
    """Keeps and shows what happens in a run. If standard output is closed (a closed terminal, a broken pipe), the run
    goes on without output."""

    def __init__(self, folder: Path, *, quiet: bool, as_json: bool) -> None:
        self._screen: events.Observer | None = choose_screen(quiet=quiet, as_json=as_json)
        self._ledger = Ledger(folder, lambda message: self.observe(events.Notice(message=message, warning=True)))

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RunEnded):
            event = self._ledger.complete(event)
        try:
            self._ledger.observe(event)
        finally:
            self._show(lambda screen: screen.observe(event))

    def complete(self, event: events.RunEnded) -> events.RunEnded:
        """The run's end with its complete summary, for the other observers."""
        return self._ledger.complete(event)

    def close(self) -> None:
        self._ledger.close()
        self._show(lambda screen: screen.close())

    def _show(self, act: Callable[[events.Observer], object]) -> None:
        if self._screen is None:
            return
        try:
            act(self._screen)
        except OSError as error:
            self._screen = None
            self._ledger.observe(events.Notice(message=f"standard output is closed: {error}", warning=True))
            silence()


def silence() -> None:
    """Discard what is still written to standard output: Python would report an error about it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
