"""Addition and multiplication of arrays by many workers, to the same bits on any number of them.

Owns the blocks. Both cut the result into blocks that the shape alone decides; a block is computed by one worker, with
one thread. Products are computed from copies in aligned, contiguous memory, so no bit depends on the number of workers,
or on where and how the operands lie in memory.

- `add`: the parts of a block are added in the fixed binary tree of `determinism.nodes`, over the parts' numbers.
  Pairwise summation: the error grows with log2 of the number of parts (Higham, Accuracy and Stability of Numerical
  Algorithms, 2nd ed., section 4.2).
- `matmul`: the blocked algorithm (Golub and Van Loan, Matrix Computations, 4th ed., section 1.5.4). A block of the
  result is the sum of products of panels, up to `PANEL` columns of the left operand by as many rows of the right one,
  added in the same tree; a product is one call of the library's own (NumPy's BLAS for arrays, torch's for tensors).

What is sent: with local processes only the numbers of blocks, since workers inherit the operands and write into memory
that all share. With other engines a block's rows and columns are sent, and the block is returned.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from unisono.errors import ParallelError
from unisono.parallel.calls import Progress, find_engine, map
from unisono.parallel.executor import Engine
from unisono.parallel.gathering import Combined

BLOCK = 1024
"""Rows and columns of a block of a product."""

PANEL = 4096
"""Columns of the left operand that are multiplied at once: 16 MiB of float32 beside a block's rows."""

ELEMENTS = 1 << 17
"""The largest size of a block of a sum (it has at least one row)."""

Array = TypeVar("Array", np.ndarray, Any)  # or torch.Tensor

_ALIGNMENT_BYTES = 64


def add(
    parts: Sequence[Array],
    *,
    out: Array | None = None,
    workers: int | str = "auto",
    engine: str | Engine = "processes",
    progress: Progress = None,
) -> Array:
    """Add arrays of one shape and dtype, element by element.

    Args:
        parts: NumPy arrays, also memory-mapped ones, or torch tensors in host memory. Half-precision floats are added
            in float32 and rounded once; integers wrap around, as NumPy's do.
        out: where the sum goes, for instance a `numpy.memmap`, where it is larger than memory.

    Returns:
        `out`, or a new array in memory that this process shares with its later children.

    Raises:
        ParallelError: there are no parts, or they differ in shape, dtype or kind.
        TaskError: a worker could not do its block.
    """
    if not len(parts):
        raise ParallelError("add: there are no parts, so no shape either. Give at least one array.")
    first = parts[0]
    for number, part in enumerate(parts):
        _check_array(part, f"part {number}")
        if (tuple(part.shape), part.dtype, type(part).__module__ == "torch") != (
            tuple(first.shape),
            first.dtype,
            type(first).__module__ == "torch",
        ):
            raise ParallelError(
                f"add: part {number} is {_tell(part)}, part 0 is {_tell(first)}. Give parts of one shape and dtype."
            )
    shape = tuple(first.shape) or (1,)
    flat = [part.reshape(shape) for part in parts]
    rows = max(1, ELEMENTS // max(math.prod(shape[1:]), 1))
    blocks = [(slice(start, min(start + rows, shape[0])),) for start in range(0, shape[0], rows)]
    wide = _accumulator(first.dtype)

    def total(*pieces: Any) -> Any:
        combined: Combined = Combined(_add_owned)
        for number, piece in enumerate(pieces):
            same = piece.dtype == wide
            combined.put_leaf(number, _Term(value=piece if same else _copy(piece, wide), owned=not same))
        return combined.finish()[0].value

    def operands(block: tuple[slice, ...]) -> tuple[Any, ...]:
        return tuple(part[block] for part in flat)

    given = None if out is None else _check_out(out, first, tuple(first.shape)).reshape(shape)
    result = _compute(total, operands, blocks, shape, first, given, workers, engine, progress)
    return out if out is not None else result.reshape(tuple(first.shape))


def matmul(
    a: Array,
    b: Array,
    *,
    out: Array | None = None,
    workers: int | str = "auto",
    engine: str | Engine = "processes",
    progress: Progress = None,
) -> Array:
    """Multiply two matrices: [m, k] times [k, n] is [m, n].

    Args:
        a, b: NumPy arrays, also memory-mapped ones, or torch tensors in host memory; both of one kind and dtype.
            Half-precision floats are multiplied and added in float32 and rounded once.
        out: where the product goes, for instance a `numpy.memmap`, where it is larger than memory.

    Returns:
        `out`, or a new array in memory that this process shares with its later children.

    Raises:
        ParallelError: an operand is no matrix, or they do not fit each other.
        TaskError: a worker could not do its block.
    """
    for name, operand in (("a", a), ("b", b)):
        _check_array(operand, name)
        if operand.ndim != 2:
            raise ParallelError(f"matmul: {name} is {_tell(operand)}. Give matrices, of two dimensions.")
    if a.shape[1] != b.shape[0]:
        raise ParallelError(f"matmul: a is {_tell(a)}, b is {_tell(b)}. a needs as many columns as b has rows.")
    if a.dtype != b.dtype or (type(a).__module__ == "torch") != (type(b).__module__ == "torch"):
        raise ParallelError(f"matmul: a is {_tell(a)}, b is {_tell(b)}. Give both the same kind and dtype.")
    shape = (a.shape[0], b.shape[1])
    blocks = [
        (slice(row, min(row + BLOCK, shape[0])), slice(column, min(column + BLOCK, shape[1])))
        for row in range(0, shape[0], BLOCK)
        for column in range(0, shape[1], BLOCK)
    ]
    wide = _accumulator(a.dtype)

    def product(left: Any, right: Any) -> Any:
        combined: Combined = Combined(_add_to_left)
        for number, start in enumerate(range(0, max(left.shape[1], 1), PANEL)):
            panel = slice(start, start + PANEL)
            combined.put_leaf(number, _copy(left[:, panel], wide) @ _copy(right[panel], wide))
        return combined.finish()[0]

    def operands(block: tuple[slice, ...]) -> tuple[Any, Any]:
        return a[block[0]], b[:, block[1]]

    given = None if out is None else _check_out(out, a, shape)
    return _compute(product, operands, blocks, shape, a, given, workers, engine, progress)


def _compute(
    function: Callable[..., Any],
    operands: Callable[[tuple[slice, ...]], tuple[Any, ...]],
    blocks: Sequence[tuple[slice, ...]],
    shape: tuple[int, ...],
    like: Any,
    out: Any,
    workers: int | str,
    engine: str | Engine,
    progress: Progress,
) -> Any:
    """Fill each block of the result with what the function returns for the block's operands."""
    chosen = find_engine(engine)
    settings: dict[str, Any] = {"workers": workers, "seed": None, "progress": progress, "engine": chosen}
    shared = chosen.inherits and (out is None or _is_shared(out))
    result = out if out is not None and (shared or not chosen.inherits) else _new_shared(shape, like)
    if chosen.inherits:

        def fill(number: int) -> None:
            block = blocks[number]
            result[block] = _narrow(function(*operands(block)), result)

        for _ in map(fill, range(len(blocks)), **settings):
            pass
    else:

        def compute(pieces: tuple[Any, ...]) -> Any:
            return function(*pieces)

        pieces: Iterator[Any] = (operands(block) for block in blocks)
        for block, value in zip(blocks, map(compute, pieces, **settings), strict=True):
            result[block] = _narrow(value, result)
    if out is not None and out is not result:
        out[...] = result
        return out
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Term:
    """A part of a sum. owned: no other code reads it, so another part can be added to it in place."""

    value: Any
    owned: bool


def _add_owned(left: _Term, right: _Term) -> _Term:
    """An addition is rounded in one way only, wherever its operands lie, so they need no copies."""
    if left.owned:
        value = _add_to_left(left.value, right.value)
    elif right.owned:
        value = _add_to_left(right.value, left.value)  # equal bits either way, except for the payloads of two NaNs
    else:
        value = left.value + right.value
    return _Term(value=value, owned=True)


def _add_to_left(left: Any, right: Any) -> Any:
    left += right
    return left


def _copy(piece: Any, dtype: Any) -> Any:
    """A copy in contiguous memory that starts at a multiple of 64 bytes."""
    if type(piece).__module__ == "torch":
        copy = sys.modules["torch"].empty(tuple(piece.shape), dtype=dtype)  # torch aligns what it allocates
        return copy.copy_(piece)
    room = np.empty(piece.size * np.dtype(dtype).itemsize + _ALIGNMENT_BYTES, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT_BYTES
    copy = room[start : start + room.size - _ALIGNMENT_BYTES].view(dtype).reshape(piece.shape)
    copy[...] = piece
    return copy


def _narrow(value: Any, result: Any) -> Any:
    return value.to(result.dtype) if type(value).__module__ == "torch" else value.astype(result.dtype, copy=False)


def _accumulator(dtype: Any) -> Any:
    """The dtype to add in: float32 for half-precision floats, else the same."""
    if isinstance(dtype, np.dtype):
        return np.dtype(np.float32) if dtype == np.float16 else dtype
    torch = sys.modules["torch"]
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _new_shared(shape: tuple[int, ...], like: Any) -> Any:
    """An array that children share with this process; it is freed with the last reference to it."""
    size = max(math.prod(shape), 1)
    if isinstance(like.dtype, np.dtype):
        memory = mmap.mmap(-1, size * like.dtype.itemsize)
        return np.frombuffer(memory, like.dtype, math.prod(shape)).reshape(shape)
    memory = mmap.mmap(-1, size * like.element_size())
    return sys.modules["torch"].frombuffer(memory, dtype=like.dtype, count=size)[: math.prod(shape)].reshape(shape)


def _is_shared(out: Any) -> bool:
    """Whether children share what this process maps there, in both directions."""
    if isinstance(out, np.memmap):
        return out.mode in ("r+", "w+")
    return bool(getattr(out, "is_shared", bool)())


def _check_array(value: Any, name: str) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.device.type != "cpu" or value.layout != torch.strided:
            raise ParallelError(f"{name} is on {value.device}, {value.layout}. Give dense tensors in host memory.")
        if value.requires_grad:
            raise ParallelError(f"{name} requires gradients, which do not pass. Give {name}.detach().")
        if value.dtype == torch.bool:
            raise ParallelError(f"{name} is {_tell(value)}: allowed are numbers.")
        return
    if not isinstance(value, np.ndarray):
        raise ParallelError(f"{name} is {type(value).__name__}: allowed are NumPy arrays and torch tensors.")
    if value.dtype.kind not in "iufc":
        raise ParallelError(f"{name} is {_tell(value)}: allowed are numbers.")


def _check_out(out: Any, like: Any, shape: tuple[int, ...]) -> Any:
    _check_array(out, "out")
    if tuple(out.shape) != shape or out.dtype != like.dtype:
        raise ParallelError(f"out is {_tell(out)}, but the result is {list(shape)} of {like.dtype}. Give such a one.")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ParallelError("out cannot be written to. Open it with mode='r+' or 'w+'.")
    return out


def _tell(value: Any) -> str:
    return f"{type(value).__name__} {list(value.shape)} of {value.dtype}"
