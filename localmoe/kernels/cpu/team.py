"""The thread team and the loop each of its threads runs: op after op of a tape, with a barrier between; knows no op.

A tape entry is (kernel address, argument block address, whether a barrier follows). The barrier spins, then sleeps on a
futex (Linux): 0.3 µs an op while every thread has a core. Where a core is shared with another program, spinning only
keeps the system from putting the waiting thread to use, and a step gets ten times slower: see `Patience`.

Between tapes the other threads wait in the same way, inside machine code: waking them takes neither Python's lock nor,
if the next tape comes soon, the system.
"""

from __future__ import annotations

import ctypes
import operator
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from localmoe.errors import SettingError
from localmoe.interrupt import start_threads
from localmoe.kernels.cpu.arguments import slots
from localmoe.kernels.cpu.build import kernel
from localmoe.kernels.cpu.pinning import around, pin

KERNELS = ("run_tape", "serve_tapes", "pauses")  # what a Team is made of
# How long a thread spins before it sleeps, at a barrier and between two tapes: longer than it waits for the other's
# share of a product. Pauses are what it counts; one lasts 15 to 50 ns, by the processor.
SPIN_SECONDS = 300e-6
FEW_SPINS = 8
_TRIED_PAUSES, _LEAST_SPINS, _MOST_SPINS = 1_000, 2_000, 200_000
FOREVER = 1 << 62
_LINE = 64  # bytes: each of these words has a cache line of its own
ARRIVALS, GENERATION, SLEEPERS, SLEPT, SYSTEM, JOBS, IDLE, JOB = (_LINE * i for i in range(8))
_FUTEX = {"x86_64": 202, "aarch64": 98}  # numbers of the system call on Linux


@kernel("run_tape", 5)
def run_tape(v: Any) -> Any:
    """(tape, entries, sync, spins, threads): hand a tape to all threads, and run it as the first of them."""
    walk, (_, wake) = walking(v), futex(v)

    def lead(tape, entries, sync, spins, threads):  # type: ignore[no-untyped-def]
        if threads > 1:
            v.store(sync + JOB, tape)
            v.store(sync + JOB + 8, entries)
            v.store(sync + JOB + 16, spins)
            v.atomic_add(sync + JOBS, 1)
            if v.atomic_add(sync + IDLE, 0) > 0:
                wake(sync, sync + JOBS)
        walk(tape, entries, sync, spins, 0, threads)

    return lead


@kernel("serve_tapes", 5)
def serve_tapes(v: Any) -> Any:
    """(sync, the number of tapes before the first, thread, threads, most): run each tape that is handed out, until one
    has no entries or `most` have been run."""
    slot = slots(v)
    walk, (sleep, _) = walking(v), futex(v)

    def serve(sync, seen, thread, threads, most):  # type: ignore[no-untyped-def]
        for _ in range(most):
            turns = 0
            while v.atomic_load(sync + JOBS) == seen:
                v.pause()
                turns += 1
                if turns > slot(sync + JOB, 2):
                    v.atomic_add(sync + IDLE, 1)
                    if v.atomic_load(sync + JOBS) == seen:
                        sleep(sync, sync + JOBS, seen)
                    v.atomic_add(sync + IDLE, -1)
            seen += 1
            if slot(sync + JOB, 1) == 0:
                return
            walk(slot(sync + JOB, 0), slot(sync + JOB, 1), sync, slot(sync + JOB, 2), thread, threads)

    return serve


@kernel("pauses", 1)
def pauses(v: Any) -> Any:
    """(how many): do nothing but that."""

    def run(count):  # type: ignore[no-untyped-def]
        for _ in range(count):
            v.pause()

    return run


def walking(v: Any) -> Any:
    """`walk(tape, entries, sync, spins, thread, threads)` in a kernel: run every entry; the last barrier ends the tape
    for all. Elsewhere threads wait for each other where an entry's third number is not 0."""
    slot = slots(v)
    sleep, wake = futex(v)
    mode, set_mode = denormal_mode(v)

    def walk(tape, entries, sync, spins, thread, threads):  # type: ignore[no-untyped-def]
        before = mode()
        v.flush_denormals()
        for i in range(entries):
            v.call(slot(tape, 3 * i), slot(tape, 3 * i + 1), thread, threads)
            if threads > 1 and (slot(tape, 3 * i + 2) != 0 or i == entries - 1):
                generation = v.atomic_load(sync + GENERATION)
                if v.atomic_add(sync + ARRIVALS, 1) == threads - 1:
                    v.atomic_store(sync + ARRIVALS, 0)
                    v.atomic_add(sync + GENERATION, 1)
                    if v.atomic_add(sync + SLEEPERS, 0) > 0:
                        wake(sync, sync + GENERATION)
                else:
                    turns = 0
                    while v.atomic_load(sync + GENERATION) == generation:
                        v.pause()
                        turns += 1
                        if turns > spins:
                            v.atomic_add(sync + SLEEPERS, 1)
                            v.atomic_add(sync + SLEPT, 1)
                            if v.atomic_load(sync + GENERATION) == generation:
                                sleep(sync, sync + GENERATION, generation)
                            v.atomic_add(sync + SLEEPERS, -1)
        set_mode(before)

    return v.function(walk)


def futex(v: Any) -> tuple[Any, Any]:
    """`sleep(sync, word, value)` and `wake(sync, word)` in a kernel: the futex system call (Linux) by the C library's
    function at sync + SYSTEM, so that an object needs no symbol of it; a pause where there is none."""
    slot = slots(v)
    wait, wake, everyone = 128, 129, 1 << 30  # FUTEX_WAIT and FUTEX_WAKE, private to this process

    def sleep(sync, word, value):  # type: ignore[no-untyped-def]
        if slot(sync + SYSTEM, 0) != 0:
            v.call(slot(sync + SYSTEM, 0), slot(sync + SYSTEM, 1), word, wait, value & 0xFFFFFFFF, 0, 0, 0)
        else:
            v.pause()

    def rouse(sync, word):  # type: ignore[no-untyped-def]
        if slot(sync + SYSTEM, 0) != 0:
            v.call(slot(sync + SYSTEM, 0), slot(sync + SYSTEM, 1), word, wake, everyone, 0, 0, 0)

    return v.function(sleep), v.function(rouse)


def denormal_mode(v: Any) -> tuple[Any, Any]:
    """`mode()` and `set_mode(mode)` in a kernel: how this thread treats subnormal numbers (x86; elsewhere 0 and
    nothing)."""
    from localmoe.kernels.cpu.vector_system import denormal_mode

    return denormal_mode(v.isa)


class Patience:
    """How long threads spin at a barrier before they sleep, from what the last steps were like.

    With a core for each thread, a step that may spin sleeps at hardly any barrier (0 to 4 % measured); with another
    program on one of the cores it sleeps at nearly all, each time after it has spun in vain. Then the next steps sleep
    at once: for 8 times as long as was lost, and twice as long each time that spinning fails again, up to 64 times. So
    what trying costs is a small part of the time, and what not trying costs, about a tenth, ends soon after the other
    program has.
    """

    LEAST, MOST = 8, 64

    def __init__(self, spins: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """`spins`: pauses before a thread sleeps, SPIN_SECONDS long."""
        self._spins, self._clock = spins, clock
        self._until = 0.0
        self._spinning = True
        self._penalty = self.LEAST

    def spins(self) -> int:
        """At the next step's barriers, and behind it."""
        self._spinning = self._clock() >= self._until
        return self._spins if self._spinning else FEW_SPINS

    def learn(self, barriers: int, sleeps: int) -> None:
        """That step had so many barriers and slept so many times, all threads together."""
        if not self._spinning:
            return
        if 2 * sleeps > barriers:
            self._until = self._clock() + self._penalty * min(sleeps, barriers) * SPIN_SECONDS
            self._penalty = min(2 * self._penalty, self.MOST)
        else:
            self._penalty = self.LEAST


class Team:
    """`threads` threads, the caller's among them, that use no core for longer than a moment when there is nothing to
    do."""

    def __init__(
        self, threads: int, lead_address: int, serve_address: int, pause_address: int, *, cpus: Sequence[int] = ()
    ) -> None:
        """The addresses of KERNELS. `cpus`: the one that each thread is kept on, the caller's first and only while it
        runs a tape; empty: none. Raises SettingError for one that has gone meanwhile."""
        self.threads = threads
        # Calls through ctypes let go of the GIL.
        self._lead = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(lead_address)
        self._serve = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(serve_address)
        self._memory = np.zeros(9 * _LINE, np.uint8)
        self._sync = self._memory.ctypes.data + (-self._memory.ctypes.data % _LINE)
        self._barriers = ctypes.c_int64.from_address(self._sync + GENERATION)
        self._slept = ctypes.c_int64.from_address(self._sync + SLEPT)
        system = _futex_call()
        (ctypes.c_int64 * 2).from_address(self._sync + SYSTEM)[:] = [*system]
        # Where no system call wakes a thread, a lock of Python's does: held by its worker, the caller releases it.
        self._gates = [] if system[0] else [threading.Lock() for _ in range(threads - 1)]
        self._pin, self._let_go = around(cpus[0]) if cpus else ([], [])
        self._patience = Patience(spins_within(SPIN_SECONDS, pause_address))
        self._closed = False
        for gate in self._gates:
            gate.acquire()
        work = self._work_by_gates if self._gates else self._work
        self._workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads - 1)]
        start_threads(self._workers)
        try:
            for worker, cpu in zip(self._workers, cpus[1:], strict=False):
                pin(worker.native_id or 0, cpu)
        except SettingError:
            self.close()
            raise

    def run(self, tape: int, entries: int) -> None:
        """Run a tape of one or more entries with all threads; returns when every one has come to the last barrier."""
        before, slept = self._barriers.value, self._slept.value
        self._hand_out(tape, entries)
        self._patience.learn(self._barriers.value - before, self._slept.value - slept)

    def close(self) -> None:
        self._closed = True
        self._hand_out(0, 0)
        for worker in self._workers:
            worker.join()

    def _hand_out(self, tape: int, entries: int) -> None:
        lead = partial(self._lead, tape, entries, self._sync, self._patience.spins(), self.threads)
        # One call from the interpreter's view, so that a KeyboardInterrupt cannot leave some threads at the barrier
        # without the others, nor the caller pinned.
        if self._gates or self._pin:
            steps: list[Callable[[], object]]
            steps = [*self._pin, *(gate.release for gate in self._gates), lead, *self._let_go]
            deque(map(operator.call, steps), maxlen=0)
        else:
            lead()

    def _work(self, index: int) -> None:
        self._serve(self._sync, 0, index + 1, self.threads, FOREVER)

    def _work_by_gates(self, index: int) -> None:
        tapes = 0
        while not self._closed:
            self._gates[index].acquire()
            self._serve(self._sync, tapes, index + 1, self.threads, 1)
            tapes += 1


def spins_within(seconds: float, pause_address: int) -> int:
    """How many pauses last so long on this processor, by the fastest of a few tries; within bounds, whatever these
    met."""
    pause = ctypes.CFUNCTYPE(None, ctypes.c_int64)(pause_address)
    tries = []
    for _ in range(3):
        before = time.perf_counter()
        pause(_TRIED_PAUSES)
        tries.append(time.perf_counter() - before)
    return min(max(int(_TRIED_PAUSES * seconds / max(min(tries), 1e-9)), _LEAST_SPINS), _MOST_SPINS)


def _futex_call() -> tuple[int, int]:
    """Address of the C library's `syscall` and the number of futex; zeros where the kernel of the system has none."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _FUTEX:
        return 0, 0
    return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0, _FUTEX[machine]
