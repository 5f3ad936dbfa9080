"""Passes each event to the ledger and the screen, to the loggers, and to the user's own observers, in this order.

Owns the order, that the user's observers get each event once, and the meaning of an observer's result or failure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from unisono.errors import ObserverError, RecipeError
from unisono.tracking import events
from unisono.tracking.logger import Cursor
from unisono.tracking.reporter import Reporter


def check_observers(observers: Sequence[object]) -> None:
    """Refuse an object without both methods of `events.Observer`.

    Raises:
        RecipeError: it names the object, and the missing methods.
    """
    if not isinstance(observers, list | tuple):
        raise RecipeError(f"observers is {observers!r}; allowed is a list of observers, such as [observer].")
    for observer in observers:
        lacks = [name for name in ("observe", "close") if not callable(getattr(observer, name, None))]
        if lacks or isinstance(observer, type):
            fault = f"has no method {' and '.join(lacks)}" if lacks else "is a class, not an object"
            raise RecipeError(
                f"observers: {observer!r} {fault}. An observer has observe(event) and close(); see unisono.Observer."
            )


class EventDispatcher:
    """Everything that observes a run, as one observer.

    Args:
        reporter: the ledger and the screen.
        observers: the user's own. Each gets a step, an evaluation or a checkpoint once, in order.

    Attributes:
        loggers: the recipe's, if it has any; they warn through this dispatcher, so they are set after it is made.
    """

    def __init__(self, reporter: Reporter, observers: Sequence[events.Observer] = ()) -> None:
        self.loggers: events.Observer | None = None
        self._reporter = reporter
        self._observers = list(observers)
        self._failed: set[int] = set()  # ids of observers that raised
        self._cursor = Cursor()
        self._stopped_by = ""

    def warn(self, message: str) -> None:
        """Pass a warning to all observers."""
        self.observe(events.Notice(message=message, warning=True))

    def observe(self, event: events.Event) -> Literal["stop"] | None:
        """Pass an event on; return whether an observer has requested the end.

        Raises:
            ObserverError: one of the user's observers raised. It gets no more events; all others got this one.
        """
        if isinstance(event, events.RunEnded):
            if self._stopped_by and event.summary.get("stopped_by") == "observer":
                event = replace(event, summary={**event.summary, "stopped_by": f"observer {self._stopped_by}"})
            event = self._reporter.complete(event)
        self._reporter.observe(event)
        if self.loggers is not None:
            self.loggers.observe(event)
        if not self._cursor.admit(event):
            return None
        answer: Literal["stop"] | None = None
        failure: ObserverError | None = None
        for observer in self._observers:
            if id(observer) in self._failed:
                continue
            try:
                given = observer.observe(event)
                if given is not None and given != events.STOP:
                    raise TypeError(f"observe returned {given!r}; allowed are None and unisono.STOP")
            except Exception as error:  # noqa: BLE001 - the user's own code; it is raised again
                self._failed.add(id(observer))
                failure = failure or _blame(observer, error, event)
                continue
            if given == events.STOP:
                answer = events.STOP
                self._stopped_by = self._stopped_by or type(observer).__name__
        if failure is not None:
            raise failure
        return answer

    def close(self) -> None:
        """Close all. One that fails does not keep the others open.

        Raises:
            ObserverError: one of the user's observers raised.
        """
        failure: ObserverError | None = None
        for observer in self._observers:
            try:
                observer.close()
            except Exception as error:  # noqa: BLE001 - the user's own code; it is raised again
                failure = failure or _blame(observer, error)
        self._observers.clear()
        try:
            if self.loggers is not None:
                self.loggers.close()
        finally:
            self._reporter.close()
        if failure is not None:
            raise failure


def _blame(observer: object, error: Exception, event: events.Event | None = None) -> ObserverError:
    """The error that names the observer."""
    step = getattr(event, "step", None)
    at = f" of step {step}" if step is not None else ""
    where = f"on {type(event).__name__}{at}" if event else "in close()"
    failure = ObserverError(f"the observer {type(observer).__name__} failed {where}: {type(error).__name__}: {error}.")
    failure.__cause__ = error
    return failure
