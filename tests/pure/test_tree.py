"""Whoever adds what, the sum is that of the one tree, bit for bit."""

from __future__ import annotations

import math
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unisono.determinism.nodes import Node, fold, nodes
from unisono.determinism.tree import Tree, fold_nodes
from unisono.engine.reduction import add_parts, add_parts_into, copy_parts

SPECIAL = np.array([0.0, -0.0, 1e-42, -1e-42, 1.17e-38, 3.4e38, -3.4e38, 1e30, -1e30, 1.0, -1.0, 1e-8], np.float32)


def contributions(microbatches: int, seed: int) -> list[Tensor]:
    """Vectors of 67 float32: signed zeros, denormals and huge values among ordinary ones."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(microbatches):
        value = (random.standard_normal(67) * 10.0 ** random.integers(-20, 20, 67)).astype(np.float32)
        value[: len(SPECIAL)] = random.permutation(SPECIAL)
        found.append(torch.from_numpy(value))
    return found


def serial(values: list[Tensor], level: int, index: int) -> Tensor | None:
    """Node (level, index) by its definition, recursively."""
    if level == 0:
        return values[index] if index < len(values) else None
    left, right = serial(values, level - 1, 2 * index), serial(values, level - 1, 2 * index + 1)
    return left if right is None or left is None else left + right


def root(values: list[Tensor]) -> Tensor:
    found = serial(values, math.ceil(math.log2(len(values))) if len(values) > 1 else 0, 0)
    assert found is not None
    return found


def bits(value: Tensor) -> bytes:
    return value.numpy().tobytes()


def reduce(values: list[Tensor], ranges: list[range]) -> tuple[Tensor, int]:
    """As workers do: one Tree each, then the nodes in order of worker. Return the root and the most nodes that a worker
    held."""
    held = 0
    pending: list[tuple[Node, Tensor]] = []
    for microbatches in ranges:
        tree: Tree[Tensor] = Tree(lambda node, left, right: left.add_(right))
        for number in microbatches:
            tree.add(Node(0, number), values[number].clone())
            held = max(held, len(tree.pending))
        assert [node for node, _ in tree.pending] == nodes(microbatches)
        pending += tree.pending
    return fold_nodes(pending), held


@settings(max_examples=150)
@given(microbatches=st.integers(1, 70), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_any_sharing_out_gives_the_bits_of_the_serial_tree(microbatches: int, seed: int, data: st.DataObject) -> None:
    values = contributions(microbatches, seed)
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, microbatches), max_size=9))), microbatches]
    ranges = [range(a, b) for a, b in pairwise(bounds)]  # empty ones too
    found, held = reduce(values, ranges)
    assert bits(found) == bits(root(values))
    assert held <= 2 * math.log2(microbatches + 1) + 1


@given(microbatches=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_fold_adds_numbers_as_the_tree_does(microbatches: int, seed: int) -> None:
    values = contributions(microbatches, seed)
    found = fold([float(value[20]) for value in values])
    expected = root([value[20].to(torch.float64) for value in values])
    assert struct.pack("<d", found) == struct.pack("<d", float(expected))


def test_another_order_gives_other_bits() -> None:
    values = contributions(8, 1)
    running = values[0].clone()
    for value in values[1:]:
        running += value
    assert bits(running) != bits(root(values)), "the inputs above would let a wrong tree pass"


@pytest.mark.parametrize("microbatches", [1, 3, 5, 6, 7, 9, 13])
def test_a_missing_right_child_is_not_added(microbatches: int) -> None:
    values = [torch.full((4,), -0.0) for _ in range(microbatches)]
    found = fold_nodes([(Node(0, number), value.clone()) for number, value in enumerate(values)])
    assert torch.signbit(found).all()
    assert math.copysign(1, fold([-0.0] * microbatches)) == -1


@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 6, 7, 8, 13])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_first_node_may_stay_as_it_is(microbatches: int, workers: int) -> None:
    values = contributions(microbatches, 2)
    cut = [range(microbatches * w // workers, microbatches * (w + 1) // workers) for w in range(workers)]
    pending = [
        (node, root(values[node.index << node.level : (node.index + 1) << node.level]).clone())
        for one in cut
        for node in nodes(one)
    ]
    first, into = pending[0][1].clone(), torch.full_like(values[0], torch.nan)
    found = fold_nodes(pending, into)
    assert bits(found) == bits(root(values)) and bits(pending[0][1]) == bits(first)
    assert found is (into if len(pending) > 1 else pending[0][1])


@given(start=st.integers(0, 500), size=st.integers(1, 500))
def test_nodes_are_the_fewest_that_cover_a_range(start: int, size: int) -> None:
    found = nodes(range(start, start + size))
    covered = [n for node in found for n in range(node.index << node.level, (node.index + 1) << node.level)]
    assert covered == list(range(start, start + size))
    assert not any(a.is_left_of(b) for a, b in pairwise(found))
    assert len(found) <= max(1, 2 * math.log2(size))


def test_siblings() -> None:
    assert Node(1, 2).is_left_of(Node(1, 3))
    assert not Node(1, 1).is_left_of(Node(1, 2))
    assert not Node(0, 2).is_left_of(Node(1, 3))
    assert Node(1, 3).parent == Node(2, 1)


def test_nodes_are_combined_from_left_to_right_as_they_come() -> None:
    told: list[tuple[Node, str]] = []

    def combine(node: Node, left: str, right: str) -> str:
        told.append((node, f"({left}{right})"))
        return told[-1][1]

    tree = Tree(combine)
    for number, value in zip(range(2, 7), "cdefg", strict=True):
        tree.add(Node(0, number), value)
    assert told == [(Node(1, 1), "(cd)"), (Node(1, 2), "(ef)")]
    assert tree.pending == [(Node(1, 1), "(cd)"), (Node(1, 2), "(ef)"), (Node(0, 6), "g")]
    tree.clear()
    assert not tree.pending


def parts(seed: int) -> list[Tensor | None]:
    """Parts of a contribution: every way in which two neighbours can have one or none."""
    one, two = contributions(2, seed)
    return [[one, two, None, None], [one, None, two, None]][seed % 2]


@pytest.mark.parametrize("into", [False, True])
def test_absent_parts_are_zeros(into: bool) -> None:
    left, right = parts(2), parts(3)
    expected = [
        (torch.zeros(67) if one is None else one) + (torch.zeros(67) if other is None else other)
        for one, other in zip(left, right, strict=True)
    ]
    if into:
        found: list[Tensor | None] = [torch.full((67,), torch.nan) for _ in left]
        add_parts_into(left, right, found)  # type: ignore[arg-type]
    else:
        found = add_parts(left, right)
        assert found[3] is None
        assert found[0] is left[0] and found[1] is left[1] and found[2] is right[2], "added in place"
    assert [bits(torch.zeros(67) if part is None else part) for part in found] == [bits(part) for part in expected]


def test_a_node_is_laid_down_whole() -> None:
    given = parts(2)
    targets = [torch.full((67,), torch.nan) for _ in given]
    copy_parts(given, targets)
    assert [bits(part) for part in targets] == [bits(torch.zeros(67) if part is None else part) for part in given]
