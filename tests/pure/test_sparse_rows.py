"""Gradients that come as rows: the sum of dense ones to the bit, and an update that no cut into shards changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from unisono.config.recipe import check
from unisono.config.sections import Train
from unisono.determinism.nodes import Node, fold
from unisono.determinism.space import BLOCK
from unisono.engine.optimizer import Optimizer
from unisono.engine.reduction import Sum, Totals
from unisono.engine.replica import Replica, tensors_sha256
from unisono.engine.sparse_rows import Rows, add_up, pack, rows_of, squares_of_rows, unpack
from unisono.errors import RecipeError
from unisono.exchange.protocol import Exchange
from unisono.exchange.simulated import play
from unisono.exchange.solo import Solo
from unisono.processes.progress_table import RUNNING

pytestmark = pytest.mark.usefixtures("settled")

ROWS = 700
MICROBATCHES = 5
RATES = [0.1, 0.05, 0.02, 0.01, 0.02]
RULES: list[dict[str, Any]] = [
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "adam"},
    {"optimizer": "adamw"},
    {"optimizer": "lion", "beta2": 0.99},
]
NAMES = ["momentum", "adam", "adamw", "lion"]


def some_rows(seed: int, width: int, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Rows:
    """A microbatch's; sometimes none. They cluster, so that some shards have none."""
    generator = torch.Generator().manual_seed(seed)
    count = 0 if seed % 4 == 3 else 60
    numbers = torch.unique(torch.randint(0, rows if seed % 2 else rows // 3, (count,), generator=generator))
    values = torch.randn(len(numbers), width, generator=generator, dtype=dtype)
    return Rows(numbers=numbers, values=values * 10.0 ** torch.randint(-3, 4, (len(numbers), 1), generator=generator))


def dense(rows: Rows, width: int) -> Tensor:
    return torch.zeros(ROWS, width, dtype=rows.values.dtype).index_copy_(0, rows.numbers, rows.values)


@pytest.mark.parametrize("width", [1, 5, 32])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 6, 8, 13])
def test_the_sum_is_that_of_dense_gradients(width: int, microbatches: int) -> None:
    parts = {number: some_rows(number, width) for number in range(microbatches)}
    expected = fold([dense(rows, width) for rows in parts.values()])
    for first, last in ((0, ROWS), (0, 1), (17, 400), (400, ROWS), (ROWS, ROWS)):
        found = add_up(dict(reversed(parts.items())), first, last)
        touched = {n for rows in parts.values() for n in rows.numbers.tolist() if first <= n < last}
        assert found.numbers.tolist() == sorted(touched)
        assert (
            torch.equal(found.values, expected[found.numbers])
            and not torch.signbit(found.values[found.values == 0]).any()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_rows_come_out_as_they_were(dtype: torch.dtype) -> None:
    rows = [some_rows(number, 5, dtype) for number in range(6)]
    rows.append(Rows(numbers=torch.tensor([2**23 + 1]), values=torch.full((1, 5), torch.nan, dtype=dtype)))
    counts = [len(one.numbers) for one in rows]
    assert 0 in counts
    content = torch.full((sum(counts) * 6 + 7,), -1.0, dtype=dtype)
    pack(rows, content)
    for one, found in zip(rows, unpack(content, counts, 5), strict=True):
        assert torch.equal(found.numbers, one.numbers)
        assert torch.equal(found.values.view(torch.uint8), one.values.view(torch.uint8))


def test_rows_of_contributions() -> None:
    like = torch.zeros(4, 2)
    assert len(rows_of(None, like).numbers) == 0 and rows_of(None, like).values.shape == (0, 2)
    sparse = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (4, 2), check_invariants=True).coalesce()
    assert rows_of(sparse, like).numbers.tolist() == [1, 3]
    assert rows_of(torch.ones(4, 2), like).numbers.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("width", [1, 2, 5, 32, 33])
def test_squares_of_a_row_do_not_depend_on_other_rows(width: int) -> None:
    values = torch.randn(50, width, generator=torch.Generator().manual_seed(0))
    expected = squares_of_rows(values)
    torch.testing.assert_close(expected, values.double().square().sum(1), rtol=1e-6, atol=0)
    for start, stop in ((0, 1), (3, 4), (7, 30)):
        assert torch.equal(squares_of_rows(values[start:stop]), expected[start:stop])


class Net(nn.Module):
    """Two tables between other weights; one with rows that blocks, and so shards, cut."""

    def __init__(self, width: int, sparse: bool) -> None:
        super().__init__()
        self.before = nn.Linear(9, 31)
        self.table = nn.Embedding(ROWS, width, sparse=sparse)
        self.small = nn.Embedding(3, 2, sparse=sparse)
        self.after = nn.Linear(31, 7)
        self.register_buffer("mean", torch.linspace(0, 1, 33))


def net(width: int, sparse: bool = True) -> nn.Module:
    torch.manual_seed(5)
    return Net(width, sparse)


def rows_in_step(step: int, name: str, shape: torch.Size) -> dict[int, Rows]:
    """In the second step the large table gets no gradient at all, the small one in the first only."""
    silent = step == 1 if name.startswith("table") else step > 0
    return {
        number: rows_of(None, torch.empty(shape)) if silent else some_rows(10 * step + number, shape[1], rows=shape[0])
        for number in range(MICROBATCHES)
    }


def gradient(replica: Replica, step: int) -> tuple[Sum, list[bool]]:
    """My shard of a step's sum, in rows where the layout has tables; and what was used."""
    flat, tables, used = torch.zeros_like(replica.flat), {}, []
    for index, segment in enumerate(replica.space.parameters):
        if segment.name in ("table.weight", "small.weight"):
            rows = rows_in_step(step, segment.name, segment.shape)
            used.append(any(len(one.numbers) for one in rows.values()))
            if segment.table:
                tables[index] = rows
            else:
                parts = [torch.zeros(segment.shape).index_copy_(0, one.numbers, one.values) for one in rows.values()]
                segment.view(flat).copy_(fold(parts))
        else:
            drawn = torch.Generator().manual_seed(step * 100 + len(segment.name))
            segment.view(flat).copy_(torch.randn(segment.shape, generator=drawn))
            used.append(True)
    return Sum([(Node(0, 0), replica.shard.of(flat).clone())], tables), used


def run(exchange: Exchange, settings: Train, module: nn.Module) -> tuple[Replica, Optimizer, dict[str, Tensor]]:
    """Train; return everything by name, norms too."""
    replica = zoo.replicate(zoo.Bare(module), exchange.rank, exchange.workers)
    optimizer = Optimizer(replica, exchange, settings)
    norms = []
    for step, rate in enumerate(RATES):
        slope, used = gradient(replica, step)
        totals = Totals(loss=1.0, terms=3, used=used, integers=replica.integer_values(), request=RUNNING)
        norms.append(optimizer.update(slope, totals, step=step, rate=rate))
        optimizer.publish(totals.integers)
    found = {name: value.clone() for name, value in replica.all_tensors().items()}
    for name, shard in optimizer.slots.items():
        flat = torch.zeros_like(replica.flat)
        exchange.gather_shards(shard, flat)
        found |= {f"{name}.{segment.name}": segment.view(flat).clone() for segment in replica.space.parameters}
    return replica, optimizer, found | {"norms": torch.tensor(norms, dtype=torch.float64)}


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@pytest.mark.parametrize("lazy", [False, True], ids=["dense", "lazy"])
@pytest.mark.parametrize("width", [1, 5, 32])
def test_no_cut_changes_a_bit(width: int, lazy: bool, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Train.model_validate({"weight_decay": 0.1, "lazy_rows": lazy, "clip_norm": 400.0, **rule})
    found = set()
    for workers, chunk in ((1, 2**20), (1, BLOCK), (2, 2 * BLOCK), (3, BLOCK), (5, 2**20), (8, BLOCK)):
        monkeypatch.setattr("unisono.engine.optimizer.CHUNK", chunk)
        played = play(workers, lambda exchange: run(exchange, settings, net(width))[2])
        norms = played[0]["norms"]
        assert norms.min() < 400 < norms.max(), "some steps are clipped"
        found |= {tensors_sha256(one) for one in played}
    assert len(found) == 1


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@pytest.mark.parametrize("width", [5, 32])
def test_without_laziness_rows_are_only_another_way(width: int, rule: dict[str, Any]) -> None:
    settings = Train.model_validate({"weight_decay": 0.1, **rule})
    _, _, rows = run(Solo(), settings, net(width))
    _, _, plain = run(Solo(), settings, net(width, sparse=False))
    torch.testing.assert_close(rows.pop("norms"), plain.pop("norms"), rtol=1e-6, atol=0)
    assert rows.keys() == plain.keys() and tensors_sha256(rows) == tensors_sha256(plain)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_lazy_rows_that_no_step_touched_stay(rule: dict[str, Any]) -> None:
    settings = Train.model_validate({"weight_decay": 0.1, "lazy_rows": True, **rule})
    before = net(5).table.weight.detach().clone()  # type: ignore[union-attr]
    _, optimizer, found = run(Solo(), settings, net(5))
    touched = torch.zeros(ROWS, dtype=torch.bool)
    for step in range(len(RATES)):
        for rows in rows_in_step(step, "table.weight", before.shape).values():
            touched[rows.numbers] = True
    assert 50 < touched.sum() < ROWS - 50
    changed = (found["table.weight"] != before).any(1)
    assert torch.equal(changed, touched)
    for slot in optimizer.slots:
        assert torch.equal((found[f"{slot}.table.weight"] != 0).any(1), touched)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_lazy_step_is_that_of_a_table_of_the_touched_rows(rule: dict[str, Any]) -> None:
    """Step after step with the same rows, a lazy update equals a dense one of the table that has no others."""
    few = torch.tensor([3, 4, 100, 333, 699])
    settings = {"weight_decay": 0.1, **rule}

    def train(module: nn.Embedding, numbers: Tensor) -> Tensor:
        replica = zoo.replicate(zoo.Bare(module))
        optimizer = Optimizer(replica, Solo(), Train.model_validate({**settings, "lazy_rows": module.sparse}))
        for step, rate in enumerate(RATES):
            values = torch.randn(5, 32, generator=torch.Generator().manual_seed(step))
            flat = torch.zeros_like(replica.flat)
            tables = {0: {0: Rows(numbers=numbers, values=values)}} if module.sparse else {}
            if not module.sparse:
                replica.space.parameters[0].view(flat).copy_(values)
            totals = Totals(loss=1.0, terms=1, used=[True], integers=torch.empty(0), request=RUNNING)
            optimizer.update(Sum([(Node(0, 0), flat)], tables), totals, step=step, rate=rate)
            optimizer.publish(torch.empty(0, dtype=torch.int64))
        return module.weight.detach()

    torch.manual_seed(1)
    large, small = nn.Embedding(ROWS, 32, sparse=True), nn.Embedding(5, 32)
    small.weight.data.copy_(large.weight[few])
    assert torch.equal(train(large, few)[few], train(small, torch.arange(5)))


def test_lazy_rows_have_no_average() -> None:
    with pytest.raises(RecipeError, match="lazy_rows and ema_decay"):
        check({"train": {"lazy_rows": True, "ema_decay": 0.9}})
