"""Memory for experts of one size: slots, who has each, who may go; reads nothing."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import numpy.typing as npt

FREE, CLOSED = -1, -2  # owners of a slot that nobody has, and of one whose memory was given back
Keys = npt.NDArray[np.int64]


class Pool:
    """`owner[slot]` is the key of the expert that has it, or will have it once it is read."""

    def __init__(self, slots: int, slot_nbytes: int, share: int) -> None:
        """`share`: slots that a layer may fill while it reads a prompt."""
        self.slot_nbytes, self.share = slot_nbytes, share
        self.owner: Keys = np.full(slots, FREE, np.int64)
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self._memory = mmap.mmap(-1, slots * slot_nbytes, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    @property
    def open_slots(self) -> int:
        return int(np.count_nonzero(self.owner != CLOSED))

    @property
    def nbytes(self) -> int:
        """Of all slots that may be used."""
        return self.open_slots * self.slot_nbytes

    def free(self) -> int | None:
        """A slot that nobody has."""
        found = np.flatnonzero(self.owner == FREE)
        return int(found[0]) if found.size else None

    def place(self, slot: int) -> memoryview:
        return self._bytes[slot * self.slot_nbytes : (slot + 1) * self.slot_nbytes]

    def give_back(self, slot: int) -> None:
        """The memory of a slot to the system; it cannot be used until it is opened again."""
        self.owner[slot] = CLOSED
        self._memory.madvise(mmap.MADV_DONTNEED, slot * self.slot_nbytes, self.slot_nbytes)
