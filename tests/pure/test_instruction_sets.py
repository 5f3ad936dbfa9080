"""Portable numerics are limits that hold in the process, or a refusal that names the remedy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from unisono.config.sections import Train
from unisono.determinism import instruction_sets
from unisono.determinism.instruction_sets import LIMITS, NEEDED, limit
from unisono.engine import numerics
from unisono.errors import NumericsError, RecipeError
from unisono.kernels import linear

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unlimited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process without limits, on a processor that has all that portable numerics need."""
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(instruction_sets, "CPUINFO", write_flags(tmp_path, NEEDED))
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "x86_64")
    torch.ones(8, 8) @ torch.ones(8, 8)  # so that no limit could take effect any more


def write_flags(folder: Path, flags: tuple[str, ...]) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu sse2 {' '.join(flags)}\nbugs\t\t:\n")
    return path


def refuse(numerics: str = "portable") -> str:
    with pytest.raises(NumericsError) as refused:
        limit(numerics)
    return str(refused.value)


def test_native_numerics_change_nothing() -> None:
    before = dict(os.environ)
    limit("native")
    assert dict(os.environ) == before and not instruction_sets.limited()


def test_limits_that_come_too_late_are_refused_and_taken_back() -> None:
    before = dict(os.environ)
    told = refuse()
    assert "computed before" in told and "before Python starts, or use the command line" in told
    assert all(f"{name}={value}" in told for name, value in LIMITS.items())
    assert dict(os.environ) == before


def test_limits_that_are_named_but_do_not_hold_are_seen_by_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LIMITS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NumericsError, match="computed before"):
        numerics.fingerprint(Train(numerics="portable", device="cpu"), device=CPU, data={}, layout="m")


def test_other_values_in_the_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert "the environment has MKL_CBWR=AVX2; allowed is MKL_CBWR=COMPATIBLE" in refuse()


def test_a_processor_without_avx2_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(instruction_sets, "CPUINFO", write_flags(tmp_path, NEEDED[2:]))
    assert "lacks avx2, fma." in refuse()
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "aarch64")
    assert "on aarch64" in refuse()


def test_limited_processes_use_no_instructions_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert linear.multiplies_bf16.__wrapped__()
    for name, value in LIMITS.items():
        monkeypatch.setenv(name, value)
    assert not linear.multiplies_bf16.__wrapped__()


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_portable_numerics_are_for_processors(device: str) -> None:
    from unisono.config import recipe as recipes

    with pytest.raises(RecipeError, match='allowed is device = "cpu"'):
        recipes.check({"train": {"numerics": "portable", "device": device}})
