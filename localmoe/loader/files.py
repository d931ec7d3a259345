"""The mapped files of a model: where in memory each lies, and whether it is still the file that was opened; must not
know what is inside one."""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from localmoe.errors import FileFormatError, ReadError
from localmoe.guard import map_over


class Identity(NamedTuple):
    """Which file it is, and in what state: device and inode, size in bytes, time of the last change in nanoseconds."""

    device: int
    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True, eq=False, slots=True)
class MappedFile:
    """A whole file mapped read-only at `address`; `identity` is that of the very file that was mapped.

    `path` is as the user named it, `place` where it led when the file was opened: a symbolic link may be pointed
    elsewhere later.
    """

    path: Path
    place: str
    data: mmap.mmap
    address: int
    nbytes: int
    identity: Identity

    @classmethod
    def of(cls, path: Path) -> MappedFile:
        """The file at `path`, of which nothing is read. Raises OSError, ValueError (an empty file)."""
        with open(path, "rb") as file:
            identity = Identity.of(os.fstat(file.fileno()))  # first: a file that grows meanwhile is not sound
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        address = np.frombuffer(data, np.uint8).ctypes.data
        return cls(path, os.path.realpath(path), data, address, len(data), identity)

    def check(self) -> None:
        """Raises FileFormatError where the mapped file was cut or written to since it was opened; 2 µs.

        A file that was deleted, or replaced by another one under its name, is still mapped as it was.
        """
        device, inode, before, changed = self.identity
        try:
            found = os.stat(self.place)
            same = found.st_ino == inode and found.st_dev == device
        except OSError:
            same = False
        size = found.st_size if same else self.data.size()  # of the mapped file, whatever its path leads to by now
        if size != before:
            raise self.changed(f"size {before}, now {size}")
        if same and found.st_mtime_ns != changed:
            raise self.changed("written to")

    def map_again(self) -> None:
        """The file in its place in memory once more, where faults have left zeros (`guard.py`). Raises FileFormatError
        where it has changed, ReadError where it cannot be opened."""
        self.check()
        try:
            with open(self.place, "rb") as file:
                if Identity.of(os.fstat(file.fileno())) != self.identity:
                    raise self.changed("another file has its name")
                map_over(self.address, self.nbytes, file.fileno())
        except OSError as error:
            raise ReadError(f"{self.path}: cannot be opened again for reading ({error.strerror})") from None

    def changed(self, how: str) -> FileFormatError:
        return FileFormatError(f"{self.path}: changed while it was in use ({how}): open it again")


def by_address(files: Iterable[MappedFile]) -> tuple[MappedFile, ...]:
    """Each file once, in the order that `place` wants."""
    return tuple(sorted(set(files), key=_address))


def place(files: Sequence[MappedFile], address: int, nbytes: int) -> tuple[MappedFile, int] | None:
    """The file, of those `by_address`, that this memory is a view of, and the offset in it; None for memory that is no
    view of any."""
    index = bisect_right(files, address, key=_address) - 1
    if index < 0:
        return None
    file = files[index]
    offset = address - file.address
    return (file, offset) if offset + nbytes <= file.nbytes else None


def _address(file: MappedFile) -> int:
    return file.address
