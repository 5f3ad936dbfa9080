"""Results put together: whichever comes first, the order and the tree are the same."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from unisono.determinism.nodes import Node, fold, nodes
from unisono.parallel.gathering import Combined, Ordered


def bracket(a: str, b: str) -> str:
    return f"({a}{b})"


@given(st.integers(1, 70), st.randoms(use_true_random=False))
def test_leaves_in_any_order_give_the_same_tree(count: int, chance: random.Random) -> None:
    values = [chance.uniform(-1, 1) * 10 ** chance.randint(-9, 9) for _ in range(count)]
    numbers = list(range(count))
    chance.shuffle(numbers)
    combined = Combined(lambda a, b: a + b)
    for number in numbers:
        combined.put_leaf(number, values[number])
    assert combined.finish() == (fold(values), True)


@given(st.integers(1, 70), st.lists(st.integers(1, 69), max_size=5), st.randoms(use_true_random=False))
def test_complete_nodes_of_any_cut_give_the_same_tree(count: int, cuts: list[int], chance: random.Random) -> None:
    expected, cut = Combined(bracket), Combined(bracket)
    for number in range(count):
        expected.put_leaf(number, f"{number} ")
    edges = sorted({0, count, *(edge for edge in cuts if edge < count)})
    pieces = [node for a, b in itertools.pairwise(edges) for node in nodes(range(a, b))]
    chance.shuffle(pieces)
    for node in pieces:
        own = Combined(bracket)
        for number in range(node.index << node.level, (node.index + 1) << node.level):
            own.put_leaf(number, f"{number} ")
        cut.put(node, own.finish()[0])
    assert cut.finish() == expected.finish()


@given(st.sets(st.integers(0, 12)), st.randoms(use_true_random=False))
def test_siblings_of_missing_leaves_go_up_as_they_are(missing: set[int], chance: random.Random) -> None:
    """The shape is that of the whole tree with leaves taken out, in whatever order that becomes known."""

    def draw(level: int, index: int) -> str:
        if level == 0:
            return "" if index in missing or index > 12 else f"{index} "
        left, right = draw(level - 1, 2 * index), draw(level - 1, 2 * index + 1)
        return bracket(left, right) if left and right else left or right

    numbers = list(range(13))
    chance.shuffle(numbers)
    combined = Combined(bracket)
    for number in numbers:
        combined.miss(number) if number in missing else combined.put_leaf(number, f"{number} ")
    result, some = combined.finish()
    assert some == (len(missing) < 13)
    assert not some or result == draw(4, 0)


def test_left_is_left() -> None:
    combined = Combined(bracket)
    combined.put(Node(1, 1), "right")
    combined.put(Node(1, 0), "left")
    assert combined.finish() == ("(leftright)", True)


@given(st.randoms(use_true_random=False))
def test_results_are_given_out_in_order_and_as_soon_as_they_can(chance: random.Random) -> None:
    numbers = list(range(30))
    chance.shuffle(numbers)
    ordered, come, out = Ordered(), set(), []
    for number in numbers:
        ordered.put([(number, str(number))])
        come.add(number)
        out += list(ordered.drain())
        assert out == [str(one) for one in range(next(one for one in range(31) if one not in come))]
    assert ordered.next == 30


def test_what_was_given_out_is_not_held() -> None:
    ordered = Ordered()
    ordered.put([(0, "a"), (1, "b"), (3, "d")])
    results = ordered.drain()
    assert next(results) == "a" and ordered.next == 1
    assert ordered._ready == {1: "b", 3: "d"}
