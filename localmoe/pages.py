"""Pages of mapped weights that the process gives back; knows no model."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable

from localmoe.formats import Weight

MADV_DONTNEED = 4  # of Linux: the process has the pages no longer, the page cache may keep them


def let_go(weights: Iterable[Weight]) -> None:
    """The pages of these weights are no part of the process any more until they are touched again; weights that are no
    views of files stay."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for slab in (slab for weight in weights if isinstance(weight.slabs, tuple) for slab in weight.slabs):
        first, end = -(-slab.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE, slab.ctypes.data + slab.size
        nbytes = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if nbytes > 0:
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(nbytes), MADV_DONTNEED)
