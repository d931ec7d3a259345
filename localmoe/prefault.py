"""The pages of mapped weights brought in by a thread of its own while nobody waits for them; knows no model.

Each page that a kernel is the first to touch costs it a fault, also where the page cache has the page.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Thread

from localmoe.formats import MadeSlabs, Weight
from localmoe.interrupt import start_threads, when_gone

MADV_WILLNEED = 3  # pages are read in, these and no others: a fault reads megabytes around it
MADV_POPULATE_READ = 22  # Linux 5.14: pages are read in and mapped, as if each had been read from
PIECE = 8 << 20  # bytes between two looks at whether it is time to stop


class Prefault:
    """Brings in the pages of `weights`, first to last, until it is done, stopped, or nobody holds it any more; nothing
    happens where the system has no call for it."""

    def __init__(self, weights: Iterable[Weight], *, tidy: Callable[[], None] | None = None) -> None:
        """With `tidy`, as few pages beside them are read as can be, and it is called by the same thread to give back
        what was read all the same."""
        self._reader = _Reader(list(weights), tidy)
        self._thread = Thread(target=self._reader.run, name="prefault", daemon=True)
        when_gone(self, self._reader.stop)  # the thread knows the reader alone
        if sys.platform == "linux":
            start_threads([self._thread])

    def stop(self) -> None:
        """Returns when the thread has ended."""
        self._reader.stop()
        self.wait()

    def wait(self) -> None:
        """Until every page is there; at once where there is nothing to do."""
        if self._thread.ident is not None:
            self._thread.join()


@dataclass(slots=True)
class _Reader:
    weights: Sequence[Weight]  # which keep the mapping alive
    tidy: Callable[[], None] | None
    stopped: bool = False

    def stop(self) -> None:
        self.stopped = True

    def run(self) -> None:
        if self.tidy is None:
            self._advise(MADV_POPULATE_READ)
        elif self._advise(MADV_WILLNEED):  # before a kernel touches them and the system reads around that place
            self.tidy()
            self._advise(MADV_POPULATE_READ)
            self.tidy()

    def _advise(self, advice: int) -> bool:
        """Whether it came to the end."""
        libc = ctypes.CDLL(None)
        for weight in self.weights:
            for slab in () if isinstance(weight.slabs, MadeSlabs) else weight.slabs:
                first, end = slab.ctypes.data & -mmap.PAGESIZE, slab.ctypes.data + slab.size
                for start in range(first, end, PIECE):
                    size = min(PIECE, end - start)
                    place = (ctypes.c_void_p(start), ctypes.c_size_t(size))
                    if self.stopped or libc.madvise(*place, advice) != 0:
                        return False
        return True
