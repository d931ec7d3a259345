"""Bytes of a mapped file read past the page cache, into memory of one's own; must not know what the bytes are."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from threading import Lock

from localmoe.errors import FileFormatError, ReadError
from localmoe.interrupt import when_gone
from localmoe.loader.files import Identity, MappedFile

# What O_DIRECT asks of places and sizes, on every disk that takes sectors of 512 or 4096. And a page, as that is what
# memory is given back by: arm64 has some of 16 and 64 KiB.
BLOCK = max(4096, mmap.PAGESIZE)


class FileReader:
    """Reads one file by a descriptor of its own; from any number of threads at a time.

    `direct` goes past the page cache where the file system lets it (O_DIRECT; F_NOCACHE on macOS). Otherwise, and where
    it does not, what a read left in the page cache is given back after it. `alignment`: buffers, their sizes and the
    offsets are to be multiples of it.
    """

    def __init__(self, file: MappedFile, direct: bool) -> None:
        """Raises FileFormatError where the file is no longer the one that was mapped, ReadError where it cannot be
        opened."""
        self.file, self.direct, self.alignment = file, False, 1
        self._turn = Lock()
        descriptor = _direct(file.place) if direct else None
        try:
            if descriptor is not None:
                self.direct, self.alignment = True, BLOCK
            else:
                descriptor = os.open(file.place, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ReadError(f"{file.path}: cannot be opened again for reading ({error.strerror})") from None
        self._descriptor = descriptor
        self.close = when_gone(self, os.close, descriptor)
        try:
            if Identity.of(os.fstat(descriptor))[:2] != file.identity[:2]:
                raise file.changed("another file has its name")
            file.check()
        except FileFormatError:
            self.close()
            raise
        if not self.direct:
            self.direct = direct and _uncached(descriptor)
            _random(descriptor)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with the bytes from `offset` on, up to the file's end if it lies inside; behind it the buffer
        stays as it was.

        Raises ReadError where the system cannot read them, FileFormatError where the file has changed.
        """
        wanted, done = min(len(buffer), self.file.nbytes - offset), 0
        try:
            while done < wanted:
                count = self._read_at(buffer[done:], offset + done)
                # A direct read that was cut short goes on from a whole block.
                whole = done + count if done + count >= wanted else (done + count) // self.alignment * self.alignment
                if whole <= done:
                    self.file.check()
                    raise self._error(done, wanted, offset, "the file seems to end there")
                done = whole
        except OSError as error:
            self.file.check()
            raise self._error(done, wanted, offset, error.strerror or str(error)) from None
        finally:
            if not self.direct:
                _forget(self._descriptor, offset, done)

    def forget(self, offset: int, nbytes: int) -> None:
        """Gives back what of these bytes is in the page cache and mapped by nobody."""
        _forget(self._descriptor, offset, nbytes)

    def _error(self, done: int, wanted: int, offset: int, reason: str) -> ReadError:
        return ReadError(f"{self.file.path}: at byte {offset + done}: {wanted - done} bytes cannot be read: {reason}")

    def _read_at(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        with self._turn:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            found = os.read(self._descriptor, len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _direct(path: str) -> int | None:
    """A descriptor that reads past the page cache, tried on the first block; None where that is refused."""
    if sys.platform != "linux":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, BLOCK) as block:
            os.preadv(descriptor, [block], 0)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            os.close(descriptor)
            return None
    return descriptor


def _uncached(descriptor: int) -> bool:
    if sys.platform != "darwin":
        return False
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1) == 0


def _random(descriptor: int) -> None:
    """No reading ahead behind an expert: by this descriptor alone."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def _forget(descriptor: int, offset: int, nbytes: int) -> None:
    """Gives back the page cache of these bytes, the pages at both ends whole."""
    if sys.platform == "linux" and nbytes:
        first, end = offset // mmap.PAGESIZE * mmap.PAGESIZE, -(-(offset + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        os.posix_fadvise(descriptor, first, end - first, os.POSIX_FADV_DONTNEED)
