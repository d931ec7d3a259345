"""Threads kept on CPUs that were asked for (Linux): which ones, and how a thread is put there; knows no tape.

A thread of ours is put there once, by `pin`. The thread that calls is Python's, and what it starts inherits where it
may run: `around` keeps it there for as long as a tape lasts.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Collection, Iterable
from functools import partial

from localmoe.errors import SettingError
from localmoe.kernels.cpu.cores import default_threads, processors_in, quick_processors, usable_processors

AUTO = "auto"
MASK_NBYTES = 1024  # one bit for each CPU; Linux is built for at most 8,192

Steps = list[Callable[[], object]]


def pinned_cpus(asked: str, threads: int | None = None) -> tuple[int, ...]:
    """A CPU for each thread. `asked` is "auto", for one on each quick physical core, or a list such as "0-3,8", for one
    on each; `threads` takes the first ones. Raises SettingError for anything else, for CPUs that this process may not
    use, for more threads than CPUs, and on systems that pin no threads."""
    if not hasattr(os, "sched_setaffinity"):
        raise SettingError(
            f"pin: {platform.system()} has no call that keeps a thread on a CPU, as Linux has; leave it out"
        )
    found = quick_processors() if asked == AUTO else listed(asked, usable_processors())
    threads = threads or (default_threads() if asked == AUTO else len(found))
    if threads > len(found):
        what = "quick physical cores" if asked == AUTO else "in the list"
        raise SettingError(f"pin: {threads} threads need a CPU each; {what}: {len(found)} ({written(found)})")
    return found[:threads]


def listed(text: str, usable: Collection[int]) -> tuple[int, ...]:
    """ "0-3,8" -> (0, 1, 2, 3, 8), each once and each of `usable`. Raises SettingError."""
    found: dict[int, None] = {}
    try:
        for cpu in processors_in(text):
            if cpu not in usable:
                raise SettingError(f"pin: this process may not use CPU {cpu}; it may use {written(sorted(usable))}")
            if cpu in found:
                raise SettingError(f"pin: CPU {cpu} is named twice; each thread has one of its own")
            found[cpu] = None
    except ValueError:
        raise SettingError(f"pin takes {AUTO} or a list of CPUs such as 0-3,8, not {text[:40]!r}") from None
    return tuple(found)


def written(cpus: Iterable[int]) -> str:
    """(0, 1, 2, 3, 8) -> "0-3,8"."""
    spans: list[list[int]] = []
    for cpu in cpus:
        if spans and spans[-1][-1] == cpu - 1:
            spans[-1][1:] = [cpu]
        else:
            spans.append([cpu])
    return ",".join("-".join(map(str, span)) for span in spans)


def mask(text: str | None) -> str:
    """ "0-3,8" -> "0x10f", as llama.cpp takes it; "0x0" without a list."""
    return hex(sum(1 << cpu for cpu in listed(text, range(8 * MASK_NBYTES))) if text else 0)


def pin(thread: int, cpu: int) -> None:
    """Keep a thread, by the system's number of it, on a CPU. Raises SettingError where that is no longer possible."""
    try:
        os.sched_setaffinity(thread, {cpu})
    except OSError as error:
        raise SettingError(f"pin: no thread can be kept on CPU {cpu}: {error.strerror}") from error


def around(cpu: int) -> tuple[Steps, Steps]:
    """Steps that keep the thread that takes them on a CPU, and steps that let it go where it could be before. Each is
    one call of C, which raises nothing: where the CPU is gone meanwhile, the thread stays free."""
    # The GIL is kept: another thread that took it would hold up the step.
    system = ctypes.PyDLL(None)
    get, set_ = system.sched_getaffinity, system.sched_setaffinity
    get.argtypes = set_.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p]
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    before, only = ((ctypes.c_ulong * (8 * MASK_NBYTES // bits))() for _ in range(2))
    only[cpu // bits] = 1 << cpu % bits
    this = 0  # the thread that calls
    begin = [partial(get, this, MASK_NBYTES, before), partial(set_, this, MASK_NBYTES, only)]
    return [*begin], [partial(set_, this, MASK_NBYTES, before)]
