"""What a list of conversations shows of one of them, from the first and the last lines of its journal; must not read it
all, and not write."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from localmoe.conversation.lines import begins_header, check_header, foreign, read_line
from localmoe.conversation.storage import check_plain, reason
from localmoe.errors import ConversationError

HEAD, TAIL, FAR_TAIL = 1 << 12, 1 << 13, 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Listed:
    """`title` are its first words, `messages` are counted over all branches, `changed` is local time, `model` answered
    last; `problem` is why it cannot be opened, "" if it can. Texts are as they were written: not fit for a terminal."""

    name: str
    changed: datetime
    nbytes: int
    title: str = ""
    messages: int = 0
    model: str = ""
    problem: str = ""


def look(path: Path) -> Listed:
    """Never raises: what cannot be read is listed as that."""
    changed, nbytes = datetime.fromtimestamp(0), 0
    try:
        found = os.lstat(path)
        changed, nbytes = datetime.fromtimestamp(found.st_mtime), found.st_size
        check_plain(path)
        title = _title(path)
        messages, model = _end(path, nbytes)
    except ConversationError as error:
        return Listed(path.stem, changed, nbytes, problem=str(error))
    except (OSError, OverflowError, ValueError) as error:
        problem = reason(error) if isinstance(error, OSError) else "its date is none"
        return Listed(path.stem, changed, nbytes, problem=f"{path.stem} cannot be read: {problem}")
    return Listed(path.stem, changed, nbytes, title, messages, model)


def _read(path: Path, offset: int, nbytes: int) -> bytes:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(nbytes)


def _title(path: Path) -> str:
    head = _read(path, 0, HEAD)
    line, newline, rest = head.partition(b"\n")
    parsed = read_line(line)
    if parsed is None:
        if not newline and not begins_header(line) and head:
            raise foreign(path.stem)
        if newline and not any(read_line(line) for line in rest.split(b"\n")[:8]):
            raise foreign(path.stem)
        return ""
    if parsed[0] != 1:
        return ""
    check_header(path.stem, parsed[1])
    title = parsed[1].get("title", "")
    return title[:200] if isinstance(title, str) else ""


def _end(path: Path, nbytes: int) -> tuple[int, str]:
    """How many messages there are and who answered last, as the last answer that ended says, and what is behind it. The
    ids of messages count up: without such an answer nearby the highest one is taken."""
    for taken in (TAIL, FAR_TAIL):
        begin = max(nbytes - taken, 0)
        lines = _read(path, begin, taken).split(b"\n")[bool(begin) : -1]
        behind, highest, model = 0, 0, ""
        for line in reversed(lines):
            parsed = read_line(line)
            event = parsed[1] if parsed else {}
            id, messages, who = event.get("id"), event.get("messages"), event.get("model")
            highest = max(highest, id if type(id) is int else 0)
            model = model or (who[:200] if isinstance(who, str) else "")
            if event.get("do") == "end" and type(messages) is int:
                return messages + behind, model
            behind += event.get("do") == "message"
        if not begin:
            return behind, model
        if highest:
            return highest, model
    return 0, ""
