"""Files that go along with a message: found, checked, and put into it as text; knows no session and draws nothing."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localmoe.errors import SettingError
from localmoe.memory import readable_size

LARGEST = 16 << 20  # bytes of one file; a context of a million tokens is about 4 MB of English
MOST = 200  # files


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file's text, as it was when it was read."""

    name: str
    text: str


def read_files(pattern: str) -> list[Attachment]:
    """The files of a path or a glob (`**` goes down), sorted. Raises SettingError where there is none, or one is no
    text, too large, or unreadable."""
    wanted = os.path.expanduser(pattern)
    found = [wanted] if os.path.lexists(wanted) else sorted(glob.glob(wanted, recursive=True))
    files = [name for name in found if len(found) == 1 or not os.path.isdir(name)]
    if not files:
        raise SettingError(f"{pattern}: no such file, and nothing matches it as a pattern")
    if len(files) > MOST:
        raise SettingError(f"{pattern}: matches {len(files)} files; at most {MOST} are read at once")
    return [Attachment(name, _text_of(Path(name))) for name in files]


def message_with(attachments: Sequence[Attachment], text: str) -> str:
    """A message with files before it, each in a fence that nothing in it can close."""
    return "\n\n".join([*map(_fenced, attachments), text])


def _fenced(attachment: Attachment) -> str:
    fence = "```"
    while fence in attachment.text:
        fence += "`"
    suffix = Path(attachment.name).suffix.removeprefix(".")
    language = suffix if suffix.isalnum() else ""
    body = attachment.text if attachment.text.endswith("\n") else attachment.text + "\n"
    return f"{attachment.name}:\n{fence}{language}\n{body}{fence}"


def _text_of(path: Path) -> str:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise SettingError(f"{path}: is a folder; {path / '*'} names the files in it")
        if not stat.S_ISREG(status.st_mode):
            raise SettingError(f"{path}: is no regular file")
        if status.st_size > LARGEST:
            raise SettingError(
                f"{path}: has {readable_size(status.st_size)}; at most {readable_size(LARGEST)} are read"
            )
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise SettingError(f"{path}: cannot be read: {error.strerror or error}") from None
    if b"\0" in data:
        raise SettingError(f"{path}: is no text (it holds a zero byte)")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SettingError(f"{path}: is no UTF-8 text (byte {error.start})") from None
