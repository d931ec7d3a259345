"""One conversation as a tree of messages with a head; every change is an event, and the events are the conversation.

Must not know files: `record` is told each event, and replaying them gives the same conversation again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from localmoe.errors import ConversationError
from localmoe.interrupt import Uninterrupted

Role = Literal["user", "assistant"]
Event = Mapping[str, Any]
Record = Callable[[Event], None]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(slots=True)
class Message:
    """What someone said. `parent` is the message before it, 0 at the beginning.

    Of an answer: `tokens` are the ids that the model chose, none unless they spell all of `content`; `finish` is why it
    ended, "" while it grows or where the process was killed; `model` is the name of who answered.
    """

    id: int
    parent: int
    role: Role
    pieces: list[str]
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    model: str = ""

    @property
    def content(self) -> str:
        if len(self.pieces) > 1:
            self.pieces[:] = ["".join(self.pieces)]
        return self.pieces[0]


class Conversation:
    """Messages by their ids, in the order in which they began. `head` is the last message of the branch that goes on.

    `first` is the message from which on a model sees the conversation, 0 the beginning; `summary` stands for what was
    before. `facts` are what it needs to go on elsewhere: model, template, settings, each a value of JSON.
    """

    def __init__(self, record: Record | None = None) -> None:
        self.messages: dict[int, Message] = {}
        self.head = 0
        self.first = 0
        self.summary = ""
        self.system = ""
        self.facts: dict[str, Any] = {}
        self._record = record

    def apply(self, event: Event) -> None:
        """Make one change, as it was recorded. Raises ConversationError for what cannot be one; nothing is changed
        then."""
        kind = event.get("do")
        change = CHANGES.get(kind) if isinstance(kind, str) else None
        if change is None:
            raise ConversationError(f"a conversation knows no change {str(kind)[:40]!r}")
        change(self, event)

    def record_to(self, record: Record | None) -> None:
        """Tell `record` each change from now on."""
        self._record = record

    def _do(self, kind: str, **values: Any) -> None:
        event = {"do": kind, **values}
        with Uninterrupted():  # between the two, Ctrl+C would leave a change that nobody recorded
            self.apply(event)
            if self._record:
                self._record(event)

    def events(self) -> Iterator[Event]:
        """The shortest changes that make this conversation of an empty one."""
        if self.system:
            yield {"do": "system", "text": self.system}
        if self.facts:
            yield {"do": "facts", "facts": self.facts}
        for message in self.messages.values():
            who = {"id": message.id, "parent": message.parent, "role": message.role}
            if not message.tokens:
                yield {"do": "message", **who, "content": message.content, "model": message.model}
            else:
                yield {"do": "message", **who, "content": "", "model": message.model}
                yield {"do": "grow", "id": message.id, "text": message.content, "tokens": message.tokens}
            if message.finish:
                yield {"do": "end", "id": message.id, "finish": message.finish}
        if self.first or self.summary:
            yield {"do": "trim", "first": self.first, "summary": self.summary}
        yield {"do": "move", "head": self.head}

    def add(self, content: str) -> Message:
        """A message of the user's behind the head, which moves there."""
        return self._new("user", content)

    def begin(self, model: str) -> Message:
        """An empty answer behind the head, which moves there; `grow` and `end` are about it."""
        return self._new("assistant", "", model)

    def _new(self, role: Role, content: str, model: str = "") -> Message:
        id = max(self.messages, default=0) + 1
        values = {"model": model} if model else {}
        self._do("message", id=id, parent=self.head, role=role, content=content, **values)
        return self.messages[id]

    def grow(self, text: str, tokens: Sequence[int]) -> None:
        """More of the answer at the head."""
        self._do("grow", id=self.head, text=text, tokens=list(tokens))

    def end(self, finish: str) -> None:
        """The answer at the head has ended."""
        self._do("end", id=self.head, finish=finish)

    def move(self, head: int) -> None:
        """Go on behind another message; 0 is the beginning."""
        if head != self.head:
            self._do("move", head=head)

    def trim(self, first: int, summary: str = "") -> None:
        """A model sees the conversation from this message of the branch on; `summary` stands for what was before."""
        if (first, summary) != (self.first, self.summary):
            self._do("trim", first=first, summary=summary)

    def set_system(self, text: str) -> None:
        if text != self.system:
            self._do("system", text=text)

    def note(self, **facts: Any) -> None:
        """Keep facts of JSON's kinds; None removes one."""
        changed = {key: value for key, value in facts.items() if self.facts.get(key) != value}
        if changed:
            self._do("facts", facts=changed)

    def path(self, head: int | None = None) -> list[Message]:
        """The branch from its beginning to `head`."""
        found: list[Message] = []
        at = self.head if head is None else head
        while at:
            found.append(self.messages[at])
            at = found[-1].parent
        return found[::-1]

    def seen(self) -> list[Message]:
        """What of the branch a model sees; all of it where `first` lies on another branch."""
        path = self.path()
        start = next((i for i, message in enumerate(path) if message.id == self.first), 0)
        return path[start:]

    @property
    def summary_seen(self) -> str:
        """What a model sees in place of the messages that it does not."""
        return self.summary if self.trimmed else ""

    @property
    def trimmed(self) -> int:
        """Messages of the branch that a model does not see."""
        return len(self.path()) - len(self.seen())

    def children(self, parent: int) -> list[Message]:
        return [message for message in self.messages.values() if message.parent == parent]

    def leaves(self) -> list[Message]:
        """The last messages of all branches, in the order in which they began. A question that was taken back before
        an answer began ends none."""
        parents = {message.parent for message in self.messages.values()}
        taken_back = {m.id for m in self.messages.values() if m.role == "user" and m.id not in parents} - {self.head}
        kept = [message for message in self.messages.values() if message.id not in taken_back]
        parents = {message.parent for message in kept}
        return [message for message in kept if message.id not in parents]

    @property
    def title(self) -> str:
        """The first words of it, in one line; empty without any."""
        first = next(iter(self.messages.values()), None)
        return " ".join(first.content.split())[:200] if first else ""


def _number(event: Event, key: str) -> int:
    value = event.get(key)
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ConversationError(f"{key} is a whole number from 0 up, not {repr(value)[:40]}")
    return value


def _text(event: Event, key: str) -> str:
    value = event.get(key, "")
    if not isinstance(value, str):
        raise ConversationError(f"{key} is a text, not {repr(value)[:40]}")
    try:
        value.encode()
    except UnicodeEncodeError:  # halves of letters, which neither a file nor a tokenizer could carry
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return value


def _known(conversation: Conversation, event: Event, key: str) -> int:
    id = _number(event, key)
    if id and id not in conversation.messages:
        raise ConversationError(f"{key}: there is no message {id}")
    return id


def _answer(conversation: Conversation, event: Event) -> Message:
    message = conversation.messages.get(_number(event, "id"))
    if message is None or message.role != "assistant":
        raise ConversationError(f"there is no answer {event.get('id')}")
    return message


def _message(conversation: Conversation, event: Event) -> None:
    id, parent, role = _number(event, "id"), _known(conversation, event, "parent"), _text(event, "role")
    if role not in ROLES:
        raise ConversationError(f"nobody speaks as {role[:40]!r}; possible: {', '.join(ROLES)}")
    if not id or id in conversation.messages:
        raise ConversationError(f"message {id} is there already")
    content, model = _text(event, "content"), _text(event, "model")
    spoken: Role = "user" if role == "user" else "assistant"
    conversation.messages[id] = Message(id, parent, spoken, [content], model=model)
    conversation.head = id


def _grow(conversation: Conversation, event: Event) -> None:
    message, text, tokens = _answer(conversation, event), _text(event, "text"), event.get("tokens", [])
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
        raise ConversationError("tokens are whole numbers from 0 up")
    if message.tokens or not any(message.pieces):  # else some of its text has no ids, and these would not spell it
        message.tokens += tokens
    message.pieces.append(text)


def _end(conversation: Conversation, event: Event) -> None:
    _answer(conversation, event).finish = _text(event, "finish")


def _move(conversation: Conversation, event: Event) -> None:
    conversation.head = _known(conversation, event, "head")


def _trim(conversation: Conversation, event: Event) -> None:
    first, summary = _known(conversation, event, "first"), _text(event, "summary")
    conversation.first, conversation.summary = first, summary


def _system(conversation: Conversation, event: Event) -> None:
    conversation.system = _text(event, "text")


def _facts(conversation: Conversation, event: Event) -> None:
    facts = event.get("facts")
    if not isinstance(facts, dict):
        raise ConversationError("facts are an object of JSON")
    conversation.facts = {k: v for k, v in {**conversation.facts, **facts}.items() if v is not None}


CHANGES: Mapping[str, Callable[[Conversation, Event], None]] = {
    "message": _message,
    "grow": _grow,
    "end": _end,
    "move": _move,
    "trim": _trim,
    "system": _system,
    "facts": _facts,
}
