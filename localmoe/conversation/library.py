"""The folder where conversations are kept, and how they are found again; must not know what they say."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from localmoe.conversation.lines import SUFFIX
from localmoe.conversation.listing import Listed, look
from localmoe.conversation.names import nearest
from localmoe.conversation.recovery import recover
from localmoe.conversation.saved import Saved
from localmoe.conversation.storage import JournalFile, reason
from localmoe.conversation.tree import Conversation
from localmoe.errors import ConversationError
from localmoe.folders import state_folder


class Library:
    """Conversations, each a journal in `folder`: the user's state folder if none is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self._given = folder

    def folder(self) -> Path:
        """Where they are. Raises OSError for users without a home."""
        try:
            return self._given or state_folder() / "conversations"
        except RuntimeError:
            raise OSError(errno.ENOENT, "there is no home folder to keep it in") from None

    def open_new(self, *, keep: bool = True, conversation: Conversation | None = None) -> Saved:
        """An empty conversation, or the given one; nothing is written before there is a message. With `keep` off,
        nothing is."""
        saved = Saved(conversation or Conversation(), self.folder, keep=keep)
        saved.begin()
        return saved

    def open_named(self, name: str) -> Saved:
        """The conversation of that name, or of the only one that begins so. Raises ConversationError if there is none,
        or it is open elsewhere, or it cannot be read; what of it is damaged is told by `problem`."""
        path = self._path(name)
        try:
            file = JournalFile.open(path)
            try:
                with file.reader() as reader:
                    found = recover(reader, path.stem)
                if not found.number:  # its process ended before the first line was there
                    os.unlink(path)
                    file.close()
                    return Saved(Conversation(), self.folder, name=path.stem)
                return Saved.of(found, file)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise ConversationError(f"{path.stem} cannot be opened: {reason(error)}") from None

    def find(self, name: str) -> str:
        """The whole name of what `open_named` would open. Raises ConversationError if there is none."""
        return self._path(name).stem

    def latest(self) -> str:
        """The name of the conversation that was changed last. Raises ConversationError without any."""
        for path in self._paths():
            found = look(path)
            if not found.problem and found.messages:
                return found.name
        raise ConversationError("there is no conversation yet to go on with")

    def names(self) -> list[str]:
        """All names, the last changed first. Raises ConversationError."""
        return [path.stem for path in self._paths()]

    def listing(self) -> list[Listed]:
        """All conversations, the last changed first; a few lines of each are read. Raises ConversationError."""
        return [look(path) for path in self._paths()]

    def delete(self, name: str) -> None:
        """Remove the conversation of exactly that name. Raises ConversationError if there is none, or it is open."""
        path = self._exact(name)
        if path is None:
            raise ConversationError(f"there is no conversation {name[:80]!r}: {nearest(name, self.names())}")
        try:
            if path.is_file() and not path.is_symlink():
                file = JournalFile.open(path)  # nobody else has it, then
                if os.name == "nt":
                    file.close()
                try:
                    os.unlink(path)
                finally:
                    file.close()
            else:
                os.unlink(path)
        except OSError as error:
            raise ConversationError(f"{path.stem} cannot be deleted: {reason(error)}") from None

    def _path(self, name: str) -> Path:
        if exact := self._exact(name):
            return exact
        begun = [path for path in self._paths() if name and path.stem.casefold().startswith(name.casefold())]
        if len(begun) == 1:
            return begun[0]
        if begun:
            some = ", ".join(path.stem for path in begun[:3]) + (", …" if len(begun) > 3 else "")
            raise ConversationError(f"{name[:80]!r} begins {len(begun)} names: {some}")
        raise ConversationError(f"there is no conversation {name[:80]!r}: {nearest(name, self.names())}")

    def _exact(self, name: str) -> Path | None:
        return next((path for path in self._paths() if path.stem == name), None)

    def _paths(self) -> list[Path]:
        """The last changed first. Files without a byte hold nothing yet."""
        found: list[tuple[int, Path]] = []
        try:
            with os.scandir(self.folder()) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
                        with suppress(FileNotFoundError):
                            state = entry.stat(follow_symlinks=False)
                            if state.st_size or not entry.is_file(follow_symlinks=False):
                                found.append((state.st_mtime_ns, Path(entry.path)))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConversationError(f"conversations cannot be listed: {reason(error)}") from None
        return [path for _, path in sorted(found, key=lambda pair: (-pair[0], pair[1].name))]
