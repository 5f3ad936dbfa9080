"""Parquet files that bytes describe: every type, with values that are valid for Arrow and for nobody else.

Owns the way from bytes to a table. Any bytes describe one; the same bytes always the same.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

NAMES = ("text", "label", "third", "te\u00e4xt", "")
COMPRESSIONS = ("none", "snappy", "gzip", "zstd")
MOST_ROWS, MOST_COLUMNS = 9, 4


class Draw:
    """Numbers and strings of bytes, taken from the front of an input; zeros at its end."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def take(self, size: int) -> bytes:
        taken, self._content = self._content[:size], self._content[size:]
        return taken.ljust(size, b"\0")

    def number(self, below: int) -> int:
        return self.take(1)[0] % below

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little", signed=True)

    def text(self) -> bytes:
        size = self.number(12)
        return self._content[:size] if len(self._content) <= size else self.take(size)


Make = Callable[[Draw, int], pa.Array]


def _binary(draw: Draw, count: int) -> pa.Array:
    return pa.array([draw.text() if draw.number(5) else None for _ in range(count)], pa.binary())


def _string(draw: Draw, count: int) -> pa.Array:
    """Strings that need not be UTF-8: Arrow does not look."""
    array = _binary(draw, count)
    return pa.Array.from_buffers(pa.string(), count, array.buffers())


def _dictionary(draw: Draw, count: int) -> pa.Array:
    words = _string(draw, 3)
    return pa.DictionaryArray.from_arrays(pa.array([draw.number(3) for _ in range(count)], pa.int32()), words)


def _list(draw: Draw, count: int) -> pa.Array:
    lengths = [draw.number(3) for _ in range(count)]
    offsets = pa.array([sum(lengths[:number]) for number in range(count + 1)], pa.int32())
    return pa.ListArray.from_arrays(offsets, _string(draw, sum(lengths)))


def _struct(draw: Draw, count: int) -> pa.Array:
    return pa.StructArray.from_arrays([_string(draw, count), _binary(draw, count)], names=["a", "b"])


def _map(draw: Draw, count: int) -> pa.Array:
    return pa.MapArray.from_arrays(list(range(count + 1)), _fixed(pa.int32(), 4)(draw, count), _string(draw, count))


def _fixed(kind: pa.DataType, size: int) -> Make:
    """Values of a type of fixed width, of any bits."""

    def make(draw: Draw, count: int) -> pa.Array:
        return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(draw.take(size * count))])

    return make


def _bools(draw: Draw, count: int) -> pa.Array:
    return pa.array([bool(draw.number(2)) for _ in range(count)])


def _nulls(draw: Draw, count: int) -> pa.Array:
    return pa.nulls(count)


_WIDTHS = {
    pa.int8(): 1,
    pa.uint64(): 8,
    pa.float16(): 2,
    pa.float64(): 8,
    pa.decimal128(38, 3): 16,
    pa.date32(): 4,
    pa.time64("ns"): 8,
    pa.duration("us"): 8,
    pa.binary(5): 5,
    **{pa.timestamp(unit): 8 for unit in ("ms", "us", "ns")},
    **{pa.timestamp("us", zone): 8 for zone in ("UTC", "Europe/Berlin", "Nowhere/There", "+25:99")},
}
_OF_ANY_BITS = [_fixed(kind, size) for kind, size in _WIDTHS.items()]
MAKERS: tuple[Make, ...] = (
    _string,
    _binary,
    _dictionary,
    _list,
    _struct,
    _map,
    _bools,
    _nulls,
    *_OF_ANY_BITS,
)


def build_parquet(content: bytes) -> bytes:
    """Return the Parquet file that these bytes describe."""
    draw, written = Draw(content), io.BytesIO()
    count = draw.number(MOST_ROWS)
    columns, names = [], []
    for number in range(1 + draw.number(MOST_COLUMNS)):
        names.append(NAMES[number if draw.number(4) else draw.number(len(NAMES))])
        columns.append(MAKERS[draw.number(len(MAKERS))](draw, count))
    table = pa.Table.from_arrays(columns, names=names)
    try:
        pq.write_table(
            table,
            written,
            row_group_size=1 + draw.number(4),
            compression=COMPRESSIONS[draw.number(len(COMPRESSIONS))],
            use_dictionary=bool(draw.number(2)),
            store_schema=bool(draw.number(2)),
            write_statistics=False,
        )
    except (pa.ArrowException, UnicodeDecodeError):
        return content  # it cannot be written: the bytes as they are will do
    return written.getvalue()
