"""Kernels compiled by other processes, several at a time: Numba with its 70 MB stays out of this one, and Ctrl+C need
not wait for it to end; knows no kernel.

Not by `multiprocessing`, which runs the program's main file once more in each process: a script that opens a model
would open it there too.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import NamedTuple

from localmoe.interrupt import BRIEFLY, Uninterrupted, start_threads
from localmoe.kernels.cpu.cores import default_threads
from localmoe.kernels.cpu.isa import Isa
from localmoe.memory import available_nbytes

PROCESS_NBYTES = 400 << 20  # of one that compiles: 200 to 300 MB
MOST = 8  # a model has about 40 kernels, and each process takes a second until it begins
PATIENCE = 120.0  # seconds; on a busy machine, the first kernel takes ten
SERVE = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from localmoe.kernels.cpu.compiler import serve
serve()
"""

Process = subprocess.Popen[bytes]


class Wanted(NamedTuple):
    """A kernel of this package."""

    name: str
    isa: Isa


def processes_for(kernels: int) -> int:
    """How many processes may compile so many kernels beside each other; 0 where none can be started or memory lacks."""
    if not sys.executable or getattr(sys, "frozen", False):
        return 0
    return max(0, min(kernels, default_threads(), MOST, available_nbytes() // PROCESS_NBYTES))


def compiled(wanted: Sequence[Wanted], processes: int) -> Generator[tuple[str, bytes]]:
    """The name and the object of each kernel, as they come, without those that a process could not compile, and those
    that were still to come when PATIENCE had passed without any. Left early, it ends the processes."""
    waiting, found = deque(wanted), SimpleQueue[tuple[str, bytes] | None]()
    started: list[Process] = []
    threads: list[Thread] = []
    try:
        with Uninterrupted():
            with suppress(OSError):  # the system gives no more of them
                for _ in range(processes):
                    started.append(_start())
            threads += [Thread(target=_feed, args=(process, waiting, found), daemon=True) for process in started]
            start_threads(threads)
        working, last = len(threads), monotonic()
        while working and monotonic() - last < PATIENCE:
            with suppress(Empty):  # Ctrl+C is heard in between, whichever thread the system gives it to
                if (answer := found.get(timeout=BRIEFLY)) is None:
                    working -= 1
                else:
                    yield answer
                    last = monotonic()
    finally:
        with Uninterrupted():
            for process in started:
                process.kill()
            for thread in threads:
                thread.join()
            for process in started:
                process.communicate()


def _start() -> Process:
    command = [sys.executable, "-P", "-c", SERVE]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, start_new_session=os.name == "posix")


def _feed(process: Process, waiting: deque[Wanted], found: SimpleQueue[tuple[str, bytes] | None]) -> None:
    """Ask a process for kernels while there are any; one at which it fails is the last that it is asked for."""
    try:
        with suppress(Exception):  # whatever it was that came in the place of an object
            assert process.stdin is not None and process.stdout is not None
            pickle.dump(list(map(str, sys.path)), process.stdin)
            while True:
                wanted = waiting.popleft()
                pickle.dump(tuple(wanted), process.stdin)
                process.stdin.flush()
                code = pickle.load(process.stdout)
                assert isinstance(code, bytes)
                found.put((wanted.name, code))
    finally:
        found.put(None)
