"""Memory for experts of one size: slots, who has each, who may go; reads nothing."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from localmoe.errors import DeviceError
from localmoe.memory import readable_size

FREE, CLOSED = -1, -2  # owners of a slot that nobody has, and of one whose memory was given back
PASSAGE = 2  # slots that a layer may fill at least while it reads a prompt: one is read while one is multiplied
Keys = npt.NDArray[np.int64]


def share_of(slots: int, layers: int) -> int:
    """Slots that a layer may fill while it reads a prompt, which passes through them and leaves the others' alone."""
    return max(slots // layers, min(PASSAGE, slots))


class Pool:
    """`owner[slot]` is the key of the expert that has it, or will have it once it is read."""

    def __init__(self, slots: int, slot_nbytes: int, share: int) -> None:
        """`share`: slots that a layer may fill while it reads a prompt. Raises DeviceError where the system does not
        give so much memory."""
        self.slot_nbytes, self.share = slot_nbytes, share
        self.owner: Keys = np.full(slots, FREE, np.int64)
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        try:
            self._memory = mmap.mmap(-1, slots * slot_nbytes, **private)
        except (OSError, OverflowError):
            size = readable_size(slots * slot_nbytes)
            raise DeviceError(
                f"the system does not give {size} of memory for experts: a smaller --memory will do"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a system that could have them, and was built without
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
        self._forget(slot * self.slot_nbytes, self.slot_nbytes)

    def close(self) -> None:
        """The memory to the system, now, and not when nobody knows the pool any more. What a read that hangs will still
        write has a place until it ends. May be called twice."""
        if self._memory.closed:
            return
        self.owner[:] = CLOSED
        self._forget(0, len(self._memory))
        self._bytes.release()
        with suppress(BufferError):
            self._memory.close()

    def _forget(self, start: int, nbytes: int) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, start, nbytes)
