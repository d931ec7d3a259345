"""Whether a model's mapped files stayed sound while they were in use; must not know what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence

from localmoe.errors import ReadError
from localmoe.guard import Guard
from localmoe.loader.files import MappedFile


class Soundness:
    """Guards the files of one model: what was computed while one of them broke is refused."""

    def __init__(self, files: Sequence[MappedFile]) -> None:
        self._files = files
        self._guard = Guard([(file.address, file.nbytes) for file in files], files)

    def begin(self) -> None:
        """Before a step. A file that could not be read is tried once more; only where a fault would end the process are
        the others looked at as well.

        Raises FileFormatError where a file has changed, ReadError where it cannot even be opened.
        """
        while (found := self._guard.fault()) is not None:
            self._files[found[0]].map_again()
            self._guard.forget(found[0])
        if not self._guard.active:
            for file in self._files:
                file.check()

    def check(self) -> None:
        """After a step, whose results are good unless this raises: FileFormatError where a file has changed, ReadError
        where a part of it could not be read."""
        for file in self._files:
            file.check()
        if (found := self._guard.fault()) is not None:
            file, offset = self._files[found[0]], found[1] - self._files[found[0]].address
            raise ReadError(f"{file.path}: at byte {offset}: cannot be read: does the disk still work?")

    def close(self) -> None:
        self._guard.close()
