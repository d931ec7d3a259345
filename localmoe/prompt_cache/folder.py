"""The files of one model's kept states: which there are, taken out, marked as used; must not know what is read from
them into a model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from localmoe.prompt_cache.entries import Entry, Ids, entry_of
from localmoe.prompt_cache.segment import read_tokens


class ModelFolder:
    """One folder of kept files; other processes may write to it and remove from it."""

    def __init__(self, path: Path, model: bytes, most_tokens: int) -> None:
        """`model`: who may read the files; those of more than `most_tokens` tokens are none of this version."""
        self.path, self.model, self._most = path, model, most_tokens
        self._changed = -1
        self._entries: dict[str, Entry] = {}
        self._tokens: dict[Entry, Ids] = {}

    def entries(self) -> list[Entry]:
        """What is there now. Raises OSError, but not for a folder that is not there yet."""
        try:
            changed = os.stat(self.path).st_mtime_ns
        except FileNotFoundError:
            return []
        if changed != self._changed:
            found = (entry_of(name) for name in os.listdir(self.path))
            self._entries = {e.name: e for e in found if e and e.stop - e.start <= self._most}
            # A change within the clock's last tick would not be seen: then look once more next time.
            self._changed = changed if time.time_ns() - changed > 50_000_000 else -1
        return list(self._entries.values())

    def place(self, entry: Entry) -> Path:
        return self.path / entry.name

    def tokens(self, entry: Entry) -> Ids:
        """Those of a file of rows, read once. Raises DamagedError, OSError."""
        if entry not in self._tokens:
            self._tokens[entry] = read_tokens(self.place(entry), self.model, entry)
        return self._tokens[entry]

    def remove(self, entry: Entry) -> None:
        """The file, which may be gone already."""
        self._tokens.pop(entry, None)
        self._entries.pop(entry.name, None)
        with suppress(OSError):
            self.place(entry).unlink()

    def used(self, entries: Iterable[Entry]) -> None:
        """They are the newest now, the last of them first to go: what stands at the end of a text is of no use without
        what stands before it."""
        now = time.time_ns()
        for entry in entries:
            with suppress(OSError):
                os.utime(self.place(entry), ns=(now - 1000 * entry.stop, now - 1000 * entry.stop))
