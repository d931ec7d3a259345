"""Keeps the changes of one conversation in a file, as they come; must not know what it is called, or why.

Nothing is created before the first message. What cannot be written is held and tried again at the end of each message:
bytes go into the file in their order, so that none of it is ever believed that has a gap before it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from localmoe.conversation.lines import FILE_LIMIT, LINE_LIMIT, header_of, line_of, piece_line
from localmoe.conversation.storage import JournalFile, reason
from localmoe.conversation.tree import Conversation, Event

SETTLED = ("message", "end")  # behind these someone reads, and the disk may take its time


class Journal:
    """`record` is for a Conversation. Nothing is raised: `tell` gets what goes wrong, and that it is right again, a
    line each; `trouble` is why what is new is in memory only, "" while it is not."""

    def __init__(
        self,
        conversation: Conversation,
        created: str,
        create: Callable[[], JournalFile],
        tell: Callable[[str], None],
    ) -> None:
        """`create` opens an empty file under a name that is free; it raises OSError."""
        self.trouble = ""
        self.file: JournalFile | None = None
        self._conversation, self._created, self._create, self._tell = conversation, created, create, tell
        self._held = bytearray()  # lines to be written
        self._number = 0  # of the last line
        self._model = ""
        self._anew = True

    def resume(self, file: JournalFile, number: int) -> None:
        """Go on behind line `number` of a file; one that cannot be written is left as it is, and another one begun."""
        self.file, self._number, self._anew = file, number, bool(file.read_only)
        self._model = next((m.model for m in reversed(self._conversation.messages.values()) if m.model), "")

    def record(self, event: Event) -> None:
        """Keep a change that was made."""
        kind = event["do"]
        if self._anew:  # it is written as a whole, this change with it
            if self._conversation.messages and not (kind == "grow" and self.trouble):
                self.write()
            return
        self._number += 1
        if kind == "grow":
            line = piece_line(self._number, event)
        else:
            line = line_of(self._number, self._noted(event, len(self._conversation.messages)))
        self._held += line
        self._anew = len(line) > LINE_LIMIT
        if not self.trouble:
            self.write(settled=kind in SETTLED)
        elif kind != "grow":
            self.write()

    def write(self, settled: bool = True) -> None:
        """Have the file hold all of it, `settled` on the disk as well."""
        try:
            if self._anew or self.file is None:
                self._write_anew()
            else:
                if len(self._held) + self.file.nbytes > FILE_LIMIT:
                    raise _too_large()
                self.file.append(self._held)
                if settled and not self.file.untouched():
                    self._write_anew()
            if settled:
                self._sync()
        except OSError as error:
            self._fail(error)
        else:
            if self.trouble:
                self.trouble = ""
                assert self.file is not None
                self._tell(f"{self.file.path.stem} is written again: all of this conversation is on disk")

    def leave(self) -> None:
        """Go on in another file, with all of it."""
        if self.file:
            self.file.close()
        self.file, self._anew = None, True

    def close(self) -> None:
        """Write what is held, if that can be done now."""
        if self._conversation.messages and (self.trouble or self._held):
            self.write()
        if self.file:
            self.file.close()

    def _sync(self) -> None:
        assert self.file is not None
        try:
            self.file.sync()
        except OSError:
            self._anew = True  # the system forgets what it could not write: only another file can be trusted
            raise

    def _write_anew(self) -> None:
        """The conversation as it is now, in a file of its own."""
        lines = self._lines()
        old, file = self.file, self._create()
        try:
            file.append(bytearray(b"".join(lines)))
        except BaseException:
            with suppress(OSError):
                os.unlink(file.path)
            file.close()
            raise
        self.file, self._held, self._number, self._anew = file, bytearray(), len(lines), False
        if old:
            unwritten = self.trouble or old.read_only
            lost = f"cannot be written ({unwritten})" if unwritten else "was changed or deleted by another program"
            self._tell(f"{old.path.stem} {lost}: all of this conversation is now in {file.path.stem}")
            old.close()
            self.trouble = ""

    def _lines(self) -> list[bytes]:
        lines = [header_of(self._created, self._conversation.title)]
        messages, self._model = 0, ""
        for event in self._conversation.events():
            messages += event["do"] == "message"
            lines.append(line_of(len(lines) + 1, self._noted(event, messages)))
        if max(map(len, lines)) > LINE_LIMIT or sum(map(len, lines)) > FILE_LIMIT:
            raise _too_large()
        return lines

    def _noted(self, event: Event, messages: int) -> Event:
        """The change with what a list of conversations shows of this one, which then lies at the end of the file."""
        if event["do"] == "message":
            self._model = event.get("model") or self._model
        return {**event, "messages": messages, "model": self._model} if event["do"] == "end" else event

    def _fail(self, error: OSError) -> None:
        if not self.trouble:
            place = error.filename or (self.file.path if self.file else "conversations")
            self._tell(f"{place}: {reason(error)}: this conversation goes on in memory only")
        self.trouble = reason(error)


def _too_large() -> OSError:
    return OSError(errno.EFBIG, os.strerror(errno.EFBIG))
