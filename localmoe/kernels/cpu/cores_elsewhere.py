"""Cores and their kinds on macOS and Windows, by a call of the system; knows no threads."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

LEVELS = 4  # of performance on macOS, at most: Apple's processors have two
# SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX of a 64-bit process: Relationship and Size (4 bytes each), then
# PROCESSOR_RELATIONSHIP: Flags, EfficiencyClass (1 byte each), 20 reserved, GroupCount (2 bytes), and so many
# GROUP_AFFINITY: Mask (8 bytes), Group (2), 6 reserved. Microsoft, winnt.h.
PROCESSOR_CORE = 0  # of LOGICAL_PROCESSOR_RELATIONSHIP
RECORD = struct.Struct("<IIBB20xH")
AFFINITY = struct.Struct("<QH6x")


class Cores(NamedTuple):
    """Physical cores that are quick, those of a hybrid processor that are slow, and the logical processors of all."""

    quick: int
    slow: int
    logical: int

    @property
    def physical(self) -> int:
        return self.quick + self.slow


class WindowsCore(NamedTuple):
    """`efficiency` is higher for a quicker kind; `processors` are (group, bits of those in it)."""

    efficiency: int
    processors: tuple[tuple[int, int], ...]


def macos_cores(tell: Callable[[str], bytes] | None = None) -> Cores | None:
    """Cores of every performance level are quick but those of the one named Efficiency: an M4's two levels are
    Performance and Efficiency, an M5 Max's Super and Performance. Where levels have no names, those of level 0, the
    highest. Intel's have no levels. None where the system does not tell.

    `tell` gives the bytes under a name, none where there is none.
    """
    tell = tell or sysctl

    def number(name: str) -> int:
        return int.from_bytes(tell(name), "little", signed=True)  # 4 or 8; both of Apple's processors are little-endian

    physical, logical, slow = number("hw.physicalcpu"), number("hw.logicalcpu"), 0
    if physical <= 0:
        return None
    for level in range(LEVELS):
        name = tell(f"hw.perflevel{level}.name").rstrip(b"\0")
        if name == b"Efficiency" or (not name and level > 0):
            slow += number(f"hw.perflevel{level}.physicalcpu")
    quick = physical - slow if 0 < slow < physical else physical
    return Cores(quick, physical - quick, max(logical, physical))


def sysctl(name: str) -> bytes:
    """What macOS has under that name, a number or the first bytes of a text; nothing where it has none."""
    try:
        call = ctypes.CDLL(None).sysctlbyname
    except (OSError, AttributeError, TypeError):
        return b""
    value, nbytes = ctypes.create_string_buffer(64), ctypes.c_size_t(64)
    call.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    failed = call(name.encode(), value, ctypes.byref(nbytes), None, 0)
    return b"" if failed else value.raw[: nbytes.value]


def windows_cores() -> Cores | None:
    """Those of the highest efficiency class are the quick ones. None where the system does not tell."""
    return counted(list(windows_records(_processor_information())), _affinity())


def counted(found: list[WindowsCore], allowed: int | None = None) -> Cores | None:
    """`allowed` are the bits of the processors that this process may use, heeded where all are of one group."""
    if allowed and all(group == 0 for core in found for group, _ in core.processors):
        narrowed = [WindowsCore(c.efficiency, tuple((g, bits & allowed) for g, bits in c.processors)) for c in found]
        found = [core for core in narrowed if any(bits for _, bits in core.processors)]
    if not found:
        return None
    best = max(core.efficiency for core in found)
    quick = sum(core.efficiency == best for core in found)
    logical = sum(bits.bit_count() for core in found for _, bits in core.processors)
    return Cores(quick, len(found) - quick, max(logical, len(found)))


def windows_records(answer: bytes) -> Iterator[WindowsCore]:
    """The cores of an answer of GetLogicalProcessorInformationEx, up to the first record that is cut short."""
    start = 0
    while start + RECORD.size <= len(answer):
        relation, nbytes, _, efficiency, groups = RECORD.unpack_from(answer, start)
        stop = start + nbytes
        if nbytes < RECORD.size or stop > len(answer):
            return
        if relation == PROCESSOR_CORE:
            most = (nbytes - RECORD.size) // AFFINITY.size
            places = [start + RECORD.size + AFFINITY.size * i for i in range(min(groups, most))]
            bits = [AFFINITY.unpack_from(answer, place) for place in places]
            yield WindowsCore(efficiency, tuple((group, mask) for mask, group in bits))
        start = stop


def _processor_information() -> bytes:
    """The answer for all cores; empty where the call fails."""
    if sys.platform != "win32":
        return b""
    call = ctypes.WinDLL("kernel32").GetLogicalProcessorInformationEx
    call.argtypes, call.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32)], ctypes.c_int
    nbytes = ctypes.c_uint32(0)
    call(PROCESSOR_CORE, None, ctypes.byref(nbytes))  # fails, and tells how much room it wants
    answer = ctypes.create_string_buffer(nbytes.value)
    return answer.raw[: nbytes.value] if call(PROCESSOR_CORE, answer, ctypes.byref(nbytes)) else b""


def _affinity() -> int | None:
    """Bits of the processors that this process may use; None or 0 where the system does not tell (several groups)."""
    if sys.platform != "win32":
        return None
    kernel = ctypes.WinDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.GetProcessAffinityMask.argtypes = [ctypes.c_void_p] * 3
    own, whole = ctypes.c_size_t(0), ctypes.c_size_t(0)
    told = kernel.GetProcessAffinityMask(kernel.GetCurrentProcess(), ctypes.byref(own), ctypes.byref(whole))
    return own.value if told else None
