"""What travels between a process and its workers: every kind of value there and back, equal, and no more than it holds."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from unisono import parallel
from unisono.parallel import local_processes as local
from unisono.parallel.wire import BUFFER_BYTES

LARGE = 3 * BUFFER_BYTES  # elements: beside the pickle; small ones travel within


def echo(items: list[Any], **arguments: Any) -> list[Any]:
    return list(parallel.map(lambda item: item, items, workers=1, **arguments))


def make_structured(count: int) -> np.ndarray:
    made = np.zeros(count, [("name", "U5"), ("value", "<f8"), ("inner", "<i2", (2,))])
    made["value"] = np.arange(count)
    made["name"] = "é"
    return made


def make_read_only(count: int) -> np.ndarray:
    made = np.arange(count)
    made.flags.writeable = False
    return made


ARRAYS: dict[str, Callable[[int], np.ndarray]] = {
    "plain": lambda count: np.arange(count, dtype=np.float64),
    "every other": lambda count: np.arange(2 * count)[::2],
    "backwards": lambda count: np.arange(count)[::-1],
    "columns first": lambda count: np.asfortranarray(np.arange(count - count % 3).reshape(3, -1)),
    "a part of a matrix": lambda count: np.arange(4 * count).reshape(4, -1)[1:3, 1:],
    "structured": make_structured,
    "read only": make_read_only,
    "big endian": lambda count: np.arange(count, dtype=">i4"),
    "booleans": lambda count: np.arange(count) % 3 == 0,
    "texts": lambda count: np.array(["a", "bcd", ""] * count),
    "dates": lambda count: np.arange(count).astype("datetime64[ns]"),
    "objects": lambda count: np.array([None, "a", (1, 2)] * (count // 3), dtype=object),
    "no elements": lambda count: np.empty((0, count), np.float32),
    "no dimensions": lambda count: np.array(1.5),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_numpy_arrays_come_back_equal(kind: str) -> None:
    for array in (ARRAYS[kind](12), ARRAYS[kind](LARGE)):
        (back,) = echo([array])
        assert back.dtype == array.dtype and back.shape == array.shape
        np.testing.assert_array_equal(back, array)
        assert back.flags.writeable == array.flags.writeable
        if array.dtype != object:
            assert back.tobytes() == array.tobytes()


def test_numpy_scalars_and_nan_payloads_keep_their_bits() -> None:
    odd = np.array([0x7FF8000000001234, 0x8000000000000000], np.uint64).view(np.float64)
    values = [np.float32(0.1), np.int64(3), np.bool_(True), np.float64(-0.0), odd]
    for value, back in zip(values, echo(values), strict=True):
        assert type(back) is type(value) and back.tobytes() == value.tobytes()


PLAIN = [
    None,
    True,
    3,
    2**200,
    1.5,
    float("inf"),
    2j,
    "é\ud800",
    b"\0",
    (1, [2, {3: {4}}]),
    frozenset({1}),
    range(3),
    ...,
]


def test_plain_values_keep_their_kinds() -> None:
    """Many of a kind in a batch, and mixed with others that are packed by themselves."""
    items = [value for _ in range(30) for value in PLAIN]
    random.Random(0).shuffle(items)
    back = echo(items)
    assert back == items and [type(value) for value in back] == [type(value) for value in items]
    (nan,) = echo([float("nan")])
    assert nan != nan
    (long,) = echo(["x" * (1 << 20)])
    assert long == "x" * (1 << 20)


def make_table(count: int) -> pa.Table:
    return pa.table(
        {
            "text": pa.array([f"text {number}" if number % 3 else None for number in range(count)]),
            "number": pa.array(np.arange(count)),
            "flag": pa.array([None, True, False, True] * (count // 4)),
            "list": pa.array([[number, None] for number in range(count)]),
            "category": pa.array(["a", "b", None, "a"] * (count // 4)).dictionary_encode(),
        }
    ).replace_schema_metadata({"a": "b"})


ARROW: dict[str, Callable[[pa.Table], Any]] = {
    "table": lambda table: table,
    "slice": lambda table: table.slice(5, 7),
    "slice of some chunks": lambda table: pa.concat_tables([table, table]).slice(len(table) - 3, 6),
    "no rows": lambda table: table.slice(0, 0),
    "batch": lambda table: table.to_batches()[0],
    "slice of a batch": lambda table: table.to_batches()[0].slice(3, 4),
    "column": lambda table: table["text"],
    "slice of a column": lambda table: table["text"].slice(3, 5),
    "slice of an array": lambda table: table["text"].chunk(0).slice(3, 5),
    "schema": lambda table: table.schema,
    "scalar": lambda table: table["text"][1],
}


@pytest.mark.parametrize("kind", ARROW)
def test_arrow_comes_back_equal(kind: str) -> None:
    for count in (16, 4000):
        value = ARROW[kind](make_table(count))
        (back,) = echo([value])
        assert type(back) is type(value) and back.equals(value)
        if isinstance(value, pa.Table | pa.RecordBatch):
            assert back.schema.equals(value.schema, check_metadata=True)
            back.validate(full=True)


@pytest.mark.parametrize("kind", [kind for kind in ARROW if "slice" in kind])
def test_a_slice_does_not_bring_along_what_it_was_cut_from(kind: str, sent: list[int]) -> None:
    whole = make_table(100_000)  # about 4 MB
    echo([ARROW[kind](whole)])
    assert max(sent) < 20_000


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each message to a worker."""
    sizes: list[int] = []
    send = local._Worker.send

    def note(self: Any, batch: Any) -> Any:
        faults = send(self, batch)
        sizes.append(self._bytes[batch.id])
        return faults

    monkeypatch.setattr(local._Worker, "send", note)
    return sizes


def make_pandas(count: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": pd.array([f"text {number}" if number % 3 else None for number in range(count)], dtype="str"),
            "objects": pd.Series([("a", 1), None] * (count // 2), dtype=object),
            "number": np.arange(count) / 3,
            "nullable": pd.array([1, None] * (count // 2), dtype="Int64"),
            "category": pd.Categorical(["x", "y"] * (count // 2)),
            "time": pd.date_range("2026-01-01", periods=count, freq="s", tz="Europe/Berlin"),
        },
        index=pd.Index(range(7, 7 + count), name="row"),
    )


def make_polars(count: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "text": [f"text {number}" if number % 3 else None for number in range(count)],
            "number": pl.Series(np.arange(count, dtype=np.float32)),
            "category": pl.Series(["x", "y"] * (count // 2), dtype=pl.Categorical),
            "fixed": pl.Series(["x", "y"] * (count // 2), dtype=pl.Enum(["x", "y", "z"])),
            "list": [[number, None] for number in range(count)],
            "flag": [None, True] * (count // 2),
            "struct": [{"a": number, "b": None} for number in range(count)],
            "nothing": [None] * count,
        }
    )


@pytest.mark.parametrize("count", [2, 4000])
def test_pandas_frames_come_back_equal(count: int) -> None:
    frame = make_pandas(count)
    for value in (frame, frame.iloc[1:-1], frame.iloc[:0]):
        (back,) = echo([value])
        pd.testing.assert_frame_equal(back, value)
    for column in frame:
        (back,) = echo([frame[column]])
        pd.testing.assert_series_equal(back, frame[column])
    (back,) = echo([frame.index])
    pd.testing.assert_index_equal(back, frame.index)


@pytest.mark.parametrize("count", [2, 4000])
def test_polars_frames_come_back_equal(count: int) -> None:
    frame = make_polars(count)
    for value in (frame, frame[1:-1], frame[:0], frame.select([]), frame.select("text")):
        (back,) = echo([value])
        assert back.schema == value.schema and back.equals(value)
    for column in frame:
        (back,) = echo([column])
        assert back.name == column.name and back.dtype == column.dtype and back.equals(column)


def test_slices_of_frames_bring_along_no_more_than_they_hold(sent: list[int]) -> None:
    echo([make_pandas(100_000).iloc[5:9]])
    echo([make_pandas(100_000)["text"].iloc[5:9]])
    echo([make_polars(100_000)[5:9]])
    echo([make_polars(100_000)["text"][5:9]])
    assert max(sent) < 30_000


TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.arange(LARGE, dtype=torch.float32),
    "small": lambda: torch.arange(3),
    "bfloat16": lambda: torch.arange(LARGE).to(torch.bfloat16),
    "float16, small": lambda: torch.arange(5).to(torch.float16),
    "float8": lambda: torch.arange(5).float().to(torch.float8_e4m3fn),
    "complex": lambda: torch.complex(torch.rand(9), torch.rand(9)),
    "conjugate": lambda: torch.complex(torch.rand(9), torch.rand(9)).conj(),
    "booleans": lambda: torch.arange(LARGE) % 2 == 0,
    "no dimensions": lambda: torch.tensor(3.5),
    "transposed": lambda: torch.arange(LARGE).reshape(3, -1).t(),
    "every other": lambda: torch.arange(2 * LARGE)[::2],
    "odd offset": lambda: torch.arange(LARGE, dtype=torch.int8)[1:],
    "expanded": lambda: torch.tensor([1.0]).expand(5),
    "empty": lambda: torch.empty(0, 3, dtype=torch.int16),
    "with a gradient": lambda: torch.rand(5, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.rand(LARGE)),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_come_back_equal(kind: str) -> None:
    tensor = TENSORS[kind]()
    (back,) = echo([tensor])
    assert type(back) is type(tensor) and back.dtype == tensor.dtype and back.shape == tensor.shape
    assert back.layout == tensor.layout and back.requires_grad == tensor.requires_grad
    if tensor.layout == torch.sparse_coo:
        back, tensor = back.to_dense(), tensor.to_dense()
    assert torch.equal(back.resolve_conj().to(torch.complex64), tensor.detach().resolve_conj().to(torch.complex64))


def test_a_view_of_a_tensor_brings_along_no_more_than_it_shows(sent: list[int]) -> None:
    echo([torch.zeros(1 << 20)[5:9]])
    assert max(sent) < 10_000


def test_modules_come_back_with_equal_weights() -> None:
    module = torch.nn.Linear(200, 200)
    (back,) = echo([module])
    assert all(torch.equal(back.state_dict()[name], weight) for name, weight in module.state_dict().items())


def test_values_within_values_travel_as_well() -> None:
    value = {"array": np.arange(LARGE), "both": [torch.arange(LARGE), (make_table(400), np.arange(3))]}
    (back,) = echo([value])
    np.testing.assert_array_equal(back["array"], value["array"])
    assert torch.equal(back["both"][0], value["both"][0]) and back["both"][1][0].equals(value["both"][1][0])


# Whose memory


def test_results_stay_as_they_are_whatever_comes_after() -> None:
    """Shared memory is used again for later results: what has been given out must not lie in it."""
    kept = list(parallel.map(lambda item: np.full(LARGE, item), range(300), workers=2))
    gc.collect()
    assert all((array == number).all() for number, array in enumerate(kept))
    kept[0][:] = -1  # and it is the caller's own
    assert (kept[1] == 1).all()


def test_inputs_that_a_function_keeps_stay_as_they_are() -> None:
    """An item's memory is used again when nothing at the worker refers to it, not before."""
    kept: list[tuple[int, np.ndarray, torch.Tensor, pa.Table]] = []

    def task(item: tuple[int, np.ndarray, torch.Tensor, pa.Table]) -> bool:
        number, array, tensor, table = item
        if number % 7 == 0:
            kept.append((number, array[5:-5], tensor[3:], table.slice(2, 9)))
        return all(
            (array == number).all() and (tensor == number).all() and set(table["a"].to_pylist()) == {number}
            for number, array, tensor, table in kept
        )

    def make(number: int) -> tuple[int, np.ndarray, torch.Tensor, pa.Table]:
        filled = np.full(LARGE, number)
        return number, filled, torch.from_numpy(filled.copy()), pa.table({"a": np.full(LARGE // 8, number)})

    assert all(parallel.map(task, map(make, range(120)), workers=2))


def test_memory_that_both_share_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: 100 MB through an arena of 2 MiB, none of it past the arena."""
    monkeypatch.setattr(local, "ARENA_BYTES", 2 << 20)
    sizes: list[int] = []
    receive = local._Worker.receive

    def note(self: Any) -> bool:
        alive = receive(self)
        sizes.append(len(self._incoming))
        return alive

    monkeypatch.setattr(local._Worker, "receive", note)
    for back in parallel.map(lambda item: item + 1, (np.zeros(1 << 14) for _ in range(800)), workers=2):
        assert (back == 1).all()
    assert max(sizes) < 1 << 16


def test_values_larger_than_shared_memory_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "ARENA_BYTES", 1 << 20)
    items = [np.full(1 << 19, number) for number in range(5)]  # 4 MiB each
    for number, back in enumerate(echo(items)):
        assert (back == number).all() and back.flags.writeable


def test_changing_an_item_in_place_does_not_reach_the_caller() -> None:
    small, large, plain = np.zeros(3), np.zeros(LARGE), [0]

    def task(item: tuple[np.ndarray, np.ndarray, list[int]]) -> float:
        for one in item[:2]:
            one += 1
        item[2][0] += 1
        return float(item[0].sum() + item[1].sum() + item[2][0])

    assert list(parallel.map(task, [(small, large, plain)], workers=1)) == [3 + LARGE + 1]
    assert small.sum() == large.sum() == plain[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_items_that_share_an_object_do_not_share_it_at_a_worker(workers: int) -> None:
    """Otherwise a change in place would reach other tasks, if they happen to be in the same batch."""
    shared, large = [0], np.zeros(LARGE)

    def task(item: list[Any]) -> tuple[int, float]:
        item[0][0] += 1
        item[1] += 1
        return item[0][0], item[1][0]

    assert set(parallel.map(task, ([shared, large] for _ in range(300)), workers=workers)) == {(1, 1.0)}


@pytest.mark.parametrize("size", [1, LARGE])
def test_a_function_may_use_the_same_memory_for_every_result(size: int) -> None:
    """Results are taken when they are returned, not when their batch ends."""
    buffer = np.zeros(size)

    def task(item: int) -> np.ndarray:
        buffer[:] = item
        return buffer

    back = list(parallel.map(task, range(500 if size == 1 else 100), workers=2))
    assert all((array == number).all() for number, array in enumerate(back))


def test_results_that_share_an_object_do_not_share_it_at_the_caller() -> None:
    shared = [0]
    back = list(parallel.map(lambda item: shared, range(50), workers=1))
    back[0].append(1)
    assert all(value == [0] for value in back[1:])
