"""How much of a disk kept states may take, all models together, and which go first; must not know what is in them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from localmoe.prompt_cache.entries import entry_of
from localmoe.prompt_cache.segment import TEMPORARY

LARGEST, SHARE = 8 << 30, 0.1  # bytes, and of what is free on the disk or taken here: whichever is less
STALE = 3600.0  # seconds after which a file that is still being written is what a killed process left
SLACK = 0.9  # of the limit: so much stays when room is made, so that it is not made for each file


class Found(NamedTuple):
    """A file of some model's folder."""

    used: float
    path: Path
    nbytes: int


class Space:
    """The folder over the folders of all models."""

    def __init__(self, root: Path, limit: int | None = None) -> None:
        """`limit` in bytes; None takes 8 GiB or a tenth of the free disk, whichever is less."""
        self.root, self._limit = root, limit
        self._taken: int | None = None  # as far as is known; other processes write as well

    def limit(self) -> int:
        """Bytes that all files may take now. Raises OSError."""
        if self._limit is not None:
            return self._limit
        return min(LARGEST, int(SHARE * (shutil.disk_usage(self.root).free + (self._taken or 0))))

    def make_room(self, nbytes: int, kept: Collection[Path] = ()) -> bool:
        """Whether so many bytes fit, now that files used longest ago are gone where that was needed; never one of
        `kept`. Raises OSError."""
        if self._taken is None:
            self._taken = sum(found.nbytes for found in self._files())
        if self._taken + nbytes > self.limit():
            files = sorted(self._files())
            self._taken = sum(found.nbytes for found in files)
            limit = self.limit()
            wanted = int(SLACK * limit) - nbytes
            for found in files if self._taken + nbytes > limit else ():
                if self._taken <= wanted:
                    break
                if found.path not in kept:
                    with suppress(FileNotFoundError):
                        found.path.unlink()
                    self._taken -= found.nbytes
            if self._taken + nbytes > limit:
                return False
        self._taken += nbytes
        return True

    def _files(self) -> Iterator[Found]:
        """Every file of ours; those that nobody writes any more are removed."""
        for folder in self.root.iterdir():
            if not folder.is_dir():
                continue
            for path in list(folder.iterdir()):
                with suppress(FileNotFoundError):
                    state = os.stat(path, follow_symlinks=False)
                    if path.suffix == TEMPORARY and time.time() - state.st_mtime > STALE:
                        path.unlink()
                    elif path.suffix == TEMPORARY or entry_of(path.name):
                        yield Found(state.st_mtime, path, state.st_size)
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > STALE:
                    folder.rmdir()  # of a model whose last file is gone
