"""A process that compiles kernels for another one: asked on standard input, it answers on standard output, until the
input ends; see `compilers.py`."""

from __future__ import annotations

import os
import pickle
import signal
import sys

from localmoe.kernels.cpu.ahead import import_kernels
from localmoe.kernels.cpu.build import emitted


def serve() -> None:
    """For each (kernel, instruction set), pickled, the object's bytes, pickled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to both: the other process decides
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever else is printed
        import_kernels()
        while True:
            try:
                name, isa = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            pickle.dump(emitted(name, isa), answers)
            answers.flush()
