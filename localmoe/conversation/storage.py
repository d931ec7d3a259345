"""A file that only grows, held by one process; knows no lines. Everything here raises OSError."""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from localmoe.errors import ConversationError
from localmoe.folders import reserve

_FLAGS = os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LOCKED = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_LOCK_PLACE = 1 << 40  # Windows locks bytes, against reading too: one where no journal ever comes


class JournalFile:
    """An open file at the end of which bytes are put, locked as long as this process lives.

    `nbytes` are those at its beginning that are known and kept; what lies behind them when the first ones are appended
    is cut off. `read_only` is why nothing can be appended, "" if it can.
    """

    def __init__(self, path: Path, handle: int, read_only: str = "") -> None:
        self.path, self.nbytes, self.read_only = path, 0, read_only
        self._handle = handle
        self._cut = True

    @classmethod
    def create(cls, path: Path) -> JournalFile:
        """A new file, for the user's eyes only. Raises FileExistsError."""
        file = cls(path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | _FLAGS, 0o600))
        try:
            lock(file._handle, path)
        except ConversationError:  # someone opened it before it was ours
            file.close()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        return file

    @classmethod
    def open(cls, path: Path) -> JournalFile:
        """One that is there; read only where no more is allowed. Raises ConversationError if it is no plain file, or
        open elsewhere."""
        check_plain(path)
        read_only = ""
        try:
            handle = os.open(path, os.O_RDWR | _FLAGS)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            handle, read_only = os.open(path, os.O_RDONLY | _FLAGS), reason(error)
        file = cls(path, handle, read_only)
        try:
            lock(handle, path)
            if not stat.S_ISREG(os.fstat(handle).st_mode) or not file.there():
                raise ConversationError(f"{path.stem}: the file was exchanged while it was opened")
            with suppress(OSError):
                os.chmod(path, 0o600)
        except BaseException:
            file.close()
            raise
        return file

    def reader(self) -> BinaryIO:
        """For its bytes from the first on; closing it leaves the file open."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        return open(self._handle, "rb", buffering=1 << 16, closefd=False)

    def append(self, data: bytearray) -> None:
        """Put `data` at the end; what is written is taken out of it, if some cannot be as well."""
        if self._cut:
            if os.fstat(self._handle).st_size > self.nbytes:
                os.ftruncate(self._handle, self.nbytes)
            self._cut = False
        try:
            while data:
                self._took(data, os.write(self._handle, data))
        except OSError:
            with suppress(OSError):
                written = os.fstat(self._handle).st_size - self.nbytes
                self._took(data, max(0, min(written, len(data))))
            raise

    def _took(self, data: bytearray, nbytes: int) -> None:
        del data[:nbytes]
        self.nbytes += nbytes

    def sync(self) -> None:
        """Have on the disk what was appended."""
        os.fsync(self._handle)

    def there(self) -> bool:
        """Whether the file is still the one of that name."""
        try:
            named, held = os.lstat(self.path), os.fstat(self._handle)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)

    def untouched(self) -> bool:
        """Whether it is, and has the bytes that were put there, as far as their number shows."""
        return self.there() and (self._cut or os.fstat(self._handle).st_size == self.nbytes)

    def move(self, path: Path) -> None:
        """Give it another name. Raises FileExistsError if that is taken."""
        reserve(path)
        try:
            if sys.platform == "win32":  # where an open file keeps its name
                os.close(self._handle)
                try:
                    os.replace(self.path, path)
                    self.path = path
                finally:
                    self._handle = os.open(self.path, os.O_RDWR | _FLAGS)
                    lock(self._handle, self.path)
            else:
                os.replace(self.path, path)
        except BaseException:
            if self.path != path:
                os.unlink(path)
            raise
        self.path = path

    def close(self) -> None:
        """The lock is gone with it."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            unlock(handle)
            os.close(handle)


def check_plain(path: Path) -> None:
    """Raises ConversationError if it is a link, a folder, a device or a pipe: opening one may wait for ever, or lead
    elsewhere; FileNotFoundError."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ConversationError(f"{path.stem} is {kind}, not a file")


def reason(error: OSError) -> str:
    """What the system says, as the end of a line."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def lock(handle: int, path: Path) -> None:
    """Hold the file until this process ends. Raises ConversationError if another one does; where a file system has no
    locks, nobody holds any."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _LOCK_PLACE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _LOCKED:
            raise ConversationError(f"{path.stem} is open in another localmoe") from None


def unlock(handle: int) -> None:
    """Hold it no longer. Closing does so too, but not while a process that a thread has just forked has the handle."""
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
