"""Sums and products of arrays: the same bits on any number of workers, wherever and however the operands lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono import parallel
from unisono.determinism.nodes import fold
from unisono.parallel import ParallelError, algebra


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "BLOCK", 16)
    monkeypatch.setattr(algebra, "PANEL", 24)
    monkeypatch.setattr(algebra, "ELEMENTS", 100)


def draw(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape) * 100
    return values.astype(dtype)


def bits(array: Any) -> bytes:
    if isinstance(array, torch.Tensor):
        return bytes(array.contiguous().reshape(-1).view(torch.uint8).numpy())
    return np.ascontiguousarray(array).tobytes()


DTYPES = ("float32", "float64", "float16", "int64", "complex64")


KINDS = [*(("numpy", one) for one in DTYPES), *(("torch", one) for one in (*DTYPES, "bfloat16"))]
QUICK = [("numpy", "float64"), ("torch", "float32"), ("torch", "bfloat16")]


@pytest.mark.parametrize(
    ("kind", "dtype", "counts"),
    [
        *[(*one, (1, 3)) for one in QUICK],
        *[pytest.param(*one, (1, 2, 3, 5, 8), marks=pytest.mark.slow) for one in KINDS],
    ],
)
def test_any_number_of_workers_gives_the_same_bits(kind: str, dtype: str, counts: tuple[int, ...]) -> None:
    def make(seed: int, *shape: int) -> Any:
        array = draw(seed, *shape, dtype=np.float64)
        return torch.from_numpy(array).to(getattr(torch, dtype)) if kind == "torch" else array.astype(dtype)

    a, b, parts = make(0, 50, 70), make(1, 70, 37), [make(seed, 23, 31) for seed in range(7)]
    products = {bits(parallel.matmul(a, b, workers=workers)) for workers in counts}
    sums = {bits(parallel.add(parts, workers=workers)) for workers in counts}
    assert len(products) == len(sums) == 1
    wide = {"float16": "float32", "bfloat16": "float32"}.get(dtype, dtype)
    exact = np.asarray(torch.as_tensor(a).to(torch.complex128)) @ np.asarray(torch.as_tensor(b).to(torch.complex128))
    made = np.asarray(torch.as_tensor(parallel.matmul(a, b)).to(torch.complex128))
    tolerance = {"float32": 1e-4, "complex64": 1e-4, "float64": 1e-12, "int64": 0}[wide]
    tolerance = {"float16": 1e-2, "bfloat16": 1e-2}.get(dtype, tolerance)
    finite = np.abs(exact) < 6e4  # what float16 can hold
    assert np.all(np.abs(made - exact)[finite] <= tolerance * np.abs(exact).max())


@settings(max_examples=settings.default.max_examples // 5)  # each forks workers
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9))
def test_any_shape(rows: int, columns: int, inner: int, count: int) -> None:
    a, b = draw(0, rows, inner, dtype=np.int64), draw(1, inner, columns, dtype=np.int64)
    np.testing.assert_array_equal(parallel.matmul(a, b, workers=2), a @ b)
    parts = [draw(seed, rows, columns) for seed in range(count)]
    np.testing.assert_array_equal(parallel.add(parts, workers=3), fold(parts))  # the same tree, over whole arrays


def test_bits_do_not_depend_on_where_operands_lie(tmp_path: Path) -> None:
    a, b = draw(0, 50, 70), draw(1, 70, 37)
    odd = np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(np.float32).reshape(a.shape)  # not aligned
    mapped = np.memmap(tmp_path / "a", np.float32, "w+", shape=(50, 70))
    mapped[:] = a
    every_other = np.zeros((50, 140), np.float32)
    every_other[:, ::2] = a
    expected = bits(parallel.matmul(a, b))
    for other in (odd, mapped, np.asfortranarray(a), every_other[:, ::2]):
        np.testing.assert_array_equal(other, a)
        assert bits(parallel.matmul(other, b, workers=2)) == expected
        assert bits(parallel.add([other, other], workers=2)) == bits(a + a)
    assert bits(a) == bits(draw(0, 50, 70)), "operands are left as they are"


def test_a_result_larger_than_memory_goes_to_a_file(tmp_path: Path) -> None:
    a, b = draw(0, 50, 70), draw(1, 70, 37)
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=(50, 37))
    assert parallel.matmul(a, b, out=out, workers=2) is out
    out.flush()
    assert (tmp_path / "out").read_bytes() == bits(parallel.matmul(a, b))
    plain = np.zeros((50, 37), np.float32)  # that children would not share
    assert parallel.matmul(a, b, out=plain) is plain
    assert bits(plain) == bits(out)
    tensor = torch.zeros(50, 70)
    assert parallel.add([torch.from_numpy(a)] * 3, out=tensor) is tensor
    assert bits(tensor) == bits(parallel.add([a] * 3))


def test_half_precision_is_rounded_once() -> None:
    parts = [np.full(3, 2048, np.float16), *(np.full(3, 1, np.float16) for _ in range(4))]
    np.testing.assert_array_equal(parallel.add(parts), np.full(3, 2052, np.float16))  # one by one it stays at 2048


def test_edges() -> None:
    np.testing.assert_array_equal(parallel.matmul(np.zeros((3, 0)), np.zeros((0, 2))), np.zeros((3, 2)))
    assert parallel.matmul(np.zeros((0, 3)), np.zeros((3, 2))).shape == (0, 2)
    assert parallel.add([np.full((), 2.0), np.ones(())]) == 3.0
    assert parallel.add([np.zeros((0, 4))]).shape == (0, 4)
    one = draw(0, 4)
    result = parallel.add([one])
    result += 1  # a copy
    np.testing.assert_array_equal(one, draw(0, 4))


def test_an_error_in_float32_is_that_of_pairwise_sums() -> None:
    parts = [np.full(8, 0.1, np.float32) for _ in range(4096)]
    exact = 4096 * float(np.float32(0.1))
    in_turn = np.zeros(8, np.float32)
    for part in parts:
        in_turn += part
    assert np.abs(parallel.add(parts) - exact).max() < 1e-4 < np.abs(in_turn - exact).max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parallel.add([]), "there are no parts"),
        (lambda: parallel.add([np.zeros(2), np.zeros(3)]), r"part 1 is ndarray \[3\].*one shape and dtype"),
        (lambda: parallel.add([np.zeros(2), np.zeros(2, np.float32)]), "one shape and dtype"),
        (lambda: parallel.add([np.zeros(2), torch.zeros(2, dtype=torch.float64)]), "one shape and dtype"),
        (lambda: parallel.add([[1.0]]), "part 0 is list: allowed are NumPy arrays and torch tensors"),
        (lambda: parallel.add([np.array(["a"])]), "allowed are numbers"),
        (lambda: parallel.add([np.zeros(2, bool)]), "allowed are numbers"),
        (lambda: parallel.add([torch.zeros(2, requires_grad=True)]), "detach"),
        (lambda: parallel.add([np.zeros(2)], out=np.zeros(3)), r"the result is \[2\]"),
        (lambda: parallel.matmul(np.zeros(2), np.zeros((2, 2))), "two dimensions"),
        (lambda: parallel.matmul(np.zeros((2, 3)), np.zeros((2, 3))), "as many columns as b has rows"),
        (lambda: parallel.matmul(np.zeros((2, 2)), np.zeros((2, 2), np.float32)), "the same kind and dtype"),
        (lambda: parallel.matmul(np.zeros((2, 2)), np.zeros((2, 2)), workers=0), "workers = 0"),
    ],
)
def test_what_cannot_be_computed(call: Any, message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        call()


def test_a_read_only_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(bytes(16))
    out = np.memmap(tmp_path / "out", np.float64, "r", shape=(2,))
    with pytest.raises(ParallelError, match="cannot be written"):
        parallel.add([np.zeros(2)], out=out)
