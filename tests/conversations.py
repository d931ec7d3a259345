"""Conversations for the tests of their journals: what they are, changes of all kinds, and a library of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from localmoe.conversation.library import Library
from localmoe.conversation.lines import SUFFIX
from localmoe.conversation.tree import Conversation

Change = tuple[str, Any]
TEXTS = st.text(max_size=12) | st.sampled_from(
    ["\n", "\x00\x1b[31m", "naïve 🙂", "\ud83d", "\u2028", '"}\\', "a" * 300]
)
TOKENS = st.lists(st.integers(0, (1 << 31) - 1), max_size=3)
FACTS = st.dictionaries(
    st.sampled_from(["model", "template", "settings"]),
    st.none() | TEXTS | st.integers() | st.dictionaries(st.text(max_size=3), st.booleans(), max_size=2),
    max_size=2,
)
CHANGES = st.one_of(
    st.tuples(st.just("add"), TEXTS),
    st.tuples(st.just("begin"), st.sampled_from(["", "m1", "m2"])),
    st.tuples(st.just("grow"), st.tuples(TEXTS, TOKENS)),
    st.tuples(st.just("end"), st.sampled_from(["stop", "length", "interrupted"])),
    st.tuples(st.just("move"), st.integers(0, 30)),
    st.tuples(st.just("trim"), st.tuples(st.integers(0, 30), TEXTS)),
    st.tuples(st.just("set_system"), TEXTS),
    st.tuples(st.just("note"), FACTS),
)


def library_in(folder: Path) -> Library:
    return Library(folder / "state" / "localmoe" / "conversations")


def journal_of(library: Library, name: str) -> Path:
    return library.folder() / (name + SUFFIX)


def change(conversation: Conversation, what: Change) -> None:
    """One change, made to fit: ids are taken from those that are there, and only an answer grows."""
    kind, value = what
    ids = [0, *conversation.messages]
    if kind in ("grow", "end"):
        head = conversation.messages.get(conversation.head)
        if head is None or head.role != "assistant":
            return
    if kind == "move":
        conversation.move(ids[value % len(ids)])
    elif kind == "trim":
        conversation.trim(ids[value[0] % len(ids)], value[1])
    elif kind == "grow":
        conversation.grow(*value)
    elif kind == "note":
        conversation.note(**value)
    else:
        getattr(conversation, kind)(value)


def changed(conversation: Conversation, changes: Sequence[Change]) -> None:
    for what in changes:
        change(conversation, what)


def state(conversation: Conversation) -> dict[str, Any]:
    """All that a conversation is, for comparing."""
    messages = {
        id: (m.parent, m.role, m.content, list(m.tokens), m.finish, m.model) for id, m in conversation.messages.items()
    }
    order = list(conversation.messages)
    names = ("head", "first", "summary", "system", "facts")
    return {"messages": messages, "order": order, **{name: getattr(conversation, name) for name in names}}


def talk(conversation: Conversation, turns: int = 2, pieces: int = 4) -> None:
    """Some questions, answered in pieces, with another branch at the end."""
    conversation.note(model="demo.gguf", settings={"temperature": 0.7})
    conversation.set_system("Be brief.")
    for turn in range(turns):
        conversation.add(f"question {turn} naïve 🙂\nof two lines")
        conversation.begin("demo")
        for piece in range(pieces):
            conversation.grow(f"piece {turn}.{piece} é ", [1000 * turn + piece, piece])
        conversation.end("stop")
    conversation.move(2)
    conversation.add("another question")
    conversation.begin("demo")
    conversation.grow("other", [7])
    conversation.end("length")
    conversation.trim(1, "what was said")


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with open(handle, "wb") as file:
        file.write(data)
