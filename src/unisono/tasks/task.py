"""The interface that a user implements for a model of their own.

Three methods are enough to train. The others define how records become samples, the scores, and the predictions of a
trained model. The presets in `tasks/text` are tasks like any other. Owns the interface alone; `kinds.py` finds a task
by its name.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from unisono.errors import ContractError
from unisono.tasks.metrics import Metric

if TYPE_CHECKING:
    import pyarrow as pa

Microbatch = Mapping[
    str, Tensor
]  # column name → host or device tensor; dim 0 is samples, unless the source says otherwise

PLAIN = (bool, int, float, str)


class Task(ABC):
    """A model and what it learns.

    `loss`, `measure` and `predict` must be pure functions of their arguments and of torch's, NumPy's or Python's global
    generators, which are seeded anew for each microbatch. `loss` must be a sum over samples.
    """

    pretrained: tuple[str, ...] = ()
    """Prefixes of the names of parameters whose learning rate is multiplied by `train.pretrained_rate`."""
    backend: str = "torch"
    """Name of the backend that computes this task's model: "torch", or another one that is installed or registered.
    Another backend describes the form of `build`, `loss` and `measure` for it."""

    class_rows: tuple[str, ...] = ()
    """Names of parameters and buffers with one row per class, in the order of the labels: `train.start_from` copies the
    rows of classes that both runs have."""

    columns: tuple[str, ...] = ()
    """Names of the columns that a record must have, before `encode`; (): all its columns of numbers."""

    targets: tuple[str, ...] = ()
    """Those of `columns` that prediction does not need, such as the label."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the module, with its initial weights, from the global generators. Parameters are float32 or all
        float64."""

    @abstractmethod
    def loss(self, module: nn.Module, microbatch: Microbatch) -> tuple[Tensor, int]:
        """Return the *sum* of the losses in the microbatch (a scalar) and how many terms it has (samples, tokens, …).

        The step's gradient is the gradient of all sums, divided once by the number of all terms.
        """

    @abstractmethod
    def measure(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        """Return one number or one row per sample (float, bool or int, shape [samples] or [samples, k]) under each
        name, for evaluation.

        `metrics` defines the figures from them. `loss` should be among them.
        """

    def metrics(self) -> Sequence[Metric]:
        """Return the metrics to compute from the results of `measure`, besides those that are always computed: the
        mean of each number per sample; accuracy and macro-F1 where there are `predicted` and `label` (class numbers).
        Results that a metric here uses have no mean of their own, except `loss`."""
        return ()

    def predict(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        """Return one number or one row per sample (shape [samples] or [samples, k]) under the name of each new column,
        for `unisono.predict`. The microbatch has no `targets`.

        Raises:
            ContractError: the task does not define it.
        """
        name = type(self).__name__
        raise ContractError(
            f"the task {name} has no `predict`, so it cannot be used on new data. Define {name}.predict(self, module, "
            'microbatch) and return, for instance, {"predicted": module(microbatch["input"]).argmax(1)}.'
        )

    def encode(self, table: pa.Table) -> Mapping[str, Any]:
        """Return the samples' columns (arrays or lists of numbers, one value or row per sample) for the rows of a file
        or a frame, which has at least `columns`, or where samples are to be predicted those without `targets`."""
        return dict(zip(table.column_names, table.columns, strict=True))

    def settings(self) -> dict[str, Any]:
        """Return the plain values that decide what is learned, by the names of the constructor's arguments. They are
        in the run's recipe under [task], decide whether a run may be resumed, and make the task anew for `load`.

        By default: the arguments of the constructor that the task keeps as attributes of the same name, where these are
        numbers, texts, booleans, or lists of such.
        """
        found = {name: getattr(self, name, None) for name in arguments_of(type(self))}
        return {name: value for name, value in found.items() if _is_plain(value)}

    def export(self, folder: Path) -> None:
        """Write what prediction needs besides the weights into `folder`, which has the weights. By default nothing."""
        return


def arguments_of(task: type[Task]) -> dict[str, inspect.Parameter]:
    """The named arguments of a task's constructor."""
    parameters = inspect.signature(task).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)
