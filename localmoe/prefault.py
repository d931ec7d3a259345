"""The pages of mapped weights brought in by a thread of its own while nobody waits for them; knows no model.

Each page that a kernel is the first to touch costs it a fault, also where the page cache has the page.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable, Iterable

from localmoe.formats import MadeSlabs, Weight

MADV_WILLNEED = 3  # pages are read in, these and no others: a fault reads megabytes around it
MADV_POPULATE_READ = 22  # Linux 5.14: pages are read in and mapped, as if each had been read from
PIECE = 8 << 20  # bytes between two looks at whether it is time to stop


class Prefault:
    """Brings in the pages of `weights`, first to last, until it is done or stopped; nothing happens where the system
    has no call for it."""

    def __init__(self, weights: Iterable[Weight], *, tidy: Callable[[], None] | None = None) -> None:
        """With `tidy`, as few pages beside them are read as can be, and it is called by the same thread to give back
        what was read all the same."""
        self._tidy = tidy
        self._weights = list(weights)  # also keeps the mapping alive
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefault", daemon=True)
        if sys.platform == "linux":
            self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended."""
        self._stopped.set()
        self.wait()

    def wait(self) -> None:
        """Until every page is there; at once where there is nothing to do."""
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        if self._tidy is None:
            self._advise(MADV_POPULATE_READ)
        elif self._advise(MADV_WILLNEED):  # before a kernel touches them and the system reads around that place
            self._tidy()
            self._advise(MADV_POPULATE_READ)
            self._tidy()

    def _advise(self, advice: int) -> bool:
        """Whether it came to the end."""
        libc = ctypes.CDLL(None)
        for weight in self._weights:
            for slab in () if isinstance(weight.slabs, MadeSlabs) else weight.slabs:
                first, end = slab.ctypes.data & -mmap.PAGESIZE, slab.ctypes.data + slab.size
                for start in range(first, end, PIECE):
                    size = min(PIECE, end - start)
                    place = (ctypes.c_void_p(start), ctypes.c_size_t(size))
                    if self._stopped.is_set() or libc.madvise(*place, advice) != 0:
                        return False
        return True
