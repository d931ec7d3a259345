"""What a journal still says, however damaged it is; must not write.

Lines are numbered, so that a line that is damaged or gone is known, and what it can have meant is made up for:
- A message whose parent is lost hangs on what was the head, and so does what refers to the lost one later.
- An answer whose beginning is lost begins with the first piece that is there.
- An answer that goes on, or ends, behind a loss may lack a piece: its ids do not surely spell it, and are dropped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from localmoe.conversation.lines import FILE_LIMIT, LINE_LIMIT, begins_header, check_header, foreign, read_line
from localmoe.conversation.tree import CHANGES, Conversation, Event
from localmoe.errors import ConversationError

NAMED_LINES = 4  # of those that are lost; the others are counted


@dataclass(slots=True)
class Recovered:
    """A conversation as its file has it. `number` is that of the last line, `nbytes` what of the file are whole lines;
    `problem` is what is lost, in one line."""

    conversation: Conversation = field(default_factory=Conversation)
    created: str = ""
    number: int = 0
    nbytes: int = 0
    problem: str = ""


def recover(file: BinaryIO, name: str) -> Recovered:
    """Read a journal from its beginning. Raises ConversationError for what is none, OSError."""
    size = os.fstat(file.fileno()).st_size
    if size > FILE_LIMIT:
        raise ConversationError(f"{name} has {size} bytes: a conversation has no more than {FILE_LIMIT}")
    found, replay = Recovered(), Replay()
    sound = False
    while (taken := _read(file)) is not None:
        line, nbytes = taken
        parsed = read_line(line)
        if parsed is None:
            replay.damaged += 1
        elif parsed[0] == 1 and found.nbytes == 0:
            check_header(name, parsed[1])
            found.created = str(parsed[1].get("created", ""))[:40]
            replay.number = 1
        else:
            replay.take(*parsed)
        sound = sound or parsed is not None
        found.nbytes += nbytes
    tail = size - found.nbytes
    if not sound and size:
        file.seek(0)
        if found.nbytes or not begins_header(file.read(LINE_LIMIT)):
            raise foreign(name)
    replay.close()
    found.conversation, found.number = replay.conversation, replay.number
    notes = replay.notes() + ["the last line was not written to its end"] * (tail > 0)
    if notes:
        found.problem = f"{name}: {', '.join(notes)}: left out, the rest is kept"
    return found


def _read(file: BinaryIO) -> tuple[bytes, int] | None:
    """The next whole line, and how many bytes it has; too long ones as an empty line, None where no newline comes."""
    line = file.readline(LINE_LIMIT)
    if line.endswith(b"\n"):
        return line[:-1], len(line)
    nbytes = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(LINE_LIMIT)
        nbytes += len(line)
    return (b"", nbytes) if line else None


class Replay:
    """The changes of sound lines, one after the other; between two of them lines may be lost."""

    def __init__(self) -> None:
        self.conversation = Conversation()
        self.number = 0  # of the last line that is known of
        self.damaged = 0  # lines since the last sound one
        self._lost_at = 0  # the number of the last line that is lost, or not understood
        self._lost: list[str] = []
        self._losses = 0
        self._unknown = 0
        self._kinds: dict[str, None] = {}
        self._misfits: list[int] = []
        self._begun: dict[int, int] = {}  # answer -> number of the line that began it
        self._instead: dict[int, int] = {}  # lost message -> where what hangs on it is put

    def take(self, number: int, event: Event) -> None:
        """A sound line. A line that comes twice counts once."""
        if number <= self.number:
            self._misfits.append(number)
            return
        if self.damaged or number > self.number + 1:
            self._lose(max(number - 1, self.number + (self.damaged > 0)))
        self.number = number
        kind = event.get("do")
        if not isinstance(kind, str) or kind not in CHANGES:
            self._unknown += 1
            if len(self._kinds) < NAMED_LINES:
                self._kinds[str(kind)[:20]] = None
            self._lost_at = number
            return
        try:
            self._change(number, dict(event))
        except ConversationError:
            self._misfits.append(number)
            self._lost_at = number

    def close(self) -> None:
        """No line follows."""
        if self.damaged:
            self._lose(self.number + self.damaged)

    def notes(self) -> list[str]:
        notes = [*self._lost[:NAMED_LINES]]
        if self._losses > NAMED_LINES:
            notes.append(f"{self._losses - NAMED_LINES} more places are damaged")
        if self._misfits:
            more = f" and {len(self._misfits) - 1} others do" if len(self._misfits) > 1 else " does"
            notes.append(f"line {self._misfits[0]}{more} not fit what is before")
        if self._unknown:
            kinds = ", ".join(repr(kind) for kind in self._kinds)
            changes = "1 change" if self._unknown == 1 else f"{self._unknown} changes"
            notes.append(f"not understood: {changes} of a newer localmoe ({kinds})")
        return notes

    def _lose(self, last: int) -> None:
        first = min(self.number + 1, last)
        state = "damaged" if self.damaged else "missing"
        if len(self._lost) < NAMED_LINES:
            self._lost.append(f"line {last} is {state}" if first == last else f"lines {first} to {last} are {state}")
        self._losses += 1
        self._lost_at, self.number, self.damaged = last, last, 0

    def _change(self, number: int, event: dict[str, Any]) -> None:
        conversation, kind = self.conversation, event["do"]
        if kind == "message":
            event["parent"] = self._known(number, event.get("parent"))
        elif kind == "move":
            event["head"] = self._known(number, event.get("head"))
        elif kind in ("grow", "end") and type(id := event.get("id")) is int:
            if kind == "grow" and id not in conversation.messages:
                self._does_not_fit(number)
                conversation.apply({"do": "message", "id": id, "parent": conversation.head, "role": "assistant"})
                self._begun[id] = -1
            if self._begun.get(id, number) < self._lost_at:
                event["tokens"] = []
                conversation.messages[id].tokens.clear()
        conversation.apply(event)
        if kind == "message":
            self._begun[event["id"]] = number

    def _known(self, number: int, id: object) -> object:
        """The message, or what is there instead of it."""
        if type(id) is not int or not id or id in self.conversation.messages:
            return id
        if id not in self._instead:
            self._does_not_fit(number)
        return self._instead.setdefault(id, self.conversation.head)

    def _does_not_fit(self, number: int) -> None:
        """Where nothing was lost, that is told by itself."""
        if not self._losses:
            self._misfits.append(number)
