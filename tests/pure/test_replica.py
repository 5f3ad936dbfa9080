"""A replica computes what the module computes, and guards its buffers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import zoo
from unisono.data.order import Step
from unisono.engine.assignment import Assignment
from unisono.engine.contribution import Contributor
from unisono.engine.reduction import Reduction
from unisono.engine.replica import Replica, tensors_sha256
from unisono.errors import ContractError
from unisono.exchange.solo import Solo
from unisono.tasks.task import Microbatch, Task

pytestmark = pytest.mark.usefixtures("settled")


class Summed(Task):
    """Sums a module's output, weighted by the number of samples."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self._make()

    def loss(self, module: nn.Module, microbatch: Microbatch) -> tuple[Tensor, int]:
        return module(microbatch["x"]).square().sum(), len(microbatch["x"])

    def measure(self, module: nn.Module, microbatch: Microbatch) -> dict[str, Tensor]:
        return {"loss": module(microbatch["x"]).square().sum(1)}


def one_step(make: Callable[[], nn.Module], pieces: list[Tensor]) -> tuple[Replica, dict[str, Tensor], Tensor]:
    """Contributions of `pieces`, reduced. Return the replica, the mean of every part by name, and the integers."""
    task = Summed(make)
    replica = zoo.replicate(task)
    before = {name: value.clone() for name, value in replica.all_tensors().items()}
    contributor = Contributor(replica=replica, seed=0)
    reduction = Reduction(replica, Solo())
    step = Step(number=0, epoch=0, microbatches=tuple(np.arange(len(piece)) for piece in pieces))
    for number in reduction.begin(step):
        reduction.add(number, contributor.contribute(0, number, {"x": pieces[number]}))
        for name, value in replica.all_tensors().items():
            assert torch.equal(value, before[name]), f"{name} is not as it was"
    gradient, totals = reduction.finish()
    flat = gradient.mean(slice(0, replica.shard.size), totals.terms)
    return replica, {segment.name: segment.view(flat).clone() for segment in replica.space.segments}, totals.integers


def test_a_step_took_also_what_others_computed_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a slow worker would seem quick, since it has help, and keep its share."""
    task, learnt, exchange = Summed(lambda: nn.Linear(3, 2)), [], Solo()
    monkeypatch.setattr(Assignment, "learn", lambda self, microseconds: learnt.append(microseconds))
    exchange.offload = offload = SimpleNamespace(taken_seconds=100.0)  # type: ignore[assignment]
    contributor = Contributor(replica=zoo.replicate(task), seed=0)
    reduction = Reduction(contributor.replica, exchange)
    reduction.begin(Step(number=0, epoch=0, microbatches=(np.arange(2),)))
    reduction.add(0, contributor.contribute(0, 0, {"x": torch.ones(2, 3)}))
    offload.taken_seconds += 50.0
    reduction.finish()
    ((microseconds,),) = learnt
    assert 50e6 <= microseconds < 150e6  # what was taken before the step does not count


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())


def test_running_statistics_are_the_weighted_mean_over_microbatches() -> None:
    pieces = [torch.randn(size, 3, generator=torch.Generator().manual_seed(size)) * 3 for size in (2, 5, 3)]
    _, means, integers = one_step(normed, pieces)
    for name in ("running_mean", "running_var"):
        expected = torch.zeros(4, dtype=torch.float64)
        for piece in pieces:
            torch.manual_seed(0)
            alone = normed()
            start = getattr(alone[1], name).clone()
            alone(piece)
            change = getattr(alone[1], name) - start
            assert change.abs().min() > 1e-4
            expected += change.double() * len(piece) / 10
        torch.testing.assert_close(means[f"1.{name}"].double(), expected, rtol=1e-5, atol=1e-7)
    assert integers.tolist() == [1], "the counter of batches advances once a step"


def test_gradient_is_that_of_the_whole_step() -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    pieces = [torch.randn(size, 3) for size in (4, 1, 3, 2, 2)]
    replica, means, _ = one_step(plain, pieces)
    torch.manual_seed(0)
    reference = plain()
    (reference(torch.cat(pieces)).square().sum() / 12).backward()
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(means[name], parameter.grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(dict(replica.backend.module.named_parameters())[name].detach(), parameter.detach())


class Buffers(nn.Module):
    """Changes buffers in every way that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("assigned", torch.ones(3))
        self.register_buffer("in_place", torch.ones(3))
        self.register_buffer("data", torch.ones(3), persistent=False)
        self.register_buffer("native", torch.zeros(3))
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.inf]))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("count", torch.tensor([5, 7], dtype=torch.int32))
        self.register_buffer("f16", torch.ones(2, dtype=torch.float16))
        self.register_buffer("c64", torch.ones(2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) * self.scale  # autograd keeps this buffer, while others change
        self.assigned = self.assigned + 1
        self.in_place.mul_(3)
        self.data.data.fill_(5)
        nn.functional.batch_norm(x, self.native, self.scale * 2, training=True)
        self.flag = torch.tensor(True)
        self.count += 1
        return x


def test_buffers_however_they_are_changed() -> None:
    replica, means, integers = one_step(Buffers, [torch.ones(2, 3), torch.ones(4, 3)])
    assert means["assigned"].tolist() == [1, 1, 1]
    assert means["in_place"].tolist() == [2, 2, 2]
    assert means["data"].tolist() == [4, 4, 4]
    assert means["native"].abs().min() > 0
    assert means["mask"].tolist() == [0, 0, 0] and means["scale"].tolist() == [0, 0, 0]
    assert dict(zip(replica.integers, [integers[:1].tolist(), integers[1:].tolist()], strict=True)) == {
        "flag": [1], "count": [6, 8]
    }  # fmt: skip
    replica.accept(integers)
    buffers = dict(replica.backend.module.named_buffers())
    assert buffers["flag"].dtype == torch.bool and buffers["flag"].item() is True
    assert buffers["count"].dtype == torch.int32 and buffers["count"].tolist() == [6, 8]


@pytest.mark.parametrize("name", ["f16", "c64"])
def test_a_buffer_that_no_contribution_can_carry_may_not_change(name: str) -> None:
    class Changing(Buffers):
        def forward(self, x: Tensor) -> Tensor:
            getattr(self, name).add_(1)
            return super().forward(x)

    with pytest.raises(ContractError, match=f"buffer '{name}'.*allowed are torch.float32"):
        one_step(Changing, [torch.ones(2, 3)])


def test_a_buffer_that_grows_is_refused() -> None:
    class Growing(Buffers):
        def forward(self, x: Tensor) -> Tensor:
            self.assigned = torch.ones(4)
            return self.linear(x)

    with pytest.raises(ContractError, match=r"buffer 'assigned' had shape \(3,\) and has \(4,\)"):
        one_step(Growing, [torch.ones(2, 3)])


def test_tied_and_frozen() -> None:
    torch.manual_seed(0)
    module = zoo.Odd()
    replica = zoo.replicate(zoo.Bare(module))
    names = [segment.name for segment in replica.space.parameters]
    assert "embedding.weight" in names and "out.weight" not in names
    assert not any(name.startswith("frozen") for name in names)
    assert module.out.weight is module.embedding.weight
    replica.flat.fill_(2.0)
    assert (module.out.weight == 2).all() and (module.unused.bias == 2).all()
    assert (module.frozen.weight != 2).all()
    tensors = replica.tensors()
    assert {"out.weight", "embedding.weight", "frozen.weight"} <= tensors.keys() == module.state_dict().keys()


def test_tied_buffers_stay_tied() -> None:
    def make() -> nn.Module:
        module = normed()
        module.append(nn.BatchNorm1d(4, affine=False))
        module[3].running_mean = module[1].running_mean
        return module

    replica = zoo.replicate(zoo.Bare(make()))
    module = replica.backend.module
    assert module[3].running_mean is module[1].running_mean
    module(torch.randn(5, 3))
    replica.backend.settle_buffers()
    replica.take_buffer_changes()
    replica.restore_buffers()
    assert module[3].running_mean is module[1].running_mean and not module[1].running_mean.any()


def odd(size: int) -> Tensor:
    """float32 values at an address that is no multiple of 64 bytes, as memory-mapped files have them."""
    value = torch.randn(size + 33)[3 : 3 + size]
    assert value.data_ptr() % 64
    return value


def test_weights_at_odd_addresses_are_copied_to_aligned_memory() -> None:
    module = nn.ParameterDict({"trained": nn.Parameter(odd(33)), "frozen": nn.Parameter(odd(5), requires_grad=False)})
    module.register_buffer("mean", odd(30))
    module.register_buffer("count", torch.arange(9)[1:])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    replica = zoo.replicate(zoo.Bare(module))
    for name, value in replica.all_tensors().items():
        assert value.data_ptr() % 64 == 0, name
        assert torch.equal(value, before[name])


def test_strided_weights_become_contiguous() -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    expected = module.weight.detach().clone()
    replica = zoo.replicate(zoo.Bare(module))
    assert module.weight.is_contiguous() and torch.equal(replica.tensors()["weight"], expected)


def test_float64() -> None:
    replica, means, _ = one_step(lambda: normed().double(), [torch.randn(4, 3, dtype=torch.float64)])
    assert replica.flat.dtype == torch.float64
    assert means["1.running_mean"].dtype == torch.float64 and means["1.running_mean"].any()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()),
            "'0.weight' is torch.float32, '1.weight' is torch.float64",
        ),
        (lambda: nn.Linear(2, 2).bfloat16(), "'weight' is torch.bfloat16"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "nothing to train"),
        (lambda: nn.ReLU(), "nothing to train"),
    ],
    ids=["mixed", "half", "frozen", "empty"],
)
def test_what_cannot_be_trained_is_refused(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ContractError, match=said):
        zoo.replicate(zoo.Bare(make()))


def test_frozen_half_precision_is_fine() -> None:
    zoo.replicate(zoo.Bare(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16().requires_grad_(False))))


def test_hash_of_tensors_is_as_documented() -> None:
    import hashlib

    tensors = {"b": torch.tensor([[1.0, -0.0]]), "a": torch.tensor(3)}
    content = b"a int64 \n" + np.int64(3).tobytes() + b"b float32 1,2\n" + np.array([1.0, -0.0], "<f4").tobytes()
    assert tensors_sha256(tensors) == hashlib.sha256(content).hexdigest()
    assert tensors_sha256({**tensors, "b": torch.tensor([[1.0, 0.0]])}) != hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ((torch.ones(2), 2), "of shape"),
        ((torch.tensor(1), 2), "torch.int64"),
        ((torch.tensor(1.0), 2.0), "2.0 as its number of terms"),
        ((torch.tensor(1.0), True), "True as its number of terms"),
        ((torch.tensor(1.0), -1), "-1 as its number of terms"),
    ],
)
def test_a_loss_that_is_no_sum_is_refused(loss: tuple[Tensor, object], said: str) -> None:
    task = Summed(normed)
    task.loss = lambda module, microbatch: loss  # type: ignore[method-assign,assignment,return-value]
    contributor = Contributor(replica=zoo.replicate(task), seed=0)
    with pytest.raises(ContractError, match=said):
        contributor.contribute(0, 0, {"x": torch.ones(2, 3)})


class RunningMaximum(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("highest", torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        self.highest = torch.maximum(self.highest, x.detach().max())
        return self.linear(x)


@pytest.mark.parametrize(("start", "refused"), [(-torch.inf, True), (-1e30, False)])
def test_a_change_from_infinity_has_no_mean_and_is_refused(start: float, refused: bool) -> None:
    replica = zoo.replicate(zoo.Bare(RunningMaximum(start)))
    backend = replica.backend
    backend.module(torch.ones(3, 2))
    backend.settle_buffers()
    if refused:
        with pytest.raises(ContractError, match=r"'highest' was not finite and changes.*large finite number"):
            replica.take_buffer_changes()
    else:
        (change,) = replica.take_buffer_changes()
        assert change is not None and torch.equal(change, torch.tensor(1e30))
