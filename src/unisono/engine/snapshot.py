"""A run's state in host memory that outlives its workers: the snapshot.

Three copies of every trained array lie in one anonymous memory file (no name, so nothing outlives the processes; no
room in /dev/shm is needed), which the supervisor opens before it forks and every worker maps. An update reads the
committed copy and writes another; when all workers have written their shards, worker 0 flips one number, and that is
the commit: no worker ever sees an update that only some workers wrote. The third copy is for a checkpoint being written
meanwhile.

    header    sequence number, size of the description, the facts of the last two commits (whose number is even, odd)
    arrays    one copy after the other: weights, optimiser state, averages, counts, integers; then best, and constants
    end       the description, JSON: which tensor of the model lies where; so any process with the file can write
              a checkpoint

Owns the file's layout and the flip. `optimizer.py` and `state.py` define the content of the arrays.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.determinism.space import BLOCK
from unisono.engine.arrays import AVERAGE, BEST, WEIGHTS
from unisono.engine.replica import Replica
from unisono.exchange.protocol import Exchange
from unisono.storage.checkpoints import Content

COPIES = 3
PAGE = 4096
FACTS_BYTES = 16 * PAGE
HEADER_BYTES = PAGE + 2 * FACTS_BYTES
_SEQUENCE, _DESCRIPTION_BYTES = 0, 1
DTYPES = {str(dtype): dtype for dtype in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The description of the file, in plain values.

    arrays: name → (byte offset, dtype, elements); a copied array's name is followed by "/" and the copy's number.
    names: the copied float arrays. segments: (name, start, size, shape) of parameters, then buffers; `parameters` of
    them are parameters. sources: tensor of the module → (array, first element, shape, whether its state_dict has it);
    dtypes: its dtype, which differs from the array's for integers. extra: other facts of the run for a checkpoint.
    """

    arrays: dict[str, tuple[int, str, int]]
    names: list[str]
    segments: list[tuple[str, int, int, list[int]]]
    parameters: int
    sources: dict[str, tuple[str, int, list[int], bool]]
    dtypes: dict[str, str]
    extra: dict[str, Any]
    size_bytes: int


class Snapshot:
    """The memory file of one run, laid out and mapped."""

    def __init__(self, file: int) -> None:
        size = os.fstat(file).st_size
        self._memory = mmap.mmap(file, size)
        self._words = np.frombuffer(self._memory, np.int64, PAGE // 8)
        length = int(self._words[_DESCRIPTION_BYTES])
        self.description = Description(**json.loads(self._memory[size - length :]))

    @staticmethod
    def is_laid_out(file: int) -> bool:
        """Whether the file has its size and its description; false where a worker was lost before writing them."""
        return os.fstat(file).st_size >= HEADER_BYTES and any(
            os.pread(file, 8, 8 * _DESCRIPTION_BYTES)  # written last
        )

    @staticmethod
    def lay_out(file: int, description: Description) -> None:
        """Give a memory file the size that the description requires, and write the description."""
        text = json.dumps({name: getattr(description, name) for name in Description.__slots__}).encode()
        os.ftruncate(file, description.size_bytes + len(text))
        os.pwrite(file, text, description.size_bytes)
        os.pwrite(file, len(text).to_bytes(8, "little"), 8 * _DESCRIPTION_BYTES)

    @property
    def sequence(self) -> int:
        """Number of the last commit; 0: there has been none."""
        return int(self._words[_SEQUENCE])

    def flip(self, sequence: int) -> None:
        """Commit. Only worker 0 calls this, after all have written."""
        self._words[_SEQUENCE] = sequence

    def facts(self) -> dict[str, Any]:
        """The facts of the last commit."""
        start = PAGE + self.sequence % 2 * FACTS_BYTES
        length = int.from_bytes(self._memory[start : start + 8], "little")
        found: dict[str, Any] = json.loads(self._memory[start + 8 : start + 8 + length])
        return found

    def write_facts(self, sequence: int, facts: Mapping[str, Any]) -> None:
        """Write the facts of a commit that is to come."""
        text = json.dumps(facts).encode()
        assert len(text) + 8 <= FACTS_BYTES, "facts are few"
        start = PAGE + sequence % 2 * FACTS_BYTES
        self._memory[start + 8 : start + 8 + len(text)] = text
        self._memory[start : start + 8] = len(text).to_bytes(8, "little")

    def array(self, name: str, copy: int | None = None) -> Tensor:
        """A whole array; of a copied one, this copy."""
        offset, dtype, elements = self.description.arrays[name if copy is None else f"{name}/{copy}"]
        return self._view(offset, DTYPES[dtype], elements)

    def _view(self, offset: int, dtype: torch.dtype, elements: int) -> Tensor:
        if not elements:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=elements, offset=offset)

    def _part(self, array: str, start: int, shape: Sequence[int]) -> Tensor:
        """A part of an array as a tensor of its own, which can be written to a file without a copy."""
        offset, dtype, _ = self.description.arrays[array]
        kind = DTYPES[dtype]
        return self._view(offset + start * kind.itemsize, kind, math.prod(shape)).view(list(shape))

    def content(self, facts: Mapping[str, Any]) -> Content:
        """The content of a checkpoint of the commit with these facts. Tensors are views: they stay unchanged while the
        commit is pinned, or is the last one or the one before."""
        told = self.description
        copy = int(facts["copy"])
        kept = [name for name in told.names if name != WEIGHTS] + ([BEST] if facts["has_best"] else [])
        optimizer: dict[str, Tensor] = {}
        for name in kept:
            whole = name in (AVERAGE, BEST)
            array = name if name == BEST else f"{name}/{copy}"
            for segment, start, _, shape in told.segments if whole else told.segments[: told.parameters]:
                optimizer[f"{name}.{segment}"] = self._part(array, start, shape)
        for number, (segment, *_) in enumerate(told.segments[: told.parameters]):
            optimizer[f"updates.{segment}"] = self._part(f"counts/{copy}", number, ())
        if facts["has_best"]:
            optimizer["best_integers"] = self.array("best_integers")
        module: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        for name, (array, start, shape, saved) in told.sources.items():
            copied = f"{array}/{copy}" if array in (WEIGHTS, "integers") else array
            module[saved][name] = self._part(copied, start, shape).to(DTYPES[told.dtypes[name]])
        progress = {name: value for name, value in facts.items() if name not in ("copy", "pinned", "has_best")}
        return Content(parameters=module[True], buffers=module[False], optimizer=optimizer, facts=progress | told.extra)


class SnapshotArrays:
    """The arrays of a run in its snapshot. Shards are cut from whole arrays, so any number of workers can use them.

    With `direct`, updates are computed in the snapshot itself (on CPUs); else in private arrays on the worker's device,
    from which each commit copies.
    """

    def __init__(
        self,
        file: int,
        names: Sequence[str],
        replica: Replica,
        exchange: Exchange,
        *,
        most_workers: int,
        extra: Mapping[str, Any],
        direct: bool,
    ) -> None:
        self._exchange = exchange
        self._replica = replica
        self._direct = direct
        if exchange.rank == 0 and not Snapshot.is_laid_out(file):
            Snapshot.lay_out(file, describe(names, replica, most_workers, extra))
        exchange.wait_for_all()
        self.snapshot = Snapshot(file)
        self._names = list(names)
        self._copy = self._next = 0
        self._pinned = -1
        self._wholes: dict[tuple[str, int | None], Tensor] = {}
        if self.committed:
            facts = self.snapshot.facts()
            self._copy = self._next = int(facts["copy"])
            self._pinned = int(facts["pinned"])
        elif exchange.rank == 0:
            self._write_constants()
        self._arrays = self._cut(self._copy)
        if not self._direct:
            self._arrays = {name: array.to(replica.flat.device, copy=True) for name, array in self._arrays.items()}

    @property
    def committed(self) -> bool:
        """Whether there is a commit to go on from."""
        return self.snapshot.sequence > 0

    @property
    def in_place(self) -> bool:
        """Whether updates are computed in private arrays."""
        return not self._direct

    def integers(self) -> tuple[Tensor, Tensor]:
        """The committed counts of updates, and integer buffers."""
        return self.snapshot.array("counts", self._copy), self.snapshot.array("integers", self._copy)

    def mine(self) -> dict[str, Tensor]:
        return self._arrays

    def best(self) -> Tensor:
        return self._replica.shard.of(self.snapshot.array(BEST))

    def best_integers(self) -> Tensor:
        return self.snapshot.array("best_integers")

    def begin(self) -> dict[str, Tensor]:
        self._next = next(copy for copy in range(COPIES) if copy not in (self._copy, self._pinned))
        return self._cut(self._next) if self._direct else self._arrays

    def commit(self, facts: Mapping[str, Any], counts: Tensor, integers: Tensor, *, met: bool = False) -> None:
        if self._direct:
            self._arrays = self._cut(self._next)
        else:
            for name, array in self._cut(self._next).items():
                array.copy_(self._arrays[name])
        if self._exchange.rank == 0:
            self.snapshot.array("counts", self._next).copy_(counts)
            self.snapshot.array("integers", self._next).copy_(integers)
        self._copy = self._next
        self._conclude(facts, met=met)

    def note(self, facts: Mapping[str, Any]) -> None:
        self._conclude(facts, met=False)

    def _conclude(self, facts: Mapping[str, Any], *, met: bool) -> None:
        """Flip, when all have written. No worker waits for it: if worker 0 is lost before it, the others notice in
        their next exchange, before they write anything, and go back to the commit before."""
        if not met:
            self._exchange.wait_for_all()
        if self._exchange.rank == 0:
            sequence = self.snapshot.sequence + 1
            self.snapshot.write_facts(sequence, {**facts, "copy": self._copy, "pinned": self._pinned})
            self.snapshot.flip(sequence)

    def pin(self) -> None:
        self._pinned = self._copy

    def whole(self, name: str) -> Tensor:
        """Every array was complete when it was committed; the best weights, when their facts were written."""
        copy = None if name == BEST else self._copy
        if (name, copy) not in self._wholes:
            self._wholes[name, copy] = self.snapshot.array(name, copy)[: self._replica.shard.padded_space]
        return self._wholes[name, copy].to(self._replica.flat.device)

    def _cut(self, copy: int) -> dict[str, Tensor]:
        return {name: self._replica.shard.of(self.snapshot.array(name, copy)) for name in self._names}

    def _write_constants(self) -> None:
        """Write the tensors that no step changes (frozen weights, for example), for the writer of a checkpoint."""
        tensors = self._replica.all_tensors()
        for name, (array, _, _, _) in self.snapshot.description.sources.items():
            if array.startswith("constant "):
                self.snapshot.array(array).copy_(tensors[name].reshape(-1))


def describe(names: Sequence[str], replica: Replica, most_workers: int, extra: Mapping[str, Any]) -> Description:
    """Lay out the snapshot of a replica, for any number of workers up to `most_workers`."""
    space = replica.space
    elements = (space.blocks + most_workers - 1) * BLOCK  # equal shards need less than one block of padding per worker
    position = HEADER_BYTES
    arrays: dict[str, tuple[int, str, int]] = {}

    def place(name: str, dtype: torch.dtype, count: int) -> None:
        nonlocal position
        arrays[name] = (position, str(dtype), count)
        position += -(-count * dtype.itemsize // PAGE) * PAGE

    integers = int(replica.integer_values().numel())
    for copy in range(COPIES):
        for name in names:
            place(f"{name}/{copy}", space.dtype, elements)
        place(f"counts/{copy}", torch.int64, len(space.parameters))
        place(f"integers/{copy}", torch.int64, integers)
    place(BEST, space.dtype, elements)
    place("best_integers", torch.int64, integers)
    sources: dict[str, tuple[str, int, list[int], bool]] = {}
    saved = replica.tensors()
    for name, tensor in replica.all_tensors().items():
        array, start = replica.locate(tensor)
        if array == "constant":
            array = f"constant {name}"
            place(array, tensor.dtype, tensor.numel())
        sources[name] = (array, start, list(tensor.shape), name in saved)
    return Description(
        arrays=arrays,
        names=list(names),
        segments=[(one.name, one.start, one.size, list(one.shape)) for one in space.segments],
        parameters=len(space.parameters),
        sources=sources,
        dtypes={name: str(tensor.dtype) for name, tensor in replica.all_tensors().items()},
        extra=dict(extra),
        size_bytes=position,
    )


def new_file() -> int:
    """An empty memory file for a snapshot; −1 where the system has no memory files, or limits the size of files."""
    import resource

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY  # also limits memory files
    return os.memfd_create("unisono") if hasattr(os, "memfd_create") and unlimited else -1
