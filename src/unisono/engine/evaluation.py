"""Evaluation and prediction over workers: every sample exactly once, results in sample order, the same bits on any
number of them.

Owns the cut into fixed microbatches, their assignment, and the gathering. `tasks/metrics.py` says what the numbers
mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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
    everywhere: bool = True,
) -> Results:
    """Call `measure` on every sample once, split over the workers; return all results.

    everywhere: on every worker; false: on worker 0, and nothing on others.
    loaders: processes that load ahead from a source that is not prefetchable.

    Raises:
        ContractError: `measure` gives no number for each sample, or other results for some microbatches.
    """
    cut = pieces(source.lengths, samples_per_microbatch)
    found: dict[str, list[Tensor]] = {}
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
                checked = check_result(name, values, len(cut[number]))
                found.setdefault(name, []).append(checked.detach())
    return _gather(found, cut, exchange, everywhere)


def check_result(name: str, values: object, samples: int) -> Tensor:
    """Return one result of a task's method: [samples] or [samples, k].

    Raises:
        ContractError: it is none.
    """
    if not isinstance(values, Tensor):
        raise ContractError(
            f"measure gave {name!r} as {type(values).__name__}; allowed is a tensor with one number, or one row, per "
            "sample."
        )
    if values.ndim not in (1, 2) or len(values) != samples or not values.numel() or values.is_complex():
        raise ContractError(
            f"measure gave {name!r} the shape {tuple(values.shape)} ({values.dtype}) for {samples} samples; allowed is "
            'one real number, or one row, per sample. Use reduction="none".'
        )
    return values


def _gather(
    found: Mapping[str, Sequence[Tensor]], cut: Sequence[np.ndarray], exchange: Exchange, everywhere: bool
) -> Results:
    """Put every worker's rows in their places. The places are known from the cut, so only values travel, as bits."""
    columns = _columns(found, exchange)
    mine = len(cut[exchange.rank :: exchange.workers])
    if mine and (odd := found.keys() ^ {name for name, _, _ in columns} or _uneven(found, columns, mine)):
        raise ContractError(
            f"measure gave {min(odd)!r} for some microbatches only, or in different shapes; allowed are the same "
            "results for all. Return it always."
        )
    content = b"".join(_as_bytes(found.get(name, ()), floating) for name, floating, _ in columns)
    everyone = exchange.gather_bytes(content) if everywhere else exchange.send_to_first(content)
    samples = sum(map(len, cut))
    results = {
        name: np.empty((samples, width) if width else samples, np.float64 if floating else np.int64)
        for name, floating, width in columns
        if everyone
    }
    for rank, sent in enumerate(everyone):
        places = np.concatenate([np.empty(0, np.int64), *cut[rank :: exchange.workers]])
        start = 0
        for name, floating, width in columns:
            values = np.frombuffer(
                sent, np.float64 if floating else np.int64, count=len(places) * max(width, 1), offset=start
            )
            results[name][places] = values.reshape(len(places), *results[name].shape[1:])
            start += values.nbytes
    return results


def _columns(found: Mapping[str, Sequence[Tensor]], exchange: Exchange) -> list[tuple[str, bool, int]]:
    """Names, whether floats, and widths (0: one number a sample), as worker 0 has them: if any worker has a
    microbatch, worker 0 has one."""
    mine = [(name, rows[0].is_floating_point(), _width(rows[0])) for name, rows in found.items()]
    return [tuple(column) for column in json.loads(exchange.gather_bytes(json.dumps(mine).encode())[0])]


def _uneven(
    found: Mapping[str, Sequence[Tensor]], columns: Sequence[tuple[str, bool, int]], microbatches: int
) -> set[str]:
    """Names of results that not all of a worker's microbatches have, in the form that worker 0's first one has."""
    return {
        name
        for name, floating, width in columns
        if len(found[name]) != microbatches
        or any(row.is_floating_point() != floating or _width(row) != width for row in found[name])
    }


def _width(rows: Tensor) -> int:
    return rows.shape[1] if rows.ndim > 1 else 0


def _as_bytes(rows: Sequence[Tensor], floating: bool) -> bytes:
    kind = torch.float64 if floating else torch.int64
    return b"".join(row.cpu().to(kind).contiguous().numpy().tobytes() for row in rows)
