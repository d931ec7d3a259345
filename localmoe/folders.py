"""The user's own folders and files: where they are, written whole or not at all, readable by the user alone. Must not
know what is in them."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def state_folder() -> Path:
    """Where localmoe keeps what it remembers: the user's state directory (XDG; %LOCALAPPDATA% on Windows). Raises
    RuntimeError where the user has no home."""
    named = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_STATE_HOME")
    return (Path(named) if named else Path.home() / ".local" / "state") / "localmoe"


def make_private(folder: Path) -> None:
    """The folder, and localmoe's own above it, for the user alone where they are new. Raises OSError."""
    try:
        folder.parent.parent.mkdir(parents=True, exist_ok=True)
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None


def write_whole(path: Path, data: bytes, *, overwrite: bool) -> None:
    """A reader sees all of it or nothing, and nobody but the user sees it. Raises FileExistsError unless told to
    overwrite, and OSError."""
    import tempfile  # which a start can do without

    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".new")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not overwrite:
            reserve(path)
        try:
            os.replace(temporary, path)
        except OSError:
            if not overwrite:
                os.unlink(path)
            raise
    except BaseException:
        os.unlink(temporary)
        raise


def reserve(path: Path) -> None:
    """An empty file of that name, to be replaced by one with content: on every file system the one way to take a name
    that nobody has. Raises FileExistsError, OSError."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
