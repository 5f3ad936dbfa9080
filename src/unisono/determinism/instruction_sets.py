"""The instruction sets that a process computes with: all that the processor has, or those of portable numerics.

Owns the variables that limit torch's libraries, how they are set before any of them computes, and the check that they
took effect. Imports torch nowhere by itself, so that the command line can set the variables first.
docs/design/0015-portable-numerics.md says why these values.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unisono.errors import NumericsError

LIMITS: Mapping[str, str] = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "MKL_CBWR": "COMPATIBLE",  # the one branch of MKL that is the same on processors of all makers
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
NEEDED = ("avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm")
"""Flags of x86-64-v3 as Linux names them: our own kernels are compiled for them; torch's kernels need fewer."""
CPUINFO = Path("/proc/cpuinfo")
MKL_BRANCH, MKL_COMPATIBLE = 1, 3  # mkl_types.h: MKL_CBWR_BRANCH, MKL_CBWR_COMPATIBLE


def limit(numerics: str) -> None:
    """Limit this process, and all that it forks or starts later, to the instruction sets of a recipe's
    `train.numerics`. "native" changes nothing.

    Raises:
        NumericsError: this machine lacks an instruction set; a variable has another value; torch has computed already.
    """
    if numerics == "native":
        return
    check_processor()
    if other := {name: os.environ[name] for name in LIMITS if os.environ.get(name, LIMITS[name]) != LIMITS[name]}:
        raise NumericsError(
            'train.numerics = "portable": the environment has '
            + ", ".join(f"{name}={value}" for name, value in other.items())
            + f"; allowed is {_assignments(other)}. Unset it: portable sets it itself."
        )
    added = {name: value for name, value in LIMITS.items() if name not in os.environ}
    os.environ.update(added)
    if "torch" not in sys.modules:
        return
    try:
        verify()
    except NumericsError:
        for name in added:
            del os.environ[name]
        raise


def limited() -> bool:
    """Whether the variables limit this process, however they were set."""
    return all(os.environ.get(name) == value for name, value in LIMITS.items())


def verify() -> None:
    """Check that the limits hold in this process. They are read when torch first computes, and never again.

    Raises:
        NumericsError: they do not hold, or this build of torch does not show it.
    """
    torch = sys.modules["torch"]
    if not torch.backends.mkl.is_available():
        raise NumericsError(
            f'train.numerics = "portable": torch {torch.__version__} is built without MKL, whose limits it needs. '
            'Install a wheel of pytorch.org, or set train.numerics = "native".'
        )
    branch = _mkl_branch(torch)
    if limited() and torch.backends.cpu.get_cpu_capability() == "AVX2" and branch == MKL_COMPATIBLE:
        return
    seen = f"torch computes with {torch.backends.cpu.get_cpu_capability()}, MKL with branch {branch}"
    raise NumericsError(
        f'train.numerics = "portable": this process has computed before its instruction sets were limited ({seen}; '
        f"allowed are AVX2 and branch {MKL_COMPATIBLE}). Set {_assignments(LIMITS)} in the environment before Python "
        "starts, or use the command line, which does."
    )


def check_processor() -> None:
    """Refuse a machine without AVX2.

    Raises:
        NumericsError: names what is missing.
    """
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        missing = f"Linux on x86-64; this is {sys.platform} on {platform.machine()}"
    else:
        found = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
        flags = found.group(1).split() if found else []
        missing = ", ".join(flag for flag in NEEDED if flag not in flags)
        missing = missing and f"AVX2 and what comes with it (x86-64-v3); this processor lacks {missing}"
    if missing:
        raise NumericsError(
            f'train.numerics = "portable" needs {missing}. Use another machine, or set train.numerics = "native".'
        )


def _mkl_branch(torch: Any) -> int | None:
    """The branch of MKL's conditional numerical reproducibility in this process; None where it cannot be read."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    ask = getattr(library, "mkl_serv_cbwr_get", None)  # the name of mkl_cbwr_get when it is linked statically
    return int(ask(MKL_BRANCH)) if ask else None


def _assignments(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={LIMITS[name]}" for name in variables)
