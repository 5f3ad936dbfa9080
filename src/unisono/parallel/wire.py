"""Values between a process and the children that it has forked: small parts as a pickle, large buffers beside it.

Owns how NumPy arrays, Arrow tables, pandas and Polars frames and torch tensors are taken apart, so that their buffers
are copied once and never pickled. What is written here is read by the process at the other end of an anonymous socket
and by nobody else: nothing of it reaches a disk or a network, and nothing that comes from there is read.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any

BUFFER_BYTES = 16 * 1024
"""Smaller buffers travel within the pickle."""

Keep = Callable[[memoryview], bool]
"""Takes a buffer's bytes, and tells whether it has put them where the reader finds them."""


def pack(value: object, keep: Keep) -> memoryview:
    """Return a value as bytes, without the buffers that `keep` took, in the order in which it took them.

    Raises whatever the value raises that cannot be taken apart.
    """

    def stays(buffer: pickle.PickleBuffer) -> bool:
        try:
            content = buffer.raw()
        except BufferError:  # not contiguous
            return True
        return content.nbytes < BUFFER_BYTES or not keep(content)

    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=stays).dump(value)
    return file.getbuffer()


def unpack(content: bytes | bytearray | memoryview, buffers: Sequence[object]) -> Any:
    """Make the value again; its arrays lie in the given buffers."""
    return pickle.loads(content, buffers=buffers)


class _Pickler(pickle.Pickler):
    """Knows the kinds whose own way of being pickled would copy, or would take more than they hold."""

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        module = kind.__module__
        if module.startswith("pyarrow.") and kind.__name__ in ("Table", "RecordBatch"):
            return _reduce_arrow(value)
        if module.startswith("polars.") and kind.__name__ in ("DataFrame", "Series"):
            return _reduce_polars(value)
        if kind.__name__ == "Tensor" and module == "torch":
            return _reduce_tensor(value)
        return NotImplemented


def _reduce_arrow(value: Any) -> Any:
    """A slice would bring along all that it was cut from: such a one is written anew, as an Arrow stream."""
    if value.nbytes * 2 >= value.get_total_buffer_size():
        return NotImplemented
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, value.schema) as writer:
        writer.write(value)
    single = isinstance(value, pa.RecordBatch)
    return _read_stream, (pickle.PickleBuffer(sink.getvalue()), single)


def _read_stream(content: Any, single: bool) -> Any:
    import pyarrow as pa

    reader = pa.ipc.open_stream(pa.py_buffer(content))
    return reader.read_next_batch() if single else reader.read_all()


def _reduce_polars(value: Any) -> Any:
    """As the Arrow buffers that it consists of."""
    import polars

    if isinstance(value, polars.Series):
        return _series, (value.name, polars.DataFrame([value]).to_arrow(compat_level=polars.CompatLevel.newest()))
    return _frame, (value.to_arrow(compat_level=polars.CompatLevel.newest()),)


def _series(name: str, table: Any) -> Any:
    import polars

    return polars.DataFrame(table).to_series().alias(name)


def _frame(table: Any) -> Any:
    import polars

    return polars.DataFrame(table)


def _reduce_tensor(value: Any) -> Any:
    """A plain tensor in host memory as its bytes; what is more (a history, a device) goes torch's own way."""
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
