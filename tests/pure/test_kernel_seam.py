"""A kernel that is declared is in the fingerprint and in the battery, if it has bits of its own, and nowhere else."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unisono.config.sections import Train
from unisono.engine import numerics
from unisono.errors import NumericsError
from unisono.kernels import kernel as kernels
from unisono.kernels.kernel import Kernel, Numbers, declare, declared_kernels

pytestmark = pytest.mark.usefixtures("settled")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Declarations of a test, forgotten after it."""
    declared_kernels()
    monkeypatch.setattr(kernels, "_DECLARED", dict(kernels._DECLARED))
    yield
    kernels._import_all.cache_clear()


def fingerprint() -> dict[str, Any]:
    return numerics.fingerprint(Train(), device=CPU, data={}, layout="m")


def double(values: Tensor) -> Tensor:
    return values * 2


def try_double(numbers: Numbers, device: torch.device) -> list[Tensor]:
    return [double(numbers(3, 5))]


def kernel(**changed: Any) -> Kernel:
    given = {"name": "twice", "reference": double, "compiled": double, "same_bits": False, "battery": try_double}
    return Kernel(**(given | changed))  # type: ignore[arg-type]


def test_a_second_kernel_enters_fingerprint_and_battery_by_itself() -> None:
    before = fingerprint()
    declare(kernel())
    found = fingerprint()
    assert found["twice"] == "compiled"
    assert numerics.differences(found, before) == ["battery", "twice"]


def test_without_a_compiler_only_a_kernel_with_bits_of_its_own_says_so() -> None:
    before = fingerprint()
    declare(kernel(compiled=None, name="mine", battery=kernels.compute_nothing))
    declare(kernel(compiled=None, same_bits=True))
    assert fingerprint() == before | {"mine": "operations"}


def test_a_state_of_its_own_is_what_the_fingerprint_says() -> None:
    declare(kernel(state=lambda: "on Tuesdays"))
    assert fingerprint()["twice"] == "on Tuesdays"


def test_a_name_is_declared_once() -> None:
    one = kernel()
    assert declare(one) is one and declare(one) is one
    with pytest.raises(ValueError, match="'twice' is declared already"):
        declare(kernel(same_bits=True))


def test_all_kernels_of_the_package_are_declared() -> None:
    own = {kernel.name: kernel for kernel in declared_kernels()}
    assert set(own) == {"adam", "bf16_products", "dropout", "gelu", "mean", "packed_attention"}
    assert {name for name, each in own.items() if not each.same_bits} == {"bf16_products", "packed_attention"}
    assert all(each.compiled is not None for each in own.values()), "the tests need a C compiler"


@pytest.mark.parametrize("value", ["kernels_of_another:TWICE", "kernels_of_another"])
def test_another_package_declares_kernels_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    install(tmp_path, monkeypatch, value)
    assert [each.name for each in declared_kernels()].count("twice") == 1
    assert fingerprint()["twice"] == "operations"


def test_an_entry_point_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "kernels_of_another:THRICE")
    with pytest.raises(NumericsError, match=r"kernel 'some': .*THRICE"):
        declared_kernels()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An installed package with one kernel, as importlib.metadata sees it."""
    (folder / "kernels_of_another.py").write_text(
        "from unisono.kernels.kernel import Kernel, declare\n"
        "TWICE = declare(Kernel(name='twice', reference=abs, compiled=None, same_bits=False))\n"
    )
    facts = folder / "another-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[unisono.kernels]\nsome = {value}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "kernels_of_another", raising=False)
    kernels._import_all.cache_clear()


def test_the_guide_declares_a_kernel() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.S)
    found: dict[str, Any] = {}
    exec(block, found)
    declared = kernels._DECLARED["softsign"]
    assert declared.describe() == "operations"
    numbers = lambda *shape, seed=1: torch.linspace(-1, 1, math.prod(shape)).reshape(shape)  # noqa: E731
    assert [tuple(one.shape) for one in declared.battery(numbers, torch.device("cpu"))] == [(7, 33), (5,)]
