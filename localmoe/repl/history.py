"""What was typed before, in one file for all chats: without doubles, bounded, for its owner's eyes; knows no prompt."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from prompt_toolkit.history import FileHistory, History, InMemoryHistory

LARGEST_FILE = 1 << 20  # bytes; a larger one is cut to half of that when a chat starts
LARGEST_ENTRY = 1 << 16  # letters; what is longer was pasted, and is remembered until the chat ends


class SharedHistory(FileHistory):
    """prompt_toolkit's file of history. Of what was typed several times the last one counts."""

    def load_history_strings(self) -> Iterable[str]:
        """The newest first."""
        try:
            return dict.fromkeys(super().load_history_strings())
        except OSError:
            return ()

    def append_string(self, string: str) -> None:
        if string in self._loaded_strings:
            self._loaded_strings.remove(string)
        super().append_string(string)

    def store_string(self, string: str) -> None:
        if len(string) <= LARGEST_ENTRY:
            with suppress(OSError):  # a full disk ends no chat
                super().store_string(string)


def history_at(path: Path) -> History:
    """The history file, readable by its owner only; without a place to write, a history in memory."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    history = SharedHistory(path)
    with suppress(OSError):
        if path.stat().st_size > LARGEST_FILE:
            _cut(path, history)
    return history


def _cut(path: Path, history: SharedHistory) -> None:
    """Keep the newest half of what is allowed; the file is replaced in one step, whole at any moment."""
    kept = list(_newest(history.load_history_strings(), LARGEST_FILE // 2))
    with NamedTemporaryFile("wb", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            for string in reversed(kept):
                file.write(b"\n# earlier\n" + b"".join(b"+%s\n" % line.encode() for line in string.split("\n")))
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _newest(strings: Iterable[str], nbytes: int) -> Iterator[str]:
    for string in strings:
        nbytes -= len(string.encode()) + string.count("\n") + 16
        if nbytes < 0:
            return
        yield string
