"""Attention in one compiled walk: what the formula says, forwards and backwards, with the masks that it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisono.backends.torch_footprint import count_flop
from unisono.kernels import packed_attention as fused
from unisono.kernels.attention import attend
from unisono.kernels.masks import Mask
from unisono.kernels.packing import LANES, Packing, pack

SAMPLES = st.lists(st.integers(1, 30), min_size=1, max_size=6) | st.lists(st.integers(50, 140), min_size=1, max_size=3)


def packing_of(lengths: list[int]) -> Packing:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return pack(int(starts[-1]), starts[:-1])


def by_the_formula(projected: Tensor, lengths: list[int], heads: int, factors: list[Tensor]) -> Tensor:
    """Sample after sample; `factors` of the weights, [heads, t, t] each."""
    mixed = []
    for part, factor in zip(projected.split(lengths), factors, strict=True):
        query, key, value = (each.unflatten(-1, (heads, -1)).transpose(0, 1) for each in part.chunk(3, -1))
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1) * factor
        mixed.append((weights @ value).transpose(0, 1).flatten(1))
    return torch.cat(mixed)


def factors_of(mask: Mask, lengths: list[int], heads: int) -> list[Tensor]:
    """A mask's, in rows that are padded to whole vectors."""
    found = []
    for length in lengths:
        shape = torch.Size([heads, length, -(-length // LANES) * LANES])
        found.append(mask.factors(shape, torch.float64)[..., :length])
        mask = mask.after(shape.numel())
    return found


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.integers(1, 3), st.sampled_from([8, 16, 24, 32]), st.sampled_from([0.0, 0.1, 0.6]))
def test_it_is_the_formula_and_its_gradient_that_of_what_was_computed(
    lengths: list[int], heads: int, d: int, dropout: float
) -> None:
    torch.manual_seed(sum(lengths) + d)
    projected = torch.randn(sum(lengths), 3 * heads * d, requires_grad=True)
    due = torch.randn(sum(lengths), heads * d)
    torch.manual_seed(4)
    mixed = attend(projected, packing_of(lengths), heads, dropout=dropout)
    assert type(mixed.grad_fn).__name__ == "_FusedBackward" and mixed.dtype == torch.float32
    (gradient,) = torch.autograd.grad(mixed, projected, due)
    torch.manual_seed(4)
    factors = factors_of(Mask.draw(dropout), lengths, heads)
    exact = projected.detach().double().requires_grad_()
    expected = by_the_formula(exact, lengths, heads, factors)
    (wanted,) = torch.autograd.grad(expected, exact, due.double())
    torch.testing.assert_close(mixed.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, atol=2e-5, rtol=1e-5)


@given(SAMPLES, st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_no_bit_of_a_sample_depends_on_its_neighbours(lengths: list[int], neighbour: int) -> None:
    projected = torch.randn(sum(lengths), 48)
    together = attend(torch.cat([torch.randn(neighbour, 48), projected]), packing_of([neighbour, *lengths]), 2)
    alone = [attend(part, packing_of([len(part)]), 2) for part in projected.split(lengths)]
    assert torch.equal(together[neighbour:], torch.cat(alone))


def test_large_scores_and_what_is_no_number() -> None:
    projected = torch.zeros(3, 24)
    projected[0, 0], projected[:, 8] = 1e4, torch.tensor([0.0, 3e4, -3e4])
    projected[:, 16:] = torch.tensor([[1.0], [2.0], [3.0]])
    mixed = attend(projected, packing_of([3]), 1)
    assert torch.equal(mixed[0], torch.full((8,), 2.0))  # the second key takes all
    torch.testing.assert_close(mixed[1:], torch.full((2, 8), 2.0))  # a query of zeros takes the mean
    projected[1, 8] = math.nan
    projected.requires_grad_()
    mixed = attend(projected, packing_of([3]), 1)
    assert mixed.isnan().all()
    mixed.sum().backward()
    assert projected.grad is not None and projected.grad.isnan().any()


def test_who_is_not_taken_gets_operations_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    projected, packing = torch.randn(64, 48), packing_of([31, 33])
    assert fused.is_compiled(), "the tests need a C compiler"
    assert fused.takes(projected, 2) and fused.takes(projected.bfloat16(), 2)
    assert not fused.takes(projected, 4)  # four numbers a head are no vector
    assert not fused.takes(projected.double(), 2)
    expected = [attend(projected, packing, 2, dropout=rate) for rate in (0.0, 0.5)]
    torch.set_num_threads(2)
    try:
        assert not fused.takes(projected, 2)
    finally:
        torch.set_num_threads(1)
    monkeypatch.setattr(fused, "_attention", None)
    assert not fused.is_compiled() and not fused.takes(projected, 2)
    torch.testing.assert_close(attend(projected, packing, 2), expected[0])
    other = attend(projected, packing, 2, dropout=0.5)
    assert other.shape == expected[1].shape and other.std() > 0  # with masks of its own


def test_lengths_that_are_not_the_tokens_are_refused() -> None:
    for lengths in (torch.tensor([3, 4]), torch.tensor([3, 5], dtype=torch.int32)):
        with pytest.raises(ValueError, match="for 8 tokens"):
            fused.attend(torch.zeros(8, 24), lengths, 1, 0.0)


def test_its_operations_are_counted() -> None:
    """Two products forwards, five backwards, none of them for padding."""
    lengths = [3, 17, 70]
    projected = torch.randn(sum(lengths), 48, requires_grad=True)

    def both() -> None:
        attend(projected, packing_of(lengths), 2, dropout=0.1).sum().backward()

    assert count_flop(both) == 7 * sum(2 * 16 * length**2 for length in lengths)
