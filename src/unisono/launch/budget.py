"""How often a run may be brought back: pure bookkeeping of losses.

Owns the rules of `[recovery]`: the budget, the attempts at one step, the back-off, and when a fault repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from unisono.recipe import Recovery

MOST_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Workers that were lost at once. step: the last committed one, −1 before any. what: in words. cause: of an
    exception, which a deterministic program repeats; "" for others. trace: to show if this ends the run."""

    step: int
    what: str
    cause: str = ""
    trace: str = ""


class Budget:
    """Counts a run's losses."""

    def __init__(self, rules: Recovery) -> None:
        self._rules = rules
        self.losses: list[Loss] = []

    def spend(self, loss: Loss) -> str:
        """Count a loss. Return why the run has to end now; "": it goes on."""
        before = self.losses
        self.losses = [*before, loss]
        where = f"step {loss.step + 1}" if loss.step >= 0 else "the start"
        if loss.cause and loss.step < 0:
            return loss.what
        if loss.cause and before and (before[-1].step, before[-1].cause) == (loss.step, loss.cause):
            return f"{loss.what}\nThe same error came twice at {where}: it would come again."
        if self.attempts >= self._rules.attempts:
            return (
                f"{loss.what}. This was loss {self.attempts} in a row at {where}: the fault repeats. Look at what is "
                "special there; `recovery.attempts` allows more."
            )
        if len(self.losses) > self._rules.restarts:
            return (
                f"{loss.what}. That was loss {len(self.losses)}, and `recovery.restarts` = {self._rules.restarts} "
                "allows no more."
            )
        return ""

    @property
    def attempts(self) -> int:
        """Losses in a row with no step committed in between."""
        last = self.losses[-1].step
        count = 0
        for loss in reversed(self.losses):
            if loss.step != last:
                break
            count += 1
        return count

    @property
    def backoff_seconds(self) -> float:
        """How long to wait before the next attempt; the first one does not wait."""
        again = self.attempts - 1
        return min(self._rules.backoff_seconds * 2 ** (again - 1), MOST_BACKOFF_SECONDS) if again else 0.0
