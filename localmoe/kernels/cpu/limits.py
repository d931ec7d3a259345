"""What this machine could reach: the rates of a plain read loop, of fused multiply-adds and of 8-bit dot products; the
yardsticks of `localmoe bench`."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.formats import Bytes
from localmoe.kernels.cpu.arguments import slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.team import KERNELS

if TYPE_CHECKING:
    from localmoe.kernels.cpu.device import CpuDevice

READ_NBYTES = 1 << 29  # far beyond any cache
PRODUCTS = 1 << 21
CHAINS = 10
PASSES = 3  # the fastest counts: whatever else the machine does can only slow a pass down
# Which one is the fastest depends on the processor: a core of Cascade Lake reads 16 GB/s with the first and one of
# Zen 4 only 20; the second level 1 to 2 KB ahead takes the Zen 4 beyond 30; a core of Zen 5 does best by itself.
READ_FORMS = (
    ("limit_read_plain", 0),
    ("limit_read", 4096),
    ("limit_read", 1024),
    ("limit_read_second", 512),
    ("limit_read_second", 1024),
    ("limit_read_second", 2048),
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of all threads together in a second: bytes read, and operations (a product and its addition are two) of float32
    and of 8-bit integers."""

    read: float
    float_ops: float
    integer_ops: float


def read_loop(v: Any, prefetch: Any) -> Any:
    """Arguments: address, bytes, prefetch distance, results (64 bytes a thread). Every byte is loaded once, every line
    given to `prefetch` before."""
    slot = slots(v)
    step = 8 * v.lanes  # elements: two vectors of 4 bytes, four times

    def run(a, thread, threads):  # type: ignore[no-untyped-def]
        lines, distance = slot(a, 1) // (4 * step), slot(a, 2)
        x, y = v.zero(v.i32), v.zero(v.i32)
        for i in range(lines * thread // threads, lines * (thread + 1) // threads):
            p = slot(a, 0) + 4 * step * i
            for ahead in range(0, 4 * step, 64):
                prefetch(p + distance + ahead)
            for j in range(0, 4 * step, 8 * v.lanes):
                x = x ^ v.load(v.i32, p + j)
                y = y ^ v.load(v.i32, p + j + 4 * v.lanes)
        v.store(slot(a, 3) + 64 * thread, v.total(x ^ y))

    return run


@kernel("limit_read_plain", 3)
def limit_read_plain(v: Any) -> Any:
    def nothing(place):  # type: ignore[no-untyped-def]
        return

    return read_loop(v, v.function(nothing))


@kernel("limit_read", 3)
def limit_read(v: Any) -> Any:
    return read_loop(v, v.prefetch)


@kernel("limit_read_second", 3)
def limit_read_second(v: Any) -> Any:
    return read_loop(v, v.prefetch_second)


@kernel("limit_fma", 3)
def limit_fma(v: Any) -> Any:
    """Arguments: turns, results (64 bytes a thread). Ten independent chains of vector multiply-adds."""
    slot = slots(v)

    def run(a, thread, threads):  # type: ignore[no-untyped-def]
        s = v.splat(v.f32, v.load(v.float32, slot(a, 1)))
        c0, c1, c2, c3, c4 = s, s, s, s, s
        c5, c6, c7, c8, c9 = s, s, s, s, s
        for _ in range(slot(a, 0)):
            c0, c1, c2, c3, c4 = v.fma(c0, s, s), v.fma(c1, s, s), v.fma(c2, s, s), v.fma(c3, s, s), v.fma(c4, s, s)
            c5, c6, c7, c8, c9 = v.fma(c5, s, s), v.fma(c6, s, s), v.fma(c7, s, s), v.fma(c8, s, s), v.fma(c9, s, s)
        v.store(slot(a, 1) + 64 * (thread + 1), v.total(c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9))

    return run


def dot_chains(v: Any, dot: Any) -> Any:
    """Arguments: turns, results (64 bytes a thread). Ten independent chains of `dot(total, y)`, which multiplies the
    total's own bytes with those of y: nothing in it can be moved out of the loop."""
    slot = slots(v)
    y_kind = getattr(v, f"i8x{4 * v.lanes}")

    def run(a, thread, threads):  # type: ignore[no-untyped-def]
        s = v.splat(v.i32, v.load(v.int32, slot(a, 1)))
        y = v.bits(y_kind, s)
        c0, c1, c2, c3, c4 = s, s + 1, s + 2, s + 3, s + 4
        c5, c6, c7, c8, c9 = s + 5, s + 6, s + 7, s + 8, s + 9
        for _ in range(slot(a, 0)):
            c0, c1, c2, c3, c4 = dot(c0, y), dot(c1, y), dot(c2, y), dot(c3, y), dot(c4, y)
            c5, c6, c7, c8, c9 = dot(c5, y), dot(c6, y), dot(c7, y), dot(c8, y), dot(c9, y)
        v.store(slot(a, 1) + 64 * (thread + 1), v.total(c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9))

    return run


@kernel("limit_dot", 3)
def limit_dot(v: Any) -> Any:
    unsigned = getattr(v, f"u8x{4 * v.lanes}")

    def dot(total, y):  # type: ignore[no-untyped-def]
        return v.dot(total, v.bits(unsigned, total), y)

    return dot_chains(v, v.function(dot))


@kernel("limit_dot", 3, isa="avx2")
def limit_dot_avx2(v: Any) -> Any:
    """Pairs of bytes to 16 bits and pairs of those to 32, which AVX2 does in three instructions for 32 products."""

    def dot(total, y):  # type: ignore[no-untyped-def]
        pairs = v.byte_pairs(v.bits(v.u8x32, total), y)
        return total + v.word_pairs(pairs, v.bits(v.i16x16, y))

    return dot_chains(v, v.function(dot))


class Limits:
    """Measures one device, each time by the best of a few passes; call it beside every timing, for machines drift."""

    def __init__(self, device: CpuDevice, data: Bytes | None = None) -> None:
        """`data` is memory to read, for instance that of another Limits; without it READ_NBYTES are allocated."""
        self._device = device
        reads = (name for name, _ in READ_FORMS)
        device.kernels.prepare((*KERNELS, *reads, "limit_fma", "limit_dot"))
        self.data = np.ones(READ_NBYTES, np.uint8) if data is None else data
        self._results = np.zeros(64 * (device.threads + 1), np.uint8)

    def rates(self) -> Rates:
        return Rates(self.read_nbytes_per_second(), self.float_ops_per_second(), self.integer_ops_per_second())

    def read_nbytes_per_second(self) -> float:
        """Bytes that all threads together read from memory in a second, by the best of READ_FORMS."""
        place = self.data.ctypes.data, self.data.size
        return self.data.size / min(self._seconds(name, *place, distance) for name, distance in READ_FORMS)

    def float_ops_per_second(self) -> float:
        """Float32 multiplications and additions of all threads in a second."""
        return self._chain_ops(1) / self._seconds("limit_fma", PRODUCTS)

    def integer_ops_per_second(self) -> float:
        """Multiplications and additions of 8-bit integers into 32-bit sums of all threads in a second."""
        return self._chain_ops(4) / self._seconds("limit_dot", PRODUCTS)

    def _chain_ops(self, products_a_lane: int) -> int:
        return 2 * products_a_lane * CHAINS * self._device.kernels.isa.lanes * PRODUCTS * self._device.threads

    def _seconds(self, name: str, *arguments: int) -> float:
        block = np.array([*arguments, self._results.ctypes.data], np.int64)
        tape = np.array([[self._device.kernels.address(name), block.ctypes.data, 1]], np.int64)
        seconds = []
        for _ in range(PASSES):
            start = perf_counter()
            self._device.threads_run(tape)
            seconds.append(perf_counter() - start)
        return min(seconds)
