"""A conversation from a file of others: what `export` writes as JSON, and messages as most programs know them. Must not
write, and believes neither ids nor facts: whoever edits a text leaves ids that no longer spell it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localmoe.conversation.export import FORMAT, VERSION
from localmoe.conversation.storage import check_plain, reason
from localmoe.conversation.tree import ROLES, Conversation
from localmoe.errors import ConversationError

SIZE_LIMIT = 1 << 26  # bytes
SUFFIXES = (".json", ".jsonl")


def is_export(name: str) -> bool:
    """Whether a name means a file to be read rather than a saved conversation."""
    return name.lower().endswith(SUFFIXES)


def read_export(path: str | Path) -> Conversation:
    """The conversation in a file: JSON of `export`, {"messages": […]}, a list of messages, or one line of such. Raises
    ConversationError for anything else, naming the message that is wrong."""
    asked = str(path)
    try:
        content = _parsed(asked, _read(asked, Path(path).expanduser()))
    except (OSError, RuntimeError, ValueError) as error:
        said = reason(error) if isinstance(error, OSError) else str(error)
        raise ConversationError(f"{asked} cannot be read: {said}") from None
    if isinstance(content, list):
        content = {"messages": content}
    if not isinstance(content, dict):
        raise ConversationError(f"{asked} holds no conversation: an object with messages is expected")
    try:
        found = _own(content) if content.get("format") == FORMAT else _foreign(content)
    except ConversationError as error:
        raise ConversationError(f"{asked}: {error}") from None
    if not found.messages:
        raise ConversationError(f"{asked} holds no messages")
    return found


def _read(asked: str, path: Path) -> bytes:
    resolved = path.resolve()
    check_plain(resolved)
    with resolved.open("rb") as file:
        data = file.read(SIZE_LIMIT + 1)
    if len(data) > SIZE_LIMIT:
        raise ConversationError(f"{asked} is larger than {SIZE_LIMIT >> 20} MiB")
    return data


def _parsed(asked: str, data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
        if asked.lower().endswith(".jsonl"):
            lines = [line for line in text.split("\n") if line.strip()]
            if len(lines) != 1:
                raise ConversationError(f"{asked} holds {len(lines)} conversations: one to a file can be read")
            text = lines[0]
        return json.loads(text)
    except UnicodeDecodeError:
        raise ConversationError(f"{asked} is not text in UTF-8") from None
    except RecursionError:
        raise ConversationError(f"{asked} is nested too deeply") from None
    except ValueError as error:
        raise ConversationError(f"{asked} is not JSON: {error}") from None


def _own(content: Mapping[str, Any]) -> Conversation:
    version = content.get("version")
    if type(version) is not int or version > VERSION:
        raise ConversationError(f"it is of version {str(version)[:20]}; this localmoe reads {VERSION}")
    found = Conversation()
    found.apply({"do": "system", "text": content.get("system", "")})
    for place, entry in enumerate(_entries(content, "tree"), 1):
        try:
            found.apply({**entry, "do": "message"})
            if entry.get("finish"):
                found.apply({"do": "end", "id": entry["id"], "finish": entry["finish"]})
        except ConversationError as error:
            raise ConversationError(f"message {place} of the tree: {error}") from None
    found.apply({"do": "trim", "first": content.get("first", 0), "summary": content.get("summary", "")})
    found.apply({"do": "move", "head": content.get("head")})
    return found


def _foreign(content: Mapping[str, Any]) -> Conversation:
    found, system = Conversation(), list[str]()
    for place, entry in enumerate(_entries(content, "messages"), 1):
        role, text = entry.get("role"), _text(place, entry)
        id = len(found.messages) + 1
        if role in ("system", "developer") and not found.messages:
            system.append(text)
        elif role in ROLES:
            found.apply({"do": "message", "id": id, "parent": id - 1, "role": role, "content": text})
            if role == "assistant":
                found.apply({"do": "end", "id": id, "finish": "stop"})
        else:
            behind = " behind the first message" if role in ("system", "developer") else ""
            raise ConversationError(
                f"message {place} is of {str(role)[:40]!r}{behind}: user and assistant are possible"
            )
    found.set_system("\n\n".join(system))
    return found


def _entries(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConversationError(f"{key} is not a list of messages")
    return entries


def _text(place: int, entry: Mapping[str, Any]) -> str:
    """Content as text, or as a list of parts that are text."""
    content = entry.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") in ("text", None)]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise ConversationError(f"message {place} has content that is not text")
    return "".join(text for text in texts if text)
