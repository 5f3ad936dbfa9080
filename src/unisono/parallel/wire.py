"""Values between a process and its own children: small parts as a pickle, large buffers beside it.

Owns how NumPy arrays, Arrow tables, pandas and Polars frames and torch tensors are taken apart, so that their buffers
are copied once and never pickled. Only two readers exist: a process at the other end of an anonymous socket, and
children that have inherited an anonymous memory file. Nothing of it reaches a disk or a network, and nothing is read
from one.
"""

from __future__ import annotations

import io
import pickle
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BUFFER_BYTES = 16 * 1024
"""Smaller buffers are part of the pickle."""

Keep = Callable[[memoryview], bool]
"""Takes a buffer's bytes, and returns whether it has put them where the reader finds them."""


PLAIN = {type(None), bool, int, float, complex, str, bytes, np.float64, np.float32, np.int64, np.int32, np.bool_}
"""Values of these kinds cannot be changed: many of them are packed at once, which is ten times as fast."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that cannot be rebuilt."""

    error: Exception


class Packer:
    """Values one after the other, each as it is when it is added: memory that two of them share, or later
    changes, make no difference.

    keep: takes large buffers.
    pickler: one to use instead of Python's own; it uses `reduce`.
    """

    def __init__(self, keep: Keep, pickler: Callable[..., pickle.Pickler] | None = None) -> None:
        kept = self._kept = array("Q")
        self._chunks = array("Q")  # values, bytes, buffers; values, bytes, buffers …
        self._plain: list[object] = []
        self._file = io.BytesIO()

        def stays(buffer: pickle.PickleBuffer) -> bool:
            try:
                content = buffer.raw()
            except BufferError:  # not contiguous
                return True
            if content.nbytes < BUFFER_BYTES or not keep(content):
                return True
            kept.append(content.nbytes)
            return False

        self._pickler = (pickler or _Pickler)(self._file, protocol=5, buffer_callback=stays)

    def add(self, value: object) -> None:
        """Pack a value. If it cannot be taken apart, its error is raised, and the value is left out."""
        if type(value) in PLAIN:
            self._plain.append(value)
            return
        self._flush()
        self._dump([value])

    def finish(self) -> tuple[memoryview, array]:
        """The values' bytes, without the buffers that were kept, and the facts that `unpack` needs."""
        self._flush()
        return self._file.getbuffer(), self._chunks

    def _flush(self) -> None:
        if self._plain:
            self._dump(self._plain)
            self._plain = []

    def _dump(self, values: list[Any]) -> None:
        begin, kept = self._file.tell(), len(self._kept)
        try:
            self._pickler.dump(values)
        except BaseException:
            self._file.seek(begin)
            self._file.truncate()
            del self._kept[kept:]
            raise
        finally:
            self._pickler.clear_memo()
        self._chunks.extend((len(values), self._file.tell() - begin, len(self._kept) - kept))


def unpack(content: bytes | memoryview, chunks: Sequence[int], buffers: Sequence[object]) -> list[Any]:
    """Make the values again; their arrays lie in the given buffers."""
    values: list[Any] = []
    view, at, taken = memoryview(content), 0, 0
    for count, size, kept in zip(chunks[::3], chunks[1::3], chunks[2::3], strict=True):
        try:
            values += pickle.loads(view[at : at + size], buffers=buffers[taken : taken + kept])
        except Exception as error:  # noqa: BLE001 - a user's class; reported with its item
            values += [Unreadable(error)] * count
        at += size
        taken += kept
    return values


def travels(value: object) -> bool:
    """Whether a value can be sent and rebuilt."""
    packer = Packer(lambda content: False)
    try:
        packer.add(value)
    except Exception:  # noqa: BLE001 - a user's class
        return False
    return not isinstance(unpack(*packer.finish(), ())[0], Unreadable)


class _Pickler(pickle.Pickler):
    """Has its own way for the kinds whose own pickling would copy, or would take more than they hold."""

    def reducer_override(self, value: Any) -> Any:
        return reduce(value)


def reduce(value: Any) -> Any:
    """How a value is taken apart; NotImplemented: in its own way."""
    kind = type(value)
    module = kind.__module__
    if module == "pyarrow.lib":
        return _reduce_arrow(value)
    if module.startswith("polars.") and kind.__name__ in ("DataFrame", "Series"):
        return _reduce_polars(value)
    if kind.__name__ == "Tensor" and module == "torch":
        return _reduce_tensor(value)
    return NotImplemented


def _reduce_arrow(value: Any) -> Any:
    """A slice would include everything that it was cut from, so it is written anew, as an Arrow stream."""
    import pyarrow as pa

    if isinstance(value, pa.Array | pa.ChunkedArray):
        column: tuple[str, Any] = ("array" if isinstance(value, pa.Array) else "column", pa.table({"": value}))
    elif isinstance(value, pa.Table | pa.RecordBatch):
        column = ("table" if isinstance(value, pa.Table) else "batch", value)
    else:
        return NotImplemented
    if value.nbytes * 2 >= value.get_total_buffer_size():
        return NotImplemented
    kind, table = column
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write(table)
    return _read_stream, (pickle.PickleBuffer(sink.getvalue()), kind)


def _read_stream(content: Any, kind: str) -> Any:
    import pyarrow as pa

    reader = pa.ipc.open_stream(pa.py_buffer(content))
    if kind == "batch":
        return reader.read_next_batch()
    table = reader.read_all()
    if kind == "table":
        return table
    return table.column(0).combine_chunks() if kind == "array" else table.column(0)


def _reduce_polars(value: Any) -> Any:
    """A frame as its Arrow buffers, column by column: Polars would make a table in threads, and wait without end for
    threads that a forked process does not have."""
    import polars

    single = isinstance(value, polars.Series)
    columns = []
    for column in [value] if single else value.get_columns():
        array = column.to_arrow(compat_level=polars.CompatLevel.newest())
        if polars.Series(column.name, array).dtype != column.dtype:
            return NotImplemented  # such as an Enum: Arrow does not carry its categories
        columns.append((column.name, array))
    return _frame, (columns, single)


def _frame(columns: list[tuple[str, Any]], single: bool) -> Any:
    import polars

    made = [polars.Series(name, array) for name, array in columns]
    return made[0] if single else polars.DataFrame(made)


def _reduce_tensor(value: Any) -> Any:
    """A plain tensor in host memory as its bytes; any other (with a history, on a device) is pickled by torch."""
    torch = sys.modules["torch"]
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.requires_grad or value.is_conj() or value.is_neg():
        return NotImplemented
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    return _tensor, (pickle.PickleBuffer(flat.numpy()), value.dtype, tuple(value.shape))


def _tensor(content: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    import torch

    if not memoryview(content).nbytes:
        return torch.empty(shape, dtype=dtype)
    if memoryview(content).readonly:
        content = bytearray(content)
    return torch.frombuffer(content, dtype=torch.uint8).view(dtype).reshape(shape)
