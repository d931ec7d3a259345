"""Instruction sets the CPU kernels are written for, which of them this host runs, and those that code is emitted for
ahead of time; knows no kernel, no numba."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import llvmlite.binding as llvm

from localmoe.errors import DeviceError
from localmoe.interrupt import Uninterrupted

NAMES = ("avx512", "avx2", "portable")
_NEEDS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx2", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "portable": (),
}


# Processors, in LLVM's words, whose first level (48 KB) is the place for a stream to come. On Zen 5, one thread, it
# makes rows of Q6_K 29, Q8_0 20, Q4_0 15, F16 11 and Q4_K 6 % faster than the second, and attention at 8,192 tokens
# without shared heads 1.3 to 1.5 times as fast; on Zen 4 rows lost a quarter.
_STREAMS_FIRST = ("znver5",)


@dataclass(frozen=True, slots=True)
class Isa:
    """What code is emitted for: `lanes` float32 values in one vector, an LLVM processor, its feature string and its
    triple."""

    name: str
    lanes: int
    processor: str
    features: str
    triple: str

    @property
    def x86(self) -> bool:
        return self.triple.startswith(("x86_64", "amd64"))

    @property
    def stream_level(self) -> int:
        """The level of caches that memory is prefetched into which is read once, line after line."""
        return 1 if self.processor in _STREAMS_FIRST else 2

    @property
    def fused(self) -> bool:
        """Whether a fused multiply-add is one instruction; elsewhere it would be a call into libm."""
        return self.name != "portable" or not self.x86

    @property
    def halves(self) -> bool:
        """Whether float16 conversion is an instruction; elsewhere it would be a call into compiler-rt."""
        return self.name != "portable" or not self.x86


@dataclass(frozen=True, slots=True)
class Target:
    """An instruction set that kernels are emitted for ahead of time; `needs` are the features of a processor that its
    code may use, in LLVM's words."""

    name: str
    isa: Isa
    needs: tuple[str, ...]


# Levels of x86-64 (psABI), and beyond them what LLVM may choose by itself of each processor's instructions.
_V3 = tuple("cx16 popcnt sahf ssse3 sse4.1 sse4.2 avx avx2 bmi bmi2 f16c fma lzcnt movbe".split())
_VNNI = (*_V3, *"avx512f avx512bw avx512cd avx512dq avx512vl avx512vnni".split())
_ZEN4 = (*_VNNI, *"sse4a avx512vbmi avx512vbmi2 avx512ifma avx512bitalg avx512vpopcntdq avx512bf16 gfni".split())
_ZEN5 = (*_ZEN4, "avxvnni", "avx512vp2intersect")
_X86, _ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
TARGETS = (
    Target("x86-64", Isa("portable", 8, "x86-64", "", _X86), ()),
    Target("x86-64-v3", Isa("avx2", 8, "x86-64-v3", "", _X86), _V3),
    Target("cascadelake", Isa("avx512", 16, "cascadelake", "", _X86), _VNNI),
    Target("znver4", Isa("avx512", 16, "znver4", "", _X86), _ZEN4),
    Target("znver5", Isa("avx512", 16, "znver5", "", _X86), _ZEN5),
    Target("aarch64-dotprod", Isa("portable", 8, "generic", "+neon,+lse,+dotprod", _ARM), ("neon", "lse", "dotprod")),
)


class Host(NamedTuple):
    """This processor, in LLVM's words."""

    features: dict[str, bool]
    feature_string: str
    processor: str
    triple: str

    @property
    def is_x86(self) -> bool:
        return Isa("", 0, "", "", self.triple).x86


@cache
def host() -> Host:
    with Uninterrupted():  # llvmlite frees a text twice that is cut off between being freed and being forgotten
        features = llvm.get_host_cpu_features()
        return Host(dict(features), str(features.flatten()), llvm.get_host_cpu_name(), llvm.get_process_triple())


def runnable() -> tuple[str, ...]:
    """Names of the instruction sets this host can run, best first."""
    own = host()
    return tuple(n for n in NAMES if n == "portable" or (own.is_x86 and all(own.features.get(f) for f in _NEEDS[n])))


def named(name: str) -> Isa:
    """The instruction set `name`, as this host has it.

    Raises DeviceError where the host lacks it: an instruction the processor does not know ends the process.
    """
    if name not in runnable():
        raise DeviceError(f"instruction set {name!r} cannot run on this processor; possible: {', '.join(runnable())}")
    own = host()
    if name == "avx2":
        return Isa(name, 8, "x86-64-v3", "", own.triple)
    if name == "portable" and own.is_x86:
        return Isa(name, 8, "x86-64", "", own.triple)
    return Isa(name, 16 if name == "avx512" else 8, own.processor, own.feature_string, own.triple)


def host_isa() -> Isa:
    """The best instruction set of this host, or the one that LOCALMOE_ISA names."""
    return named(os.environ.get("LOCALMOE_ISA") or runnable()[0])


def target_of(isa: Isa) -> Target | None:
    """The target whose code this host runs best for an instruction set of its own: one of the processor's family, then
    the one that uses most of its features; None where there is none."""
    features, family = host().features, host().processor.rstrip("0123456789")
    fitting = (
        t
        for t in TARGETS
        if t.isa.name == isa.name and _platform(t.isa) == _platform(isa) and all(features.get(f) for f in t.needs)
    )
    return max(fitting, key=lambda t: (t.isa.processor.startswith(family), len(t.needs)), default=None)


def _platform(isa: Isa) -> tuple[str, bool]:
    """What decides on object format and calling convention: the machine, and whether the system is Linux."""
    return isa.triple.partition("-")[0], "linux" in isa.triple
