"""The stages' work, divided among processes, with the errors that the stages raise.

Owns the translation of errors; `unisono.parallel` divides the work.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from unisono import parallel
from unisono.errors import DataError, TaskError, UnisonoError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Divides work among `workers` processes. progress: None shows a bar if stderr is a terminal, False shows none."""

    workers: int
    progress: bool | None = False

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Return the results in the order of the items.

        Raises:
            UnisonoError: raised by the function. DataError: the disk is full. TaskError: any other error.
        """
        workers = max(1, min(self.workers, len(items)))
        try:
            yield from parallel.map(function, items, workers=workers, seed=None, progress=self.progress)
        except TaskError as error:
            cause = error.__cause__
            if isinstance(cause, UnisonoError):
                raise cause from None
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError("the disk is full. Free some space, or set data.store to a folder elsewhere.") from None
            raise

    def call(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Return what the functions return, in their order."""
        return list(self.map(lambda function: function(), functions))

    def do(self, function: Callable[[Item], None], items: Sequence[Item]) -> None:
        """Call the function with each item."""
        for _ in self.map(function, items):
            pass
