"""What this machine could reach: the rate of a plain read loop and of fused multiply-adds; the yardsticks of `localmoe
bench`."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from localmoe.kernels.cpu.arguments import slots
from localmoe.kernels.cpu.blocks import PREFETCH
from localmoe.kernels.cpu.build import kernel

if TYPE_CHECKING:
    from localmoe.kernels.cpu.device import CpuDevice

READ_NBYTES = 1 << 29  # far beyond any cache
PRODUCTS = 1 << 21
CHAINS = 10
PASSES = 3  # the fastest counts: whatever else the machine does can only slow a pass down


@kernel("limit_read", 3)
def limit_read(v: Any) -> Any:
    """Arguments: address, bytes, results (64 bytes a thread). Every byte is loaded once, every line prefetched as in
    the weight kernels: with one prefetch in eight lines a core reads 12 GB/s where it can read 16."""
    slot = slots(v)
    step = 8 * v.lanes  # elements: two vectors of 4 bytes, four times

    def run(a, thread, threads):  # type: ignore[no-untyped-def]
        lines = slot(a, 1) // (4 * step)
        x, y = v.zero(v.i32), v.zero(v.i32)
        for i in range(lines * thread // threads, lines * (thread + 1) // threads):
            p = slot(a, 0) + 4 * step * i
            for ahead in range(PREFETCH, PREFETCH + 4 * step, 64):
                v.prefetch(p + ahead)
            for j in range(0, 4 * step, 8 * v.lanes):
                x = x ^ v.load(v.i32, p + j)
                y = y ^ v.load(v.i32, p + j + 4 * v.lanes)
        v.store(slot(a, 2) + 64 * thread, v.total(x ^ y))

    return run


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


class Limits:
    """Measures one device, each time by the best of a few passes; call it beside every timing, for machines drift."""

    def __init__(self, device: CpuDevice) -> None:
        self._device = device
        device.kernels.prepare(("limit_read", "limit_fma"))
        self._data = np.ones(READ_NBYTES, np.uint8)
        self._results = np.zeros(64 * (device.threads + 1), np.uint8)

    def read_nbytes_per_second(self) -> float:
        """Bytes that all threads together read from memory in a second."""
        return READ_NBYTES / self._seconds("limit_read", self._data.ctypes.data, READ_NBYTES)

    def flops_per_second(self) -> float:
        """Float32 multiplications and additions of all threads in a second."""
        lanes = self._device.kernels.isa.lanes
        return 2 * CHAINS * lanes * PRODUCTS * self._device.threads / self._seconds("limit_fma", PRODUCTS)

    def _seconds(self, name: str, *arguments: int) -> float:
        block = np.array([*arguments, self._results.ctypes.data], np.int64)
        tape = np.array([[self._device.kernels.address(name), block.ctypes.data, 1]], np.int64)
        seconds = []
        for _ in range(PASSES):
            start = perf_counter()
            self._device.threads_run(tape)
            seconds.append(perf_counter() - start)
        return min(seconds)
