"""The learning rate of each step: a pure function of the step's number."""

from __future__ import annotations

import math

from unisono.config.sections import Train


def rate(train: Train, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (from 0): a linear warm-up to the peak, then constant, linear or cosine decay to
    0."""
    warmup = train.warmup * total_steps if train.warmup < 1 else train.warmup
    warmup_steps = min(int(warmup), total_steps)
    if step < warmup_steps:
        return train.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if train.schedule == "constant":
        return train.learning_rate
    if train.schedule == "linear":
        return train.learning_rate * (1 - progress)
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
