"""Dropout, packing and attention of the text models, against what one would write first."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisono.models.text import attention, linear
from unisono.models.text import dropout as dropout_module
from unisono.models.text.attention import attend, attend_once, mean_over_tokens
from unisono.models.text.dropout import Dropout, draw_mask
from unisono.models.text.packing import pack

lengths_of_samples = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)[:-1]


def check_way(move: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], given: Tensor) -> None:
    """The way back undoes it, and is its gradient."""
    given = given.clone().requires_grad_()
    moved = move(given)
    assert torch.equal(back(moved.detach()), given)
    weights = torch.randn_like(moved)
    (gradient,) = torch.autograd.grad((moved * weights).sum(), given)
    assert torch.equal(gradient, back(weights))


@settings(max_examples=60, deadline=None)
@given(lengths_of_samples | st.lists(st.integers(1, 70), min_size=1, max_size=12), st.sampled_from([1, 3]))
def test_spreading_and_gathering_undo_each_other_forwards_and_backwards(lengths: list[int], heads: int) -> None:
    packing = pack(sum(lengths), starts_of(lengths))
    assert packing.positions.tolist() == [place for length in lengths for place in range(length)]
    grid = packing.grid(heads)
    packed = torch.randn(sum(lengths), 2 * heads, dtype=torch.float64)
    cells = grid.spread(packed)
    samples = grid.samples.tolist()
    assert sorted(samples) == list(range(len(lengths)))
    rows = iter([packed.split(lengths)[sample][:, 2 * head :][:, :2] for sample in samples for head in range(heads)])
    for one, part in zip(grid.rectangles, attention._cut(cells, grid.rectangles), strict=True):
        expected = [next(rows) for _ in range(one.rows)]
        assert max(map(len, expected)) == one.longest < 8 + 1.25 * min(map(len, expected))
        assert torch.equal(part, torch.nn.utils.rnn.pad_sequence(expected, batch_first=True))
        present = torch.tensor([[column < len(row) for column in range(one.longest)] for row in expected])
        assert present.all() if one.absent is None else torch.equal(one.absent[:, 0], ~present)
    assert next(rows, None) is None
    check_way(grid.spread, grid.gather, packed)
    check_way(grid.sort, grid.unsort, torch.randn(len(lengths), 2))
    wide = torch.randn_like(cells, requires_grad=True)  # what lies in empty cells reaches nobody
    (gradient,) = torch.autograd.grad((grid.gather(wide) * packed).sum(), wide)
    assert torch.equal(gradient, cells)
    means = torch.stack([row.mean(0) for row in packed.split(lengths)])
    torch.testing.assert_close(mean_over_tokens(packed, packing), means)


def test_large_rectangles_are_cut() -> None:
    """Their scores would leave the cache."""
    grid = pack(20 * 128, starts_of([128] * 20)).grid(12)
    assert [one.rows for one in grid.rectangles] == [12] * 20
    grid = pack(20 * 64, starts_of([64] * 20)).grid(12)
    assert [one.rows for one in grid.rectangles] == [60] * 4
    assert len(pack(300, torch.tensor([0])).grid(4).rectangles) == 1  # a sample is never cut


@settings(max_examples=40, deadline=None)
@given(
    lengths_of_samples | st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([0.0, 0.4]),
)
def test_attention_is_each_samples_own(lengths: list[int], single: bool, dropout: float) -> None:
    """Every sample alone, by the formula; with dropout the masks are made to keep everything."""
    torch.manual_seed(sum(lengths))
    packing = pack(sum(lengths), starts_of(lengths))
    states = torch.randn(sum(lengths), 8, requires_grad=True)
    layers = [linear.Linear(8, 8) for _ in range(3)]
    query, key, value = (layer(states) for layer in layers)
    ones = pytest.MonkeyPatch()
    for module in (attention, dropout_module):
        ones.setattr(module, "draw_mask", lambda shape, rate, dtype: torch.ones(shape, dtype=dtype))
    if single:
        mixed = attend_once(query[packing.starts], states, layers[1], layers[2], packing, 2, dropout=dropout)
    else:
        mixed = attend(query, key, value, packing, 2, dropout=dropout)
    ones.undo()
    expected = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        heads = [part.unflatten(-1, (2, 4)).transpose(0, 1) for part in (q[:1] if single else q, k, v)]
        scores = heads[0] @ heads[1].transpose(1, 2) / math.sqrt(4)
        expected.append((scores.softmax(-1) @ heads[2]).transpose(0, 1).flatten(1))
    torch.testing.assert_close(mixed, torch.cat(expected))
    wanted = [states, *(weight for layer in layers for weight in (layer.weight, layer.bias))]
    found = torch.autograd.grad(mixed.square().sum(), wanted, retain_graph=True)
    due = torch.autograd.grad(torch.cat(expected).square().sum(), wanted)
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_attention_weights_are_dropped() -> None:
    """With equal keys and values of one, each output is the sum of what stays, over the number of keys."""
    torch.manual_seed(0)
    packing = pack(64, torch.tensor([0]))
    mixed = attend(torch.zeros(64, 4), torch.zeros(64, 4), torch.ones(64, 4), packing, 4, dropout=0.5)
    key, value = linear.Linear(64, 64), linear.Linear(64, 64)
    with torch.no_grad():
        value.weight.zero_()
        value.bias.fill_(1.0)
        once = attend_once(torch.zeros(1, 64), torch.zeros(64, 64), key, value, packing, 64, dropout=0.5)
    for values in (mixed, once):
        kept = values * 64 / 2
        torch.testing.assert_close(kept, kept.round(), atol=1e-4, rtol=0)
        assert values.std() > 0.05 and abs(values.mean() - 1) < 0.1


@pytest.mark.parametrize("lengths", [[3, 3], [5, 2, 11, 1]])
def test_gradients_of_dropped_attention_are_those_of_what_was_computed(lengths: list[int]) -> None:
    """By finite differences, with masks that drop: both passes must use the same ones."""
    torch.manual_seed(0)
    packing = pack(sum(lengths), starts_of(lengths))
    states = [torch.randn(sum(lengths), 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    layers = [linear.Linear(4, 4).double() for _ in range(2)]

    def everyone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attend(query, key, value, packing, 2, dropout=0.4)

    def first(query: Tensor, key: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attend_once(query[packing.starts], key, *layers, packing, 2, dropout=0.4)

    assert torch.autograd.gradcheck(everyone, states)
    assert torch.autograd.gradcheck(first, states[:2])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1e-4])
def test_masks_have_the_rate_and_keep_the_mean(rate: float) -> None:
    torch.manual_seed(1)
    mask = draw_mask(torch.Size([1001, 999]), rate)
    assert mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0.0, mask.max().item()}
    dropped = (mask == 0).double().mean().item()
    spread = math.sqrt(rate * (1 - rate) / mask.numel())
    assert abs(dropped - rate) < 5 * spread + 2**-17
    assert abs(mask.max().item() * (1 - round(rate * 2**16) / 2**16) - 1) < 1e-6
    rows, columns = (mask == 0).double().mean(0), (mask == 0).double().mean(1)
    for shares in (rows, columns):  # no pattern along either side
        assert abs(shares.std().item() / math.sqrt(rate * (1 - rate) / 1000) - 1) < 0.15


def test_masks_follow_the_generator() -> None:
    torch.manual_seed(5)
    first, second = draw_mask(torch.Size([999]), 0.3), draw_mask(torch.Size([999]), 0.3)
    torch.manual_seed(5)
    assert torch.equal(first, draw_mask(torch.Size([999]), 0.3)) and not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_alone_and_added(dtype: torch.dtype) -> None:
    layer, x, residual = Dropout(0.25), torch.ones(400, dtype=dtype, requires_grad=True), torch.full((400,), 2.0)
    torch.manual_seed(3)
    alone = layer(x)
    assert alone.dtype == dtype and set(alone.tolist()) == {0.0, float(torch.tensor(4 / 3, dtype=dtype))}
    torch.manual_seed(3)
    added = layer.add(x, residual)
    assert added.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(added == 2, alone == 0)
    (gradient,) = torch.autograd.grad(added.sum(), x)
    assert torch.equal(gradient == 0, alone == 0)
    assert torch.equal(layer.eval()(x), x) and torch.equal(layer.add(x, residual), residual + x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_rounded_products_are_those_of_rounded_numbers(monkeypatch: pytest.MonkeyPatch, kept: torch.dtype) -> None:
    monkeypatch.setattr(linear, "multiplies_bf16", lambda: False)
    torch.manual_seed(0)
    layer, x = linear.Linear(40, 24), torch.randn(30, 40, dtype=kept, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    weight, bias, given = (value.detach().bfloat16().double() for value in (layer.weight, layer.bias, x))
    exact = given @ weight.T + bias
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)
    wanted = torch.randn(30, 24, dtype=torch.bfloat16)
    found.backward(wanted)
    assert (x.grad.dtype, layer.weight.grad.dtype) == (kept, torch.float32)
    torch.testing.assert_close(x.grad.double(), wanted.double() @ weight, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad.double(), wanted.double().T @ given, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad.double(), wanted.double().sum(0), rtol=1e-5, atol=1e-4)


def test_products_are_torchs_own_without_autocast_or_with_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = linear.Linear(40, 24), torch.randn(30, 40)
    for native in (False, True):
        monkeypatch.setattr(linear, "multiplies_bf16", lambda native=native: native)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
