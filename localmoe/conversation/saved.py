"""A conversation and the file that keeps it; must not know other conversations but for their names."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from itertools import count
from pathlib import Path

from localmoe.conversation.journal import Journal
from localmoe.conversation.lines import SUFFIX
from localmoe.conversation.names import automatic_name, checked_name
from localmoe.conversation.recovery import Recovered
from localmoe.conversation.storage import JournalFile, reason
from localmoe.conversation.tree import Conversation
from localmoe.errors import ConversationError
from localmoe.folders import make_private
from localmoe.interrupt import Uninterrupted


class Saved:
    """One conversation, kept as it goes; of a private one nothing is, until it is given a name."""

    def __init__(
        self,
        conversation: Conversation,
        folder: Callable[[], Path],
        *,
        keep: bool = True,
        name: str = "",
        created: str = "",
    ) -> None:
        """`name` is what it is to be called when it is first written. `folder` raises OSError. `problem` is the last
        line of `news`."""
        self.conversation = conversation
        self.keep = keep
        self.problem = ""
        self._began = datetime.now().astimezone()
        self.created = created or self._began.isoformat(timespec="seconds")
        self._folder, self._name = folder, name
        self._untold: list[str] = []
        self._journal = Journal(conversation, self.created, self._create, self._tell)
        if keep:
            conversation.record_to(self._journal.record)

    @classmethod
    def of(cls, found: Recovered, file: JournalFile) -> Saved:
        """One that was read from `file`, which it goes on in."""
        saved = cls(found.conversation, lambda: file.path.parent, created=found.created)
        file.nbytes = found.nbytes
        saved._journal.resume(file, found.number)
        if found.problem:
            saved._tell(found.problem)
        return saved

    @property
    def name(self) -> str:
        """What it is called; "" before there is anything to keep."""
        return self._journal.file.path.stem if self._journal.file else self._name

    @property
    def in_memory(self) -> bool:
        """Whether what was said last would be lost with the process."""
        return bool(self.conversation.messages) and (not self.keep or bool(self._journal.trouble))

    def news(self) -> str:
        """What happened to the file since this was last asked for, in one line; mostly ""."""
        told, self._untold = "; ".join(self._untold), []
        return told

    def begin(self) -> None:
        """Write what there is already, as of a conversation that came from elsewhere."""
        if self.keep and self.conversation.messages:
            with Uninterrupted():
                self._journal.write()

    def rename(self, name: str) -> None:
        """Call it `name`, and keep it if it was private. Raises ConversationError if that is no name, or in use."""
        name, journal = checked_name(name), self._journal
        if name == self.name and self.keep:
            return
        self._check_free(name)
        with Uninterrupted():
            try:
                if journal.file and journal.file.there():
                    journal.file.move(self._folder() / (name + SUFFIX))
                    return
            except FileExistsError:
                raise in_use(name) from None
            except OSError as error:
                raise ConversationError(f"{self.name} cannot be renamed: {reason(error)}") from None
            self._name = name
            journal.leave()
            self.keep = True
            self.conversation.record_to(journal.record)
            self.begin()

    def close(self) -> None:
        """Nothing is recorded from here on; `news` may say that the last of it could not be written."""
        with Uninterrupted():
            self.conversation.record_to(None)
            if self.keep:
                self._journal.close()

    def _check_free(self, name: str) -> None:
        """Also where only the case differs: that would be the same file on other systems."""
        wanted, own = name.casefold(), self.name.casefold()
        try:
            names = [Path(entry).stem.casefold() for entry in os.listdir(self._folder()) if entry.endswith(SUFFIX)]
        except OSError:
            return
        if wanted in names and wanted != own:
            raise in_use(name)

    def _create(self) -> JournalFile:
        folder = self._folder()
        make_private(folder)
        wanted = self.name or automatic_name(self._began, self.conversation.title)
        for number in count(2):
            name = wanted if number == 2 else f"{wanted}-{number - 1}"
            try:
                file = JournalFile.create(folder / (name + SUFFIX))
            except FileExistsError:
                continue
            if name != wanted and self._name and not self._journal.file:
                self._tell(f"{wanted} is in use: this conversation is {name}")
            return file
        raise AssertionError("numbers end")

    def _tell(self, line: str) -> None:
        self.problem = line
        self._untold.append(line)


def in_use(name: str) -> ConversationError:
    return ConversationError(f"{name} is in use: choose another name, or /delete {name} first")
