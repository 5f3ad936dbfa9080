"""The fingerprint tells apart what computes other bits, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from unisono.config.sections import Train
from unisono.engine import numerics
from unisono.errors import NumericsError

pytestmark = pytest.mark.usefixtures("settled")

CPU = torch.device("cpu")


def fingerprint(**settings: Any) -> dict[str, Any]:
    return numerics.fingerprint(Train.model_validate(settings), device=CPU, data={"dataset": "d"}, layout="m")


def refuse(one: dict[str, Any], other: dict[str, Any]) -> str:
    with pytest.raises(NumericsError) as refused:
        numerics.compare(one, other, who="there", here="here", remedy="Do it here.")
    return str(refused.value)


def test_equal_fingerprints_agree() -> None:
    one = fingerprint()
    assert numerics.compare(one, fingerprint(), who="there", here="here", remedy="") == []
    assert numerics.digest(one) == numerics.digest(fingerprint()) and len(numerics.digest(one)) == 12
    assert json.loads(json.dumps(one)) == one


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"precision": "bf16"}, "precision"),
        ({"threads": 2}, "threads"),
        ({"microbatches": 4}, "microbatches"),
        ({"samples_per_step": 32}, "samples_per_step"),
        ({"optimizer": "sgd"}, "optimizer"),
    ],
)
def test_each_setting_that_decides_bits_is_in_it(settings: dict[str, Any], name: str) -> None:
    one, other = fingerprint(), fingerprint(**settings)
    assert numerics.differences(one, other) == [name]
    assert numerics.digest(one) != numerics.digest(other)
    assert f"{name}: {other[name]!r} there, {one[name]!r} here" in refuse(one, other)


def test_data_and_model_are_in_it() -> None:
    one = fingerprint()
    assert numerics.differences(one, one | {"dataset": "e"}) == ["dataset"]
    assert numerics.differences(one, one | {"model": "n"}) == ["model"]


def test_a_name_that_one_side_lacks_is_a_difference() -> None:
    one = fingerprint()
    assert "MKL_CBWR: 'AVX2' there, None here" in refuse(one, one | {"MKL_CBWR": "AVX2"})


def test_the_processor_only_explains() -> None:
    one = fingerprint()
    other = one | {"processor": "another"}
    warnings = numerics.compare(one, other, who="there", here="here", remedy="")
    assert len(warnings) == 1 and "'another' there" in warnings[0]
    assert numerics.digest(one) == numerics.digest(other)
    told = refuse(one, other | {"battery": "0"}).splitlines()
    assert "battery" in told[1] and "processor" in told[2], "what decides comes first"


def test_the_battery_is_stable_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    assert numerics.battery(CPU) == numerics.battery(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_flush_to_zero_is_seen_by_name_and_by_battery() -> None:
    one = fingerprint()
    torch.set_flush_denormal(False)
    other = fingerprint()
    torch.set_flush_denormal(True)
    assert one["flush_to_zero"] and not other["flush_to_zero"]
    assert numerics.differences(one, other) == ["battery", "flush_to_zero"]
    assert "flush_to_zero: False there, True here" in refuse(one, other)


def test_an_instruction_set_limit_is_refused() -> None:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no wider instruction set to be limited")
    program = (
        "import json, torch\n"
        "from unisono.engine import numerics\n"
        "from unisono.config.sections import Train\n"
        "numerics.settle(threads=1, device=torch.device('cpu'))\n"
        "print(json.dumps(numerics.fingerprint(Train(), device=torch.device('cpu'), data={'dataset': 'd'}, "
        "layout='m')))\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    one, other = fingerprint(), json.loads(done.stdout)
    assert {"battery", "instructions", "ATEN_CPU_CAPABILITY"} <= set(numerics.differences(one, other))
    assert "instructions: 'DEFAULT' there" in refuse(one, other)


def test_settling_makes_a_known_state() -> None:
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("medium")
    numerics.settle(threads=1, device=CPU)
    assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
    assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.full((64,), 1e-38) * 1e-3 == 0).all()
