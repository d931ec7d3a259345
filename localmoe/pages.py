"""What the system is told about pages of mapped weights: wanted soon, row by row, or no longer; knows no model."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable

from localmoe.formats import Weight

# Of madvise on Linux and macOS: as ever; nothing ahead; read without waiting. The last one is Linux's alone: the
# process has the pages no longer, the page cache may keep them.
NORMAL, RANDOM, WILL_NEED, DONT_NEED = 0, 1, 3, 4
Advise = Callable[[int, int], None]  # address, bytes


def advising(advice: int) -> Advise | None:
    """A call that says so of a piece of mapped memory, to its last page; None where the system has none."""
    if sys.platform not in ("linux", "darwin"):
        return None
    madvise = ctypes.CDLL(None).madvise

    def advise(address: int, nbytes: int) -> None:
        first = address & -mmap.PAGESIZE
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + nbytes - first), advice)

    return advise


def read_by_rows(weights: Iterable[Weight], *, by_rows: bool) -> None:
    """Whether nothing is to be read ahead in these weights, of which a token wants a row."""
    if advise := advising(RANDOM if by_rows else NORMAL):
        for slab in [slab for weight in weights if isinstance(weight.slabs, tuple) for slab in weight.slabs]:
            advise(slab.ctypes.data, slab.size)


def let_go(weights: Iterable[Weight]) -> None:
    """The pages of these weights are no part of the process any more until they are touched again, but for those that
    they share with others; weights that are no views of files stay."""
    advise = advising(DONT_NEED) if sys.platform == "linux" else None
    if advise is None:
        return
    for slab in (slab for weight in weights if isinstance(weight.slabs, tuple) for slab in weight.slabs):
        first, end = -(-slab.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE, slab.ctypes.data + slab.size
        nbytes = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if nbytes > 0:
            advise(first, nbytes)
