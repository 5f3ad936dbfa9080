"""The device on which a worker computes; the check that all workers use one kind of device, each one of its own.

Owns the choice, and the comparison before anything else is exchanged: workers that disagree would wait for each other
in different places, or compute other bits. Both use plain values, so they need no GPU.
"""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from unisono.errors import LostPeerError, RecipeError
from unisono.exchange.meeting import Meeting

CPU_INSTEAD = 'or set train.device = "cpu"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a worker reports of its device. kind: "cpu" or "cuda". gpu: which one in the world; "": unknown, or none.
    fault: why it can have none."""

    kind: str = ""
    gpu: str = ""
    fault: str = ""
    host: str = field(default_factory=socket.gethostname)


def count_gpus(wanted: str) -> int:
    """GPUs that this process sees, where the recipe lets it look for some."""
    return torch.cuda.device_count() if wanted != "cpu" else 0


def choose(wanted: str, *, gpus: int, local_rank: int, local_workers: int) -> str:
    """The device of a worker that sees `gpus` GPUs. A host's workers have one each, or it has none at all.

    Raises:
        RecipeError: there is none for this worker.
    """
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return "cpu"
    if not gpus:
        raise RecipeError(
            f"'train.device' = 'cuda': this machine has 0 GPUs for {local_workers} workers. Use a machine that has "
            f"some, {CPU_INSTEAD}."
        )
    if gpus == 1 and local_workers > 1:  # its own, where CUDA_VISIBLE_DEVICES says so; `compare` finds out
        return "cuda:0"
    if gpus < max(local_workers, local_rank + 1):
        raise RecipeError(
            f"'train.device' = {wanted!r}: this machine has {gpus} GPUs for {local_workers} workers, and each needs "
            f"one of its own. Use {gpus} workers at most, {CPU_INSTEAD}."
        )
    return f"cuda:{local_rank}"


def check_gpus(workers: int, wanted: str) -> None:
    """Refuse more workers than this host has GPUs, before any is started; a host without any has room for all."""
    gpus = count_gpus(wanted)
    if 0 < gpus < workers:
        raise RecipeError(
            f"`--workers {workers}`: this machine has {gpus} GPUs, and each worker needs one of its own. Use {gpus} "
            f"workers at most, {CPU_INSTEAD}."
        )


def describe(device: torch.device) -> Told:
    """What a worker reports of a device."""
    if device.type != "cuda":
        return Told(kind=device.type)
    return Told(kind="cuda", gpu=str(getattr(torch.cuda.get_device_properties(device), "uuid", "")))


def agree(meeting: Meeting, mine: Told) -> None:
    """Send this worker's report to all workers, and read all of theirs. Every worker calls this.

    Raises:
        RecipeError: as `compare` says, on every worker.
    """
    told = meeting.gather("device", json.dumps(dataclasses.asdict(mine)))
    try:
        compare([Told(**json.loads(one)) for one in told])
    except RecipeError:
        with suppress(RuntimeError, LostPeerError):  # the worker that has the store may end when all have read
            meeting.gather("heard", "")
        raise


def compare(everyone: Sequence[Told]) -> None:
    """Refuse workers without a device, of different kinds of device, and on one GPU.

    Raises:
        RecipeError: names them.
    """
    if faults := _sort(everyone, lambda one: one.fault, lambda one: bool(one.fault)):
        raise RecipeError("; ".join(f"{_name(ranks, everyone)}: {fault}" for fault, ranks in faults.items()))
    kinds = _sort(everyone, lambda one: one.kind)
    if len(kinds) > 1:
        told = ", ".join(f"{_name(ranks, everyone)} on {kind!r}" for kind, ranks in kinds.items())
        raise RecipeError(
            f"the workers would compute on different kinds of device, with different bits: {told}. Use at most as many "
            f"workers on each machine as it has GPUs, {CPU_INSTEAD}."
        )
    shared = {
        gpu: ranks
        for gpu, ranks in _sort(everyone, lambda one: one.gpu, lambda one: bool(one.gpu)).items()
        if len(ranks) > 1
    }
    if shared:
        seen = len({one.gpu for one in everyone})
        told = ", ".join(f"{_name(ranks, everyone)} on {gpu}" for gpu, ranks in shared.items())
        raise RecipeError(
            f"several workers would share a GPU, and each needs one of its own: {told}. Use {seen} workers at most, "
            f"let each process see a GPU of its own (CUDA_VISIBLE_DEVICES), {CPU_INSTEAD}."
        )


def _sort(
    everyone: Sequence[Told], key: Callable[[Told], str], among: Callable[[Told], bool] = lambda one: True
) -> Mapping[str, list[int]]:
    """Ranks, grouped by what they report."""
    found: dict[str, list[int]] = {}
    for rank, one in enumerate(everyone):
        if among(one):
            found.setdefault(key(one), []).append(rank)
    return found


def _name(ranks: Sequence[int], everyone: Sequence[Told]) -> str:
    hosts = ", ".join(dict.fromkeys(everyone[rank].host for rank in ranks))
    return f"worker{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} ({hosts})"
