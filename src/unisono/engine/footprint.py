"""What a worker's part of a model costs: floating-point operations, the machine's possible speed, and bytes.

Measured outside training, on microbatches that have been trained on: a contribution changes no state, so computing one
more changes no bit.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unisono.backends.backend import Backend
from unisono.engine.profile import Profile, Shape, storage_bytes
from unisono.engine.state import TrainState

MOST_SHAPES = 8
COUNTING_SECONDS = 10.0
PEAK_SECONDS = 0.5
PEAK_SIZES = (512, 1024, 2048, 4096, 8192)
"""Rows and columns of the matrices that are multiplied, within the time limit."""

Again = Callable[[int, int], object]
"""Computes the contribution of (step, microbatch) once more."""


def count_all_flop(again: Again, backend: Backend, profile: Profile) -> dict[int, int]:
    """Step → floating-point operations of this worker's microbatches; {}: the backend counts none.

    Up to MOST_SHAPES shapes are counted, from the smallest to the largest; another one counts as the nearest of these
    by number of elements, in proportion to it.
    """
    places: dict[Shape, tuple[int, int]] = {}
    for step, recorded in profile.steps.items():
        for number, shape in recorded.microbatches:
            places.setdefault(shape, (step, number))
    shapes = sorted(places, key=elements)
    spread = [shapes[round(index)] for index in _evenly(len(shapes), min(MOST_SHAPES, len(shapes)))]
    counted: dict[Shape, int] = {}
    began = time.monotonic()
    for shape in reversed(spread):
        flop = backend.count_flop(partial(again, *places[shape]))
        if flop is None:
            return {}
        counted[shape] = flop
        if time.monotonic() - began > COUNTING_SECONDS:
            break
    return {
        step: sum(estimate_flop(shape, counted) for _, shape in recorded.microbatches)
        for step, recorded in profile.steps.items()
    }


def estimate_flop(shape: Shape, counted: Mapping[Shape, int]) -> int:
    """Operations of a microbatch of this shape, from those of others."""
    nearest = min(counted, key=lambda other: abs(elements(other) - elements(shape)))
    return round(counted[nearest] * elements(shape) / max(elements(nearest), 1))


def elements(shape: Shape) -> int:
    """The number of elements in a microbatch."""
    return sum(math.prod(column) for column in shape)


def _evenly(count: int, wanted: int) -> list[float]:
    """`wanted` places from the first to the last of `count`."""
    return [index * (count - 1) / max(wanted - 1, 1) for index in range(wanted)]


def measure_activations(again: Again, backend: Backend, profile: Profile, constants: Sequence[Tensor]) -> int | None:
    """Bytes: the most that was kept at one time for the backward pass of this worker's largest microbatch, without
    `constants` (parameters and buffers). None: the backend does not measure it."""
    places = [
        (elements(shape), step, number) for step, one in profile.steps.items() for number, shape in one.microbatches
    ]
    if not places:
        return 0
    _, step, number = max(places)
    return backend.measure_saved(lambda: again(step, number), constants)


def measure_peak(device: torch.device, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """Name of each dtype → FLOP per second of torch.mm with this worker's threads, the best of some square matrices."""
    return {str(dtype).removeprefix("torch."): _measure_product(device, dtype) for dtype in dtypes}


def _measure_product(device: torch.device, dtype: torch.dtype) -> float:
    best, deadline, seconds = 0.0, time.perf_counter() + PEAK_SECONDS, 0.0
    for size in PEAK_SIZES:
        if time.perf_counter() + 16 * seconds > deadline and best:  # two runs, each eight times the work
            break
        left = torch.ones(size, size, device=device, dtype=dtype)
        product = torch.mm(left, left)  # the first call is not measured
        for _ in range(5):
            _synchronize(device)
            began = time.perf_counter()
            torch.mm(left, left, out=product)
            _synchronize(device)
            seconds = time.perf_counter() - began
            best = max(best, 2 * size**3 / seconds)
            if time.perf_counter() > deadline:
                break
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weigh(state: TrainState, profile: Profile) -> dict[str, int]:
    """Bytes of this worker's memory by kind, except activations. The optimiser's state, and averaged weights, are those
    of its shard; `peak_resident` is the most that the process held, shared memory included."""
    replica, optimizer = state.replica, state.optimizer
    averaged = [] if optimizer.average is None else [optimizer.average]
    found = {
        "parameters": storage_bytes(constants(state)),
        "tree": profile.buffer_bytes,
        "gradients": profile.gradient_bytes,
        "optimiser": sum(array.nbytes for array in [*optimizer.slots.values(), *averaged]),
        "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if replica.flat.device.type == "cuda":
        found["peak_device"] = torch.cuda.max_memory_allocated(replica.flat.device)
    return found


def constants(state: TrainState) -> list[Tensor]:
    """The tensors of the module: a microbatch reads them, and they exist before and after it."""
    return [state.replica.flat, *(tensor.detach() for tensor in state.replica.all_tensors().values())]


def describe(
    profile: Profile,
    state: TrainState,
    again: Again | None,
    *,
    precision: str,
    memory: int,
    wait_for_all: Callable[[], None],
) -> dict[str, Any]:
    """Measure all of it on this worker; return plain values: "flop" by step, "peak", "memory", "problems".

    again: None: there is no time for it, and only known values are returned. memory: file of the run's snapshot, or
    −1. wait_for_all: so that all workers measure the machine's speed at once, as they train. Every worker calls this.
    Whatever cannot be measured is listed as a problem.
    """
    problems: list[str] = []
    weights = weigh(state, profile)
    if memory >= 0:
        weights["snapshot"] = os.fstat(memory).st_blocks * 512
    if again is None:
        return {"flop": {}, "peak": {}, "memory": weights, "problems": ["speed and activations: the run was stopped"]}

    def attempt(what: str, measure: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return measure()
        except Exception as error:  # noqa: BLE001 - a model may do what no counter supports; the run goes on
            problems.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    device, dtype, backend = state.replica.flat.device, state.replica.space.dtype, state.replica.backend
    activations = attempt("activations", lambda: measure_activations(again, backend, profile, constants(state)), None)
    if activations is not None:
        weights["activations"] = activations
    flop = attempt("floating-point operations", lambda: count_all_flop(again, backend, profile), {})
    if profile.steps and not flop and not problems:
        problems.append(f"floating-point operations: backend {backend.name!r} does not count them")
    wait_for_all()
    dtypes = [dtype, *([torch.bfloat16] if precision == "bf16" else [])]
    peak = attempt("the speed of torch.mm", lambda: measure_peak(device, dtypes), {})
    return {"flop": flop, "peak": peak, "memory": weights, "problems": problems}
