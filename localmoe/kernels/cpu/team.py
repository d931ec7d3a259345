"""The thread team and the loop each of its threads runs: op after op of a tape, with a barrier between; knows no op.

A tape entry is (kernel address, argument block address, whether a barrier follows). The barrier spins, then sleeps on a
futex (Linux): 0.3 µs an op while every thread has a core. Where a core is shared with another program, spinning only
keeps the system from putting the waiting thread to use, and a step gets ten times slower: see `Patience`.
"""

from __future__ import annotations

import ctypes
import operator
import platform
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from localmoe.kernels.cpu.arguments import slots
from localmoe.kernels.cpu.build import kernel

SPINS, FEW_SPINS = 2000, 8  # pauses before a thread sleeps: 2000 are some 30 µs
_LINE = 64  # bytes: arrivals, generation, sleepers, the count of sleeps and the system call have a cache line each
_FUTEX = {"x86_64": 202, "aarch64": 98}  # numbers of the system call on Linux


@kernel("run_tape", 6)
def run_tape(v: Any) -> Any:
    """(tape, entries, sync, spins, thread, threads): run every entry; the last barrier ends the step for all. Elsewhere
    threads wait for each other where an entry's third number is not 0."""
    slot = slots(v)
    sleep, wake = futex(v)
    mode, set_mode = denormal_mode(v)

    def walk(tape, entries, sync, spins, thread, threads):  # type: ignore[no-untyped-def]
        before = mode()
        v.flush_denormals()
        for i in range(entries):
            v.call(slot(tape, 3 * i), slot(tape, 3 * i + 1), thread, threads)
            if threads > 1 and (slot(tape, 3 * i + 2) != 0 or i == entries - 1):
                generation = v.atomic_load(sync + 64)
                if v.atomic_add(sync, 1) == threads - 1:
                    v.atomic_store(sync, 0)
                    v.atomic_add(sync + 64, 1)
                    if v.atomic_add(sync + 128, 0) > 0:
                        wake(sync)
                else:
                    turns = 0
                    while v.atomic_load(sync + 64) == generation:
                        v.pause()
                        turns += 1
                        if turns > spins:
                            v.atomic_add(sync + 128, 1)
                            v.atomic_add(sync + 192, 1)
                            if v.atomic_load(sync + 64) == generation:
                                sleep(sync, generation)
                            v.atomic_add(sync + 128, -1)
        set_mode(before)

    return walk


def futex(v: Any) -> tuple[Any, Any]:
    """`sleep(sync, generation)` and `wake(sync)` in a kernel, on the generation: the futex system call (Linux) by the C
    library's function at sync + 256, so that an object needs no symbol of it; a pause where there is none."""
    slot = slots(v)
    wait, wake, everyone = 128, 129, 1 << 30  # FUTEX_WAIT and FUTEX_WAKE, private to this process

    def sleep(sync, generation):  # type: ignore[no-untyped-def]
        if slot(sync, 32) != 0:
            v.call(slot(sync, 32), slot(sync, 33), sync + 64, wait, generation & 0xFFFFFFFF, 0, 0, 0)
        else:
            v.pause()

    def rouse(sync):  # type: ignore[no-untyped-def]
        if slot(sync, 32) != 0:
            v.call(slot(sync, 32), slot(sync, 33), sync + 64, wake, everyone, 0, 0, 0)

    return v.function(sleep), v.function(rouse)


def denormal_mode(v: Any) -> tuple[Any, Any]:
    """`mode()` and `set_mode(mode)` in a kernel: how this thread treats subnormal numbers (x86; elsewhere 0 and
    nothing)."""
    from localmoe.kernels.cpu.vector_system import denormal_mode

    return denormal_mode(v.isa)


class Patience:
    """How long threads spin at a barrier before they sleep, from what the last steps were like.

    With a core for each thread, a step that may spin sleeps at hardly any barrier (0 to 4 % measured); with another
    program on one of the cores it sleeps at nearly all. Then the next steps sleep at once, 16 of them, twice as many
    each time that spinning fails again.
    """

    LEAST, MOST = 16, 1024

    def __init__(self) -> None:
        self._sleepy_steps = 0
        self._penalty = self.LEAST

    @property
    def spins(self) -> int:
        """For the next step."""
        return FEW_SPINS if self._sleepy_steps else SPINS

    def learn(self, barriers: int, sleeps: int) -> None:
        """A step of so many barriers slept so many times, all threads together."""
        if self._sleepy_steps:
            self._sleepy_steps -= 1
        elif 2 * sleeps > barriers:
            self._sleepy_steps, self._penalty = self._penalty, min(2 * self._penalty, self.MOST)
        else:
            self._penalty = self.LEAST


class Team:
    """`threads` threads, the caller's among them, that wait between steps without using a core."""

    def __init__(self, threads: int, walk_address: int) -> None:
        self.threads = threads
        self._walk = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 6)(
            walk_address
        )  # a call through ctypes lets go of the GIL
        self._memory = np.zeros(6 * _LINE, np.uint8)
        self._sync = self._memory.ctypes.data + (-self._memory.ctypes.data % _LINE)
        self._barriers = ctypes.c_int64.from_address(self._sync + _LINE)
        self._slept = ctypes.c_int64.from_address(self._sync + 3 * _LINE)
        (ctypes.c_int64 * 2).from_address(self._sync + 4 * _LINE)[:] = [*_futex_call()]
        self._patience = Patience()
        self._job = (0, 0, self._sync, SPINS)
        self._closed = False
        self._gates = [threading.Lock() for _ in range(threads - 1)]  # held by its worker; the caller releases it
        self._workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads - 1)]
        for gate, worker in zip(self._gates, self._workers, strict=True):
            gate.acquire()
            worker.start()

    def run(self, tape: int, entries: int) -> None:
        """Run a tape of one or more entries with all threads; returns when every one has come to the last barrier."""
        self._job = job = (tape, entries, self._sync, self._patience.spins)
        before, slept = self._barriers.value, self._slept.value
        walk = partial(self._walk, *job, 0, self.threads)
        # One call from the interpreter's view, so that a KeyboardInterrupt cannot leave some threads at the barrier
        # without the others.
        steps: list[Callable[[], None]] = [*(gate.release for gate in self._gates), walk]
        deque(map(operator.call, steps), maxlen=0)
        self._patience.learn(self._barriers.value - before, self._slept.value - slept)

    def close(self) -> None:
        self._closed = True
        for gate in self._gates:
            gate.release()
        for worker in self._workers:
            worker.join()

    def _work(self, index: int) -> None:
        while True:
            self._gates[index].acquire()
            if self._closed:
                return
            self._walk(*self._job, index + 1, self.threads)


def _futex_call() -> tuple[int, int]:
    """Address of the C library's `syscall` and the number of futex; zeros where the kernel of the system has none."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _FUTEX:
        return 0, 0
    return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0, _FUTEX[machine]
