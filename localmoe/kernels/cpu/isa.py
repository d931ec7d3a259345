"""Instruction sets the CPU kernels are written for, and which of them this host runs; knows no kernel, no numba."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm

from localmoe.errors import DeviceError

NAMES = ("avx512", "avx2", "portable")
_NEEDS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "portable": (),
}


@dataclass(frozen=True, slots=True)
class Isa:
    """What code is emitted for: `lanes` float32 values in one vector, an LLVM processor and its feature string."""

    name: str
    lanes: int
    processor: str
    features: str

    @property
    def fused(self) -> bool:
        """Whether a fused multiply-add is one instruction; elsewhere it would be a call into libm."""
        return self.name != "portable" or not is_x86()

    @property
    def halves(self) -> bool:
        """Whether float16 conversion is an instruction; elsewhere it would be a call into compiler-rt."""
        return self.name != "portable" or not is_x86()


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@cache
def _host_features() -> dict[str, bool]:
    return dict(llvm.get_host_cpu_features())


def runnable() -> tuple[str, ...]:
    """Names of the instruction sets this host can run, best first."""
    features = _host_features()
    return tuple(n for n in NAMES if n == "portable" or (is_x86() and all(features.get(f) for f in _NEEDS[n])))


def named(name: str) -> Isa:
    """The instruction set `name`.

    Raises DeviceError where the host lacks it: an instruction the processor does not know ends the process.
    """
    if name not in runnable():
        raise DeviceError(f"instruction set {name!r} cannot run on this processor; possible: {', '.join(runnable())}")
    if name == "avx512":
        return Isa(name, 16, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    if name == "avx2":
        return Isa(name, 8, "x86-64-v3", "")
    if is_x86():
        return Isa(name, 8, "x86-64", "")
    return Isa(name, 8, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())


def host_isa() -> Isa:
    """The best instruction set of this host, or the one that LOCALMOE_ISA names."""
    return named(os.environ.get("LOCALMOE_ISA") or runnable()[0])
