"""The layout keeps to its grid, and shards are whole blocks that cover it exactly."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unisono.determinism.space import BLOCK, GRID, Space, lay_out

SHAPES = st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=12)


def space(parameters: list[list[int]], buffers: list[list[int]]) -> Space:
    def named(shapes: list[list[int]], prefix: str) -> list[tuple[str, Tensor]]:
        return [(f"{prefix}{number}", torch.empty(shape)) for number, shape in enumerate(shapes)]

    half = len(parameters) // 2
    groups = [named(parameters[:half], "a"), named(parameters[half:], "b")]
    return lay_out(groups, named(buffers, "c"), torch.float32)


@given(parameters=SHAPES, buffers=SHAPES)
def test_segments_lie_on_the_grid_one_after_the_other(parameters: list[list[int]], buffers: list[list[int]]) -> None:
    layout = space(parameters, buffers)
    assert [segment.group for segment in layout.parameters] == sorted(segment.group for segment in layout.parameters)
    position = 0
    for segment in layout.segments:
        assert segment.start % GRID == 0 and segment.start >= position
        assert segment.stop - segment.start - segment.size in range(GRID)
        position = segment.stop
    assert position <= layout.blocks * BLOCK < position + BLOCK
    assert all(segment.stop <= layout.parameter_blocks * BLOCK for segment in layout.parameters)
    assert all(segment.start >= layout.parameter_blocks * BLOCK for segment in layout.buffers)


@given(parameters=SHAPES, buffers=SHAPES, workers=st.integers(1, 40))
def test_shards_are_whole_blocks_and_hold_everything_once(
    parameters: list[list[int]], buffers: list[list[int]], workers: int
) -> None:
    layout = space(parameters, buffers)
    shards = [layout.shard(rank, workers) for rank in range(workers)]
    flat = torch.arange(shards[0].padded_space)
    assert all(shard.size % BLOCK == 0 and shard.size == shards[0].size for shard in shards)
    assert torch.equal(torch.cat([shard.of(flat) for shard in shards]), flat)
    assert len(flat) >= layout.blocks * BLOCK
    for segment in layout.segments:
        found = [shard.of(flat)[place] for shard in shards if (place := shard.local(segment)) is not None]
        expected = flat[segment.start : segment.stop]
        assert torch.equal(torch.cat(found) if found else flat[:0], expected)
        assert all(len(part) % GRID == 0 for part in found)
        assert torch.equal(segment.view(flat).reshape(-1), expected[: segment.size])
        assert segment.view(flat).shape == segment.shape


def test_the_number_of_workers_moves_nothing() -> None:
    layout = space([[30, 40], [7]], [[5]])
    assert [layout.shard(0, workers).padded_space // BLOCK for workers in (1, 2, 3, 4, 50)] == [3, 4, 3, 4, 50]
    assert [segment.start for segment in layout.segments] == [0, 1216, 2048]
