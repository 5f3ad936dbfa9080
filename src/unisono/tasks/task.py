"""What is trained: three short methods that a user writes for a model of their own.

Owns the interface alone. The presets in `models/text` are tasks like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

Microbatch = Mapping[
    str, Tensor
]  # column name → host or device tensor; dim 0 is samples, unless the source says otherwise


class Task(ABC):
    """A model and what it is to learn.

    Each method must be a pure function of its arguments and of torch's, NumPy's or Python's global
    generators, which are seeded anew for each microbatch. What is no sum over samples does not belong in `loss`.
    """

    pretrained: tuple[str, ...] = ()
    """Prefixes of the names of parameters that learn at `train.pretrained_rate` times the rate."""
    backend: str = "torch"
    """Name of what computes this task's model: "torch", or another backend that is installed or registered. With
    another one, `build`, `loss` and `measure` have the form that it describes."""

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
        """Return one number per sample (float, bool or int, shape [samples]) under each name, for evaluation.

        Their means are reported. `loss` should be among them; from `predicted` and `label` (class numbers) accuracy,
        macro-F1, the per-class table and the confusion matrix are computed.
        """
