"""The ledger and the screen as one observer, so that both tell the same.

Owns nothing but their order: the ledger completes a run's summary before the screen shows it.
"""

from __future__ import annotations

from pathlib import Path

from unisono import events
from unisono.report.metrics import Ledger
from unisono.report.screen import choose_screen


class Reporter:
    """Keeps and shows what happens in a run."""

    def __init__(self, folder: Path, *, quiet: bool, as_json: bool) -> None:
        self._screen = choose_screen(quiet=quiet, as_json=as_json)
        self._ledger = Ledger(folder, lambda message: self.observe(events.Notice(message=message, warning=True)))

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RunEnded):
            event = self._ledger.complete(event)
        try:
            self._ledger.observe(event)
        finally:
            self._screen.observe(event)

    def close(self) -> None:
        self._ledger.close()
        self._screen.close()
