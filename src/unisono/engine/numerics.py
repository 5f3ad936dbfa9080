"""The state that a process computes in, and its fingerprint: everything that decides bits, except recipe and data.

Owns the switches that are set in torch, the names that explain a difference, and the battery that decides whether there
is one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from unisono.config.sections import Train
from unisono.determinism import instruction_sets
from unisono.errors import NumericsError
from unisono.kernels.kernel import declared_kernels

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
DEVICES = ("cpu", "cuda")
LIMITING_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "NVIDIA_TF32_OVERRIDE",
    CUBLAS,
)
EXPLAINING_ONLY = frozenset({"processor"})
"""Names whose difference is a warning where the battery agrees."""


def settle(*, threads: int, device: torch.device) -> None:
    """Put this process into the known state: threads, flush-to-zero, deterministic kernels, no choice by timing.

    Called before any kernel runs, so that threads which are started later inherit flush-to-zero.
    """
    torch.set_flush_denormal(True)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    os.environ.setdefault(CUBLAS, ":4096:8")
    # torch.use_deterministic_algorithms does this and imports the compiler, which takes longer than to start a worker
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads unwritten memory
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest")
    reset_modes()  # a forked worker inherits those of its parent's thread
    if device.type == "cuda":
        torch.cuda.set_device(device)


def reset_modes() -> None:
    """Gradients on, autocast off, in this thread."""
    torch.set_grad_enabled(True)
    for kind in DEVICES:
        torch.set_autocast_enabled(kind, False)


class Settings:
    """Everything that `settle` sets and a user's code may change, as it is in this thread now."""

    def __init__(self) -> None:
        self._modes = _read_modes()
        self._flushes = bool((torch.full((1,), 1e-38, dtype=torch.float32) * 1e-3 == 0).all())
        self._workspace = os.environ.get(CUBLAS)
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def keep(self) -> None:
        """Restore what was changed, in about a microsecond if nothing was."""
        torch.set_flush_denormal(self._flushes)  # quicker than to look at it
        if _read_modes() != self._modes:
            self.restore()

    def restore(self) -> None:
        """Restore everything."""
        threads, deterministic, warns_only, fills, benchmark, precision, dtype, grad, *autocast = self._modes
        torch.set_flush_denormal(self._flushes)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch._C._set_deterministic_algorithms(deterministic, warn_only=warns_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        for kind, enabled in zip(DEVICES, autocast, strict=True):
            torch.set_autocast_enabled(kind, enabled)
        if self._workspace is None:
            os.environ.pop(CUBLAS, None)
        if self._device is not None:
            torch.cuda.set_device(self._device)


def _read_modes() -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        *(torch.is_autocast_enabled(kind) for kind in DEVICES),
    )


def fingerprint(train: Train, *, device: torch.device, data: Mapping[str, str], layout: str) -> dict[str, Any]:
    """Everything that decides bits except the recipe, as plain names and values; `battery` is computed, not named.

    `data` names the dataset's hashes and versions, `layout` the hash of the model's names and shapes and first weights.

    Raises:
        NumericsError: the recipe's numerics are portable, and this process is not limited to them.
    """
    if train.numerics == "portable":
        instruction_sets.verify()
    flags = torch.__config__.show()
    libraries = re.findall(r"(oneAPI Math Kernel Library Version [\d.]+|MKL-DNN v[\d.]+|OpenMP [\d]+)", flags)
    found = {
        "unisono": metadata.version("unisono"),
        "torch": torch.__version__,
        "libraries": ", ".join(sorted(set(libraries))),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "numerics": train.numerics,
        "threads": train.threads,
        "flush_to_zero": _flushes_to_zero(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": train.precision,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "attention": ",".join(
            name for name in ("flash", "mem_efficient", "math") if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
        ),
        **{kernel.name: kernel.describe() for kernel in declared_kernels() if not kernel.same_bits},
        "compile": "off",
        "optimizer": f"{train.optimizer}, {'foreach' if train.optimizer == 'lion' else 'fused'}",
        "microbatches": train.microbatches,
        "samples_per_step": train.samples_per_step,
        "model": layout,
        **{name: os.environ[name] for name in LIMITING_VARIABLES if name in os.environ},
        **data,
    }
    return {**found, "battery": battery(device)}


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names under which two fingerprints differ, battery first."""
    names = sorted(set(mine) | set(other), key=lambda name: (name != "battery", name))
    return [name for name in names if mine.get(name) != other.get(name)]


def compare(mine: Mapping[str, Any], other: Mapping[str, Any], *, who: str, here: str, remedy: str) -> list[str]:
    """Refuse another fingerprint; return warnings where only explaining names differ and the battery agrees.

    Raises:
        NumericsError: names each difference and both values.
    """
    names = differences(mine, other)
    told = [f"{name}: {other.get(name)!r} {who}, {mine.get(name)!r} {here}" for name in names]
    if set(names) <= EXPLAINING_ONLY:
        return [f"numerics: {line} (the battery agrees)" for line in told]
    raise NumericsError("the numerics differ, so the bits would:\n  " + "\n  ".join(told) + f"\n{remedy}")


def digest(found: Mapping[str, Any]) -> str:
    """A fingerprint's short name: 12 hexadecimal digits over all that must agree."""
    content = json.dumps({name: found[name] for name in sorted(found) if name not in EXPLAINING_ONLY})
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def battery(device: torch.device) -> str:
    """SHA-256 over what a fixed set of small kernels computes here: it shows differences that names miss. Well under a
    second."""
    result = hashlib.sha256()
    saved = torch.get_rng_state()
    try:
        for value in _kernels(device):
            result.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    finally:
        torch.set_rng_state(saved)
    return result.hexdigest()


def _kernels(device: torch.device) -> list[Tensor]:
    """One result of each kernel that models are made of, on inputs from integer arithmetic."""

    def numbers(*shape: int, seed: int = 1) -> Tensor:
        grid = (np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed * 97)) % np.uint64(
            4093
        )
        return torch.from_numpy(grid.astype(np.float32).reshape(shape) / 2048 - 1).to(device)

    x, w = numbers(77, 193), numbers(129, 193, seed=2)
    out = [F.linear(x, w), F.linear(x[:3], w[:5]), F.linear(x.bfloat16(), w.bfloat16()), x.sum(), x.mean(0), x.var(1)]
    out += [
        function(x * 3) for function in (torch.exp, torch.tanh, torch.sigmoid, torch.erf, F.gelu, F.silu, torch.sin)
    ]
    out += [
        (x.abs() + 0.1).pow(0.37),
        (x.abs() + 0.1).log(),
        (x.abs() + 0.1).rsqrt(),
        F.softmax(x, -1),
        F.layer_norm(x, (193,)),
    ]
    query = numbers(2, 3, 19, 32)
    out.append(F.scaled_dot_product_attention(query, query * 0.5, query + 0.25))
    for kernel in declared_kernels():
        out += [] if kernel.same_bits else kernel.battery(numbers, device)
    out.append(F.conv2d(numbers(2, 3, 17, 17), numbers(5, 3, 3, 3, seed=3), padding=1))
    out.append(
        F.embedding_bag(torch.arange(40, device=device) % 77, x, torch.tensor([0, 7, 20], device=device), mode="sum")
    )
    weight = w.clone().requires_grad_()
    F.cross_entropy(F.gelu(F.linear(x, weight)), torch.arange(77, device=device) % 129).backward()
    assert weight.grad is not None
    out.append(weight.grad)
    torch.manual_seed(7)
    out.append(F.dropout(x, 0.3))
    out.append(_after_adam(weight.detach(), weight.grad))
    tiny = torch.full((131_072,), 1e-38, device=device)  # large enough that every thread computes a part
    out.append(tiny * 1e-3)
    return out


def _after_adam(weight: Tensor, gradient: Tensor) -> Tensor:
    """One update by the kernel that `optimizer.py` uses (the class torch.optim.AdamW would import the compiler)."""
    adam(
        [weight],
        [gradient],
        [torch.zeros_like(weight)],
        [torch.zeros_like(weight)],
        [],
        [torch.zeros((), device=weight.device)],
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=0.01,
        weight_decay=0.01,
        eps=1e-8,
        maximize=False,
    )
    return weight


def _flushes_to_zero() -> bool:
    return bool((torch.full((16,), 1e-38) * 1e-3 == 0).all())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return found.group(1)
    return platform.processor() or platform.machine()
