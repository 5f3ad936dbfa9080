"""Dropout, GELU, packing and attention of the text models, against what one would write first; compiled walks against
their twins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisono.kernels import attention, linear, masks
from unisono.kernels import gelu as gelu_module
from unisono.kernels.attention import attend, attend_once, mean_over_tokens
from unisono.kernels.dropout import Dropout
from unisono.kernels.gelu import Gelu, gelu
from unisono.kernels.masks import Mask
from unisono.kernels.packing import LANES, pack

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
        longest = max(map(len, expected))
        assert longest < 8 + 1.25 * min(map(len, expected))
        assert one.columns % LANES == 0 and longest <= one.columns < longest + LANES
        expected.append(expected[0].new_empty(one.columns, 2))
        assert torch.equal(part, torch.nn.utils.rnn.pad_sequence(expected, batch_first=True)[:-1])
        del expected[-1]
        present = torch.tensor([[column < len(row) for column in range(one.columns)] for row in expected])
        assert present.all() if one.absent is None else torch.equal(one.absent[:, 0], ~present)
    assert next(rows, None) is None
    check_way(grid.spread, grid.gather, packed)
    check_way(grid.sort, grid.unsort, torch.randn(len(lengths), 2))
    wide = torch.randn_like(cells, requires_grad=True)  # what lies in empty cells reaches nobody
    (gradient,) = torch.autograd.grad((grid.gather(wide) * packed).sum(), wide)
    assert torch.equal(gradient, cells)
    parts = [packed, torch.randn_like(packed), torch.randn_like(packed)]
    together = torch.cat(parts, -1)
    assert torch.equal(grid.spread(together, 3), torch.cat([grid.spread(part) for part in parts]))
    moved = torch.randn(3 * len(cells), 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((grid.spread(together.requires_grad_(), 3) * moved).sum(), together)
    assert torch.equal(gradient, torch.cat([grid.gather(part) for part in moved.chunk(3)], -1))
    means = torch.stack([row.mean(0) for row in packed.split(lengths)])
    torch.testing.assert_close(mean_over_tokens(packed, packing), means)


def test_large_rectangles_are_cut() -> None:
    """Their scores would leave the cache."""
    grid = pack(20 * 128, starts_of([128] * 20)).grid(12)
    assert [one.rows for one in grid.rectangles] == [12] * 20
    grid = pack(20 * 64, starts_of([64] * 20)).grid(12)
    assert [one.rows for one in grid.rectangles] == [60] * 4
    assert len(pack(300, torch.tensor([0])).grid(4).rectangles) == 1  # a sample is never cut


def keep_all(mask: Mask, values: Tensor, *, added: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """In place of `Mask.drop`."""
    assert added is None
    return values.clone() if out is None else out.copy_(values)


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
    wanted = [states, *(weight for layer in layers for weight in (layer.weight, layer.bias))]
    with pytest.MonkeyPatch.context() as ones:
        ones.setattr(Mask, "drop", keep_all)
        if single:
            mixed = attend_once(query[packing.starts], states, layers[1], layers[2], packing, 2, dropout=dropout)
        else:
            mixed = attend(linear.project(states, *layers), packing, 2, dropout=dropout)
        found = torch.autograd.grad(mixed.square().sum(), wanted, retain_graph=True)
    expected = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        heads = [part.unflatten(-1, (2, 4)).transpose(0, 1) for part in (q[:1] if single else q, k, v)]
        scores = heads[0] @ heads[1].transpose(1, 2) / math.sqrt(4)
        expected.append((scores.softmax(-1) @ heads[2]).transpose(0, 1).flatten(1))
    torch.testing.assert_close(mixed, torch.cat(expected))
    due = torch.autograd.grad(torch.cat(expected).square().sum(), wanted)
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_attention_weights_are_dropped() -> None:
    """With equal keys and values of one, each output is the sum of what stays, over the number of keys."""
    torch.manual_seed(0)
    packing = pack(64, torch.tensor([0]))
    projected = torch.cat([torch.zeros(64, 8), torch.ones(64, 4)], -1)
    mixed = attend(projected, packing, 4, dropout=0.5)
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
        return attend(torch.cat([query, key, value], -1), packing, 2, dropout=0.4)

    def first(query: Tensor, key: Tensor) -> Tensor:
        torch.manual_seed(1)
        return attend_once(query[packing.starts], key, *layers, packing, 2, dropout=0.4)

    assert torch.autograd.gradcheck(everyone, states)
    assert torch.autograd.gradcheck(first, states[:2])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9, 1e-4])
def test_masks_have_the_rate_and_keep_the_mean(rate: float) -> None:
    torch.manual_seed(1)
    mask = Mask.draw(rate).factors(torch.Size([1001, 999]))
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
    first, second = (Mask.draw(0.3).factors(torch.Size([999])) for _ in range(2))
    torch.manual_seed(5)
    again = Mask.draw(0.3).factors(torch.Size([999]))
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_masks_of_a_known_key() -> None:
    """SplitMix64 from 1234567: the words that its authors' code gives, the lowest 16 bits first. A version that draws
    others would go on from a checkpoint with other masks."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    numbers = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    for first in range(len(words)):
        left = numbers[4 * first :]
        expected = [0.0 if number < 2**15 else 2.0 for number in left]
        assert Mask(0.5, 1234567, first).factors(torch.Size([len(left)])).tolist() == expected
        assert Mask(0.5, 1234567, first).drop(torch.ones(len(left))).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    st.floats(2**-16, 1 - 2**-16),
    st.booleans(),
    st.booleans(),
)
def test_dropping_in_one_walk_gives_the_bits_of_operations(
    key: int, sizes: list[int], rate: float, adds: bool, in_place: bool
) -> None:
    mask, generator = Mask(rate, key), torch.Generator().manual_seed(key % 1000)
    whole = mask.factors(torch.Size([sum(-(-size // 4) * 4 for size in sizes)]))
    start = 0
    for size in sizes:
        values, added = torch.randn(2, size, generator=generator) * 1e3
        factors = mask.factors(torch.Size([size]))
        assert torch.equal(factors, whole[start : start + size])  # pieces have masks of their own
        expected = values * factors + added if adds else values * factors
        target = values if in_place else None
        found = mask.drop(values, added=added if adds else None, out=target)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
        assert found is target or target is None
        mask, start = mask.after(size), start + -(-size // 4) * 4


def test_what_is_dropped_and_added_has_one_shape_and_dtype() -> None:
    """Else the compiled walk would leave its arrays."""
    values = torch.ones(8)
    for other in (torch.ones(4), torch.ones(8, dtype=torch.float64), torch.ones(2, 4)):
        with pytest.raises(ValueError, match="beside"):
            Mask(0.5, 1).drop(values, added=other)
        with pytest.raises(ValueError, match="beside"):
            Mask(0.5, 1).drop(values, out=other)


def test_without_a_compiler_dropout_and_gelu_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(300, 401) * torch.logspace(-30, 2, 401)
    values[0, :4] = torch.tensor([0.0, -0.0, 30.0, -30.0])
    mask = Mask(0.3, 17)
    compiled = [mask.drop(values), mask.drop(values.t()), mask.drop(values, added=values), *gelu(values)]
    for module in (masks, gelu_module):
        assert module._compiled is not None, "the tests need a C compiler"
        monkeypatch.setattr(module, "_compiled", None)
    twins = [mask.drop(values), mask.drop(values.t()), mask.drop(values, added=values), *gelu(values)]
    for one, other in zip(compiled, twins, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_gelu_and_its_derivative_are_precise() -> None:
    x = torch.cat([torch.linspace(-40, 40, 100_001), torch.randn(100_001), torch.tensor([0.0, -0.0, 1e-30])])
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, due = Gelu()(x), torch.nn.functional.gelu(exact)
    (slope,), (due_slope,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(due.sum(), exact)
    assert (found - due).abs().max() < 1e-6 and (slope - due_slope).abs().max() < 1e-6
    assert ((found - due) / exact)[x != 0].abs().max() < 4e-7  # the error of Phi


def test_what_is_no_number_stays_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is no number is found by looking at it."""
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(gelu_module, "_compiled", None)
            monkeypatch.setattr(masks, "_compiled", None)
        assert all(found.isnan().all() for found in gelu(torch.full((9,), math.nan)))
        assert Mask(0.5, 1).drop(torch.full((9,), math.nan)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gelu_of_other_dtypes_is_torchs(dtype: torch.dtype) -> None:
    values = torch.randn(100, dtype=dtype)
    assert torch.equal(Gelu()(values), torch.nn.functional.gelu(values))


def test_layers_side_by_side_are_one_product() -> None:
    torch.manual_seed(0)
    layers, states = [linear.Linear(6, outputs) for outputs in (4, 2, 4)], torch.randn(9, 6, requires_grad=True)
    found, expected = linear.project(states, *layers), torch.cat([layer(states) for layer in layers], -1)
    torch.testing.assert_close(found, expected)
    wanted = [states, *(weight for layer in layers for weight in layer.parameters())]
    gradients = [torch.autograd.grad(each.square().sum(), wanted) for each in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wants", [(True, True, True), (False, True, True), (True, False, False)])
def test_a_large_layers_gradients_are_those_of_autograd(
    wants: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what somebody else will compute is left to them."""
    monkeypatch.setattr(linear, "LARGE", 40 * 24 * 30)
    layer, x = linear.Linear(40, 24), torch.randn(30, 40)
    given = (x, layer.weight, layer.bias)
    for value, wanted in zip(given, wants, strict=True):
        value.requires_grad_(wanted)
    due, asked = torch.randn(30, 24), []
    F.linear(*given).backward(due)
    expected = [None if value.grad is None else value.grad.clone() for value in given]
    assert layer(x).grad_fn.name() == "_ProductBackward"
    for answer in (False, True):

        def ask(weights: Sequence[Tensor], gradient: Tensor, values: Tensor, answer: bool = answer) -> bool:
            asked.append(weights[0] is layer.weight and torch.equal(gradient, due) and torch.equal(values, x))
            return answer

        for value in given:
            value.grad = None
        with linear.assisted(ask):
            layer(x).backward(due)
        for value, right in zip(given, expected, strict=True):
            if answer and value is layer.weight:
                assert value.grad is None
            else:
                torch.testing.assert_close(value.grad, right)
    assert asked == [True] * (2 * wants[1])
    assert layer(x[:29]).grad_fn.name() != "_ProductBackward", "that is a small one"


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
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    wanted = torch.randn(30, 24)
    found.backward(wanted)
    assert (x.grad.dtype, layer.weight.grad.dtype) == (kept, torch.float32)
    back = wanted.double() @ weight
    precise = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(
        x.grad.double(), back, **({"rtol": 2**-8, "atol": 1e-5} if kept != found.dtype else precise)
    )
    torch.testing.assert_close(layer.weight.grad.double(), wanted.double().T @ given, **precise)
    torch.testing.assert_close(layer.bias.grad.double(), wanted.double().sum(0), **precise)


def test_products_are_torchs_own_without_autocast_or_with_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = linear.Linear(40, 24), torch.randn(30, 40)
    for native in (False, True):
        monkeypatch.setattr(linear, "multiplies_bf16", lambda native=native: native)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
