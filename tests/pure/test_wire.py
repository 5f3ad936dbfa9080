"""Values taken apart and put together: buffers beside the pickle, each value by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from unisono.parallel.wire import BUFFER_BYTES, PLAIN, Packer, Unreadable, travels, unpack


class Unsent:
    def __reduce__(self) -> Any:
        raise TypeError("stays here")


class Unread:
    def __reduce__(self) -> Any:
        return divmod, (1, 0)


def pack(values: list[Any]) -> tuple[bytes, list[int], list[bytes]]:
    kept: list[bytes] = []
    packer = Packer(lambda content: not kept.append(bytes(content)))  # type: ignore[func-returns-value]
    for value in values:
        packer.add(value)
    body, chunks = packer.finish()
    return bytes(body), list(chunks), kept


def test_large_buffers_travel_beside_and_small_ones_within() -> None:
    large, small = np.arange(BUFFER_BYTES, dtype=np.uint8), np.arange(BUFFER_BYTES - 1, dtype=np.uint8)
    body, chunks, kept = pack([large, small, [large, large[::2]]])
    assert kept[0] == large.tobytes() and len(kept) == 2  # the view is not contiguous: NumPy copies it, and it is small
    assert chunks[2::3] == [1, 0, 1]
    back = unpack(body, chunks, kept)
    np.testing.assert_array_equal(back[0], large)
    np.testing.assert_array_equal(back[1], small)
    np.testing.assert_array_equal(back[2][1], large[::2])


def test_a_buffer_that_is_not_kept_travels_within() -> None:
    packer = Packer(lambda content: False)
    packer.add(np.arange(BUFFER_BYTES))
    body, chunks = packer.finish()
    assert len(body) > 8 * BUFFER_BYTES
    np.testing.assert_array_equal(unpack(bytes(body), chunks, ())[0], np.arange(BUFFER_BYTES))


def test_plain_values_in_a_row_share_a_chunk_and_keep_their_place() -> None:
    values = [1, "a", None, [2], 3.5, (4,), (5,), b"6", 7]
    body, chunks, _ = pack(values)
    assert chunks[::3] == [3, 1, 1, 1, 1, 2]
    assert unpack(body, chunks, ()) == values


def test_plain_kinds_cannot_be_changed() -> None:
    for kind in PLAIN - {type(None)}:
        with pytest.raises((AttributeError, TypeError)):
            kind(1).new = 1  # type: ignore[call-arg, union-attr]


def test_a_value_that_cannot_be_taken_apart_leaves_nothing_behind() -> None:
    large = np.zeros(BUFFER_BYTES)
    packer = Packer(lambda content: True)
    packer.add([1])
    with pytest.raises(TypeError, match="stays here"):
        packer.add([large, Unsent()])
    packer.add([large])
    body, chunks = packer.finish()
    assert list(chunks[2::3]) == [0, 1]
    back = unpack(bytes(body), chunks, [large.tobytes()])
    assert back[0] == [1] and (back[1][0] == 0).all()


def test_a_value_that_cannot_be_put_together_does_not_touch_the_others() -> None:
    """Nor their buffers: those of the broken one are passed over."""
    one, two = np.full(BUFFER_BYTES, 1.0), np.full(BUFFER_BYTES, 2.0)
    body, chunks, kept = pack([[one, Unread()], two, 3])
    back = unpack(body, chunks, kept)
    assert isinstance(back[0], Unreadable) and isinstance(back[0].error, ZeroDivisionError)
    np.testing.assert_array_equal(back[1], two)
    assert back[2] == 3


def test_values_share_nothing_and_are_as_they_were_when_added() -> None:
    shared = [0]
    packer = Packer(lambda content: False)
    packer.add(shared)
    shared[0] = 1
    packer.add(shared)
    packer.add((shared, shared))
    body, chunks = packer.finish()
    first, second, both = unpack(bytes(body), chunks, ())
    assert (first, second) == ([0], [1]) and first is not second
    assert both[0] is both[1]  # within a value it stays one object


def test_whether_a_value_travels() -> None:
    assert travels(ValueError("a")) and travels(3)
    assert not travels(Unsent()) and not travels(Unread()) and not travels(lambda: 0)
