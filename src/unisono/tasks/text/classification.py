"""Text classification as a task: to which class does a text belong?

Owns the loss, the measurements, and the choice among the three models. The models are in modules of their
own; texts are numbers here.

A microbatch is ragged, sample after sample: {"ids": int64 [tokens or features of all], "offsets": int64 [n], where each
sample starts, "label": int64 [n]}.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisono.config.sections import Bag, Model, Pretrained
from unisono.errors import ModelError, RecipeError
from unisono.tasks.task import Microbatch, Task
from unisono.tasks.text.bag import BagClassifier
from unisono.tasks.text.pretrained import PREFIX, read_classifier, read_config
from unisono.tasks.text.transformer import TransformerClassifier


class TextClassification(Task):
    """One class per text, by cross-entropy.

    Args:
        model: the recipe's table [model].
        classes: the number of classes.
        vocabulary_size, padding: the encoder's.
        max_tokens: longest sample, in tokens.
        label_smoothing: share of the target spread over all classes.
        class_weights: factor on the loss of a sample, by its class; None: 1.
        gradient_checkpointing: recompute activations in backward, to save memory. A bag has too few for it.

    Raises:
        RecipeError: class_weights are not one number from 0 per class.
        ModelError: the pretrained folder cannot be used, or its encoder is too small for the tokens.
    """

    def __init__(
        self,
        *,
        model: Model,
        classes: int,
        vocabulary_size: int,
        padding: int,
        max_tokens: int,
        label_smoothing: float = 0.0,
        class_weights: tuple[float, ...] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.classes = classes
        self.vocabulary_size = vocabulary_size
        self.padding = padding
        self.max_tokens = max_tokens
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.gradient_checkpointing = gradient_checkpointing
        self._check_weights()
        last = "classifier" if not isinstance(model, Bag) else "head.4" if model.hidden else "head.1"
        self.class_rows = (f"{last}.weight", f"{last}.bias")
        if isinstance(model, Pretrained):
            self.pretrained = (PREFIX,)
            self._check_sizes(model)

    def build(self) -> nn.Module:
        """Make the module; weights come from a folder, or else from torch's global generator."""
        match self.model:
            case Bag():
                return BagClassifier(self.model, self.classes, self.vocabulary_size)
            case Pretrained():
                return read_classifier(self.model, self.classes, recompute=self.gradient_checkpointing)
            case _:
                return TransformerClassifier(
                    self.model,
                    classes=self.classes,
                    vocabulary_size=self.vocabulary_size,
                    padding=self.padding,
                    max_tokens=self.max_tokens,
                    recompute=self.gradient_checkpointing,
                )

    def loss(self, module: nn.Module, microbatch: Microbatch) -> tuple[Tensor, int]:
        """Return the sum of the weighted, smoothed cross-entropies (float32), and the number of samples."""
        label = microbatch["label"]
        logits = _logits(module, microbatch)
        losses = F.cross_entropy(logits, label, reduction="none", label_smoothing=self.label_smoothing)
        if self.class_weights is not None:
            losses = losses * losses.new_tensor(self.class_weights)[label]
        return losses.sum(), len(label)

    def measure(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        """Return per sample `loss` (float32, not smoothed, not weighted), `predicted` and `label` (int64)."""
        label = microbatch["label"]
        logits = _logits(module, microbatch)
        loss = F.cross_entropy(logits, label, reduction="none").float()
        return {"loss": loss, "predicted": logits.argmax(-1), "label": label}

    def predict(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        """Return `probabilities` of the classes, float [n, classes]; the microbatch needs no label."""
        return {"probabilities": _logits(module, microbatch).softmax(-1)}

    def _check_weights(self) -> None:
        weights = self.class_weights
        if weights is None or (len(weights) == self.classes and all(0 <= w < math.inf for w in weights)):
            return
        raise RecipeError(
            f"train.class_weights = {list(weights)}: allowed is one number from 0 for each of the "
            f'{self.classes} classes. Give so many, or "balanced", or "none".'
        )

    def _check_sizes(self, model: Pretrained) -> None:
        config = read_config(Path(model.folder))
        if self.max_tokens > config.max_position_embeddings:
            raise ModelError(
                f"encode.max_tokens = {self.max_tokens}: the encoder in {model.folder} knows "
                f"{config.max_position_embeddings} positions. Set encode.max_tokens to that or less."
            )
        if self.vocabulary_size > config.vocab_size:
            raise ModelError(
                f"{model.folder}: the tokenizer has {self.vocabulary_size} entries, config.json's vocab_size "
                f"is {config.vocab_size}. Take tokenizer.json and the weights from one model."
            )


def _logits(module: nn.Module, microbatch: Microbatch) -> Tensor:
    """Run the module; the result is float32 at least, since autocast would round the loss to bfloat16."""
    logits = module(microbatch["ids"], microbatch["offsets"])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
