"""A record of what every microbatch contributed, so that two runs can be compared to the first bit that differs.

Owns the digests and their file: one JSON line per microbatch, {"step", "microbatch", "loss", "parts": {name: digest}},
and one per step, {"step", "weights": {name: digest}}. Compares nothing; `verification.py` does.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unisono.engine.contribution import Contribution, Contributor
from unisono.engine.replica import Replica


class Traced:
    """A contributor that records what it computes, for one worker."""

    def __init__(self, contributor: Contributor, folder: Path, rank: int) -> None:
        self._contributor = contributor
        self._names = [segment.name for segment in contributor.replica.space.segments]
        self._file = (folder / f"trace-{rank}.jsonl").open("w", encoding="utf-8")

    def contribute(self, step: int, number: int, microbatch: dict[str, Tensor]) -> Contribution:
        """Compute and record a contribution."""
        found = self._contributor.contribute(step, number, microbatch)
        parts = {name: digest(part) for name, part in zip(self._names, found.parts, strict=True)}
        self._write({"step": step + 1, "microbatch": number, "loss": float(found.loss).hex(), "parts": parts})
        return found

    def record_weights(self, step: int, replica: Replica) -> None:
        """Record the weights after a step."""
        self._write(
            {
                "step": step,
                "weights": {segment.name: digest(segment.view(replica.flat)) for segment in replica.space.segments},
            }
        )

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def digest(value: Tensor | None) -> str:
    """Short hash of a tensor's bits; sparse ones count as dense."""
    if value is None:
        return "none"
    value = value.to_dense() if value.is_sparse else value
    content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(content, digest_size=12).hexdigest()
