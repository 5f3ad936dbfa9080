"""Every error that unisono raises on purpose.

UnisonoError
├── UserError (exit code 2; nothing half-written)
│   ├── RecipeError            the recipe or a `--set` is wrong
│   ├── DataError              the user's files, columns, labels or records are wrong
│   ├── DamagedError           a stored file is not what its checksum says
│   ├── ModelError             a model folder cannot be used
│   ├── RunFolderError         a run folder exists, or lacks what is needed
│   ├── ParallelError          an argument of unisono.parallel cannot be used
│   └── ContractError          the promise of equal bits cannot be kept
│       ├── ImpureError        a contribution is no pure function of its inputs
│       └── NumericsError      workers, or a checkpoint, compute with other numerics
├── DivergedError (exit code 3)   the loss or the gradient is no longer finite
├── WorkerError (exit code 1)     a worker failed; carries its rank and traceback
├── TaskError (exit code 1)       a task of unisono.parallel failed; names its item
├── ObserverError (exit code 1)   a user's own observer failed; names it
├── CorruptionError               a worker computed wrong bits: the worker is lost, not the run
├── LostPeerError                 another worker vanished during an exchange: a symptom, never the cause
└── Interrupted (exit code 130)   the user stopped the run; a checkpoint was written
    └── Preempted (exit code 75)  the run was asked to leave the machine (SIGTERM, SIGUSR1); a checkpoint was written

A message says what was given, what is allowed and what to do.
"""

from __future__ import annotations


class UnisonoError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class UserError(UnisonoError):
    """Something that the user gave cannot be used; the message names the remedy."""

    exit_code = 2


class RecipeError(UserError):
    """A key, a value or a combination in the recipe is wrong."""


class DataError(UserError):
    """A file, a column, a label or a record of the user's data is wrong."""


class DamagedError(UserError):
    """A file of a dataset or a checkpoint differs from its recorded SHA-256."""


class ModelError(UserError):
    """A model folder lacks something, or holds a file that is not safe to read."""


class RunFolderError(UserError):
    """A run folder is in the way, or is missing what the command needs."""


class ParallelError(UserError):
    """An argument of `unisono.parallel` cannot be used."""


class ContractError(UserError):
    """The promise of equal bits cannot be kept for this run."""


class ImpureError(ContractError):
    """A contribution depends on more than parameters, buffers, microbatch and key."""


class NumericsError(ContractError):
    """Two numerics fingerprints differ."""


class DivergedError(UnisonoError):
    """The loss or the gradient is not finite; the last good checkpoint is kept."""

    exit_code = 3


class WorkerError(UnisonoError):
    """A worker failed. The message carries its rank and its traceback."""


class TaskError(UnisonoError):
    """A task failed: its function raised, or ended its worker. `number` is the item's place in the input, from 0.

    The function's own error is the `__cause__`, where it could be sent.
    """

    def __init__(self, message: str, number: int = -1) -> None:
        super().__init__(message)
        self.number = number


class ObserverError(UnisonoError):
    """An observer that was given to `unisono.train` raised, or returned what is not allowed. Its own error is the
    `__cause__`."""


class CorruptionError(UnisonoError):
    """An audit found that this worker's bits were wrong. A supervisor replaces the worker."""


class LostPeerError(UnisonoError):
    """Another worker vanished during an exchange. Its own error is the cause, this one a symptom."""


class Interrupted(UnisonoError):
    """The user asked to stop; the run can be resumed from its last checkpoint."""

    exit_code = 130


class Preempted(Interrupted):
    """The run was asked to leave the machine (SIGTERM, or SIGUSR1 as Slurm sends it); start it again to go on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command will succeed later
