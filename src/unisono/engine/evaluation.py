"""Evaluation and prediction over workers: every sample exactly once, results in sample order, the same bits on any
number of them.

Owns the cut into fixed microbatches, their assignment, and the gathering. `tasks/metrics.py` says what the numbers
mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from unisono.backends.backend import Backend, Measurement
from unisono.data.loaders import load_in_turn
from unisono.data.source import Source
from unisono.determinism import keys
from unisono.engine.numerics import Settings
from unisono.errors import ContractError
from unisono.exchange.protocol import Exchange
from unisono.processes.forking import end_copy
from unisono.processes.progress_table import UNWATCHED, Progress

Results = dict[str, np.ndarray]
"""Name → [samples] or [samples, k], float64 or int64, in sample order."""


def pieces(lengths: np.ndarray, samples_per_microbatch: int) -> list[np.ndarray]:
    """Cut all samples into microbatches of similar length: fixed by the data alone."""
    longest_first = np.argsort(-lengths.astype(np.int64), kind="stable")
    return [
        longest_first[start : start + samples_per_microbatch]
        for start in range(0, len(lengths), samples_per_microbatch)
    ]


def measure_all(
    backend: Backend,
    measure: Measurement,
    source: Source,
    exchange: Exchange,
    *,
    samples_per_microbatch: int,
    device: torch.device,
    seed: int = 0,
    progress: Progress = UNWATCHED,
    loaders: int = 0,
) -> Results:
    """Call `measure` on every sample once, split over the workers; return all results on every worker.

    loaders: processes that load ahead from a source that is not prefetchable.
    """
    cut = pieces(source.lengths, samples_per_microbatch)
    found: dict[str, list[tuple[np.ndarray, Tensor]]] = {}
    mine = range(exchange.rank, len(cut), exchange.workers)
    loaded = load_in_turn(source, [cut[number] for number in mine], 0 if source.prefetchable else loaders)
    process = os.getpid()
    with closing(loaded), backend.measuring(measure) as compute:
        settings = Settings()
        for number in mine:
            progress.at("evaluate", microbatch=number)
            microbatch = {name: column.to(device) for name, column in next(loaded).items()}
            key = keys.key(seed, "evaluation", number)
            keys.seed_all(key)
            measured = compute(microbatch, key)
            end_copy(process)
            settings.keep()
            for name, values in measured.items():
                if values.ndim not in (1, 2) or len(values) != len(cut[number]):
                    raise ContractError(
                        f"measure gave {name!r} the shape {tuple(values.shape)} for {len(cut[number])} samples; "
                        'allowed is one number, or one row, per sample. Use reduction="none".'
                    )
                found.setdefault(name, []).append((cut[number], values.detach()))
    return {
        name: _gather(found.get(name, []), len(source), floating, width, exchange)
        for name, floating, width in _columns(found, exchange)
    }


def _columns(found: Mapping[str, list[tuple[np.ndarray, Tensor]]], exchange: Exchange) -> list[tuple[str, bool, int]]:
    """Names, whether floats, and widths (0: one number a sample), as worker 0 has them: if any worker has a
    microbatch, worker 0 has one."""
    mine = [
        (name, rows[0][1].is_floating_point(), rows[0][1].shape[1] if rows[0][1].ndim > 1 else 0)
        for name, rows in found.items()
    ]
    return [tuple(column) for column in json.loads(exchange.gather_bytes(json.dumps(mine).encode())[0])]


def _gather(
    rows: list[tuple[np.ndarray, Tensor]],
    samples: int,
    floating: bool,
    width: int,
    exchange: Exchange,
) -> np.ndarray:
    """Put every worker's rows in their places. Floats travel as bits, so that adding zeros cannot change them."""
    shape = (samples, width) if width else (samples,)
    bits = torch.zeros(shape, dtype=torch.int64)
    for places, values in rows:
        exact = values.cpu().to(torch.float64).view(torch.int64) if floating else values.cpu().to(torch.int64)
        bits[torch.from_numpy(places)] = exact
    everyone = exchange.add_integers(bits)
    return (everyone.view(torch.float64) if floating else everyone).numpy()
