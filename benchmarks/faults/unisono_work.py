"""unisono's side of the recovery benchmark: the peers' workload under a supervisor, with their journal.

Started by `recover.py` as `unisono_work.py replace|shrink OPTIONS`, the options being those of a peer. A step is noted
by each worker when it has committed it; without checkpoints, as the state outlives a worker in the snapshot.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from marks import Mark, train_supervised
from peer_work import Journal, Work, workload

from unisono.config.run_sections import Recovery
from unisono.tasks.own_inputs import open_own

WORKERS = 2


class Committed:
    """Notes committed steps in the journal; a step that is only reported again was finished before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._journals: dict[int, Journal] = {}
        self._step = 0

    def note(self, mark: Mark) -> None:
        """Hear of a phase."""
        if mark.phase == "commit":
            self._step = mark.step
        elif mark.phase == "report" and mark.step == self._step:
            journal = self._journals.setdefault(mark.rank, Journal(self._path, mark.rank))
            journal.add(mark.step, team=str(mark.team), workers=mark.workers)
        elif mark.phase == "join":
            self._step = 0


def main() -> None:
    """Train until somebody ends it."""
    on_loss = sys.argv.pop(1)
    work = Work.parse()
    made = workload(work.samples_per_step, work.tokens)
    train = made.recipe.train.model_copy(update={"epochs": 1e6, "max_steps": work.steps})
    recovery = Recovery.model_validate({"on_loss": on_loss})
    recipe = made.recipe.model_copy(update={"train": train, "recovery": recovery})
    train_supervised(
        recipe,
        lambda workers, notify: open_own(recipe, made.task, made.samples),
        work.folder / "run",
        Committed(work.journal).note,
        workers=WORKERS,
    )


if __name__ == "__main__":
    main()
