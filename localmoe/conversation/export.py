"""A conversation as a file for others: markdown to read, JSON to keep, lines of messages to train on; knows no journal.

JSON, version 1 (`localmoe conversation export`). `messages` is the branch that is shown, as most programs know it; all
branches are in `tree`, whose messages name the one before them by `parent`, 0 at the beginning:

    {"format": "localmoe conversation export", "version": 1, "name": "…", "created": "2026-11-21T17:05:12+01:00",
     "messages": [{"role": "system" | "user" | "assistant", "content": "…"}, …],
     "system": "…", "facts": {…}, "head": 4, "first": 0, "summary": "…",
     "tree": [{"id": 1, "parent": 0, "role": "user" | "assistant", "content": "…",
               "model": "…", "finish": "stop" | "length" | "context" | "interrupted" | "", "tokens": [ids]}, …]}

`head` is the last message of the branch that is shown, `first` the message from which on a model sees it, `summary`
stands for those before, `facts` are what was set. `tokens` are the ids that were generated, where they spell `content`.

JSON lines: one line, {"messages": [{"role": …, "content": …}, …]}, the branch that is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from localmoe.conversation.storage import reason
from localmoe.conversation.tree import Conversation, Message
from localmoe.errors import ConversationError
from localmoe.folders import write_whole

FORMAT, VERSION = "localmoe conversation export", 1
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)
Markers = tuple[str, str] | None


def export(
    path: str | Path,
    conversation: Conversation,
    *,
    name: str = "",
    created: str = "",
    reasoning: Markers = None,
    overwrite: bool = False,
) -> Path:
    """Write the conversation into a file, its form by the suffix; returns where. `reasoning` are the markers around it.
    Raises ConversationError for another suffix, for an empty conversation, for a file that is there unless told to
    overwrite it, and for what cannot be written."""
    asked = str(path)
    path = _expanded(path)
    form = FORMS.get(path.suffix.lower())
    if form is None:
        found = f"not {path.suffix}" if path.suffix else "which says the form"
        raise ConversationError(f"{asked}: a conversation is exported to a name that ends in {SUFFIXES}, {found}")
    if not conversation.messages:
        raise ConversationError("there is nothing to export yet")
    text = form(conversation, name, created, reasoning)
    try:
        if not path.parent.is_dir():
            raise ConversationError(f"{asked}: there is no folder {path.parent}")
        if path.exists() and not path.is_file():
            raise ConversationError(f"{asked} is not a file")
        write_whole(path, text.encode("utf-8", "replace"), overwrite=overwrite)
    except FileExistsError:
        raise ConversationError(f"{asked} is there already: /export --force {asked} overwrites it") from None
    except (OSError, ValueError) as error:
        said = reason(error) if isinstance(error, OSError) else str(error)
        raise ConversationError(f"{asked} cannot be written: {said}") from None
    return path


def chat_messages(conversation: Conversation) -> list[dict[str, str]]:
    """The branch that is shown, the system prompt first, in the form of most programs."""
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    return [*system, *({"role": message.role, "content": message.content} for message in conversation.path())]


def _markdown(conversation: Conversation, name: str, created: str, reasoning: Markers) -> str:
    path = conversation.path()
    models = list(dict.fromkeys(message.model for message in path if message.model))
    facts = {"Name": name, "Date": created.replace("T", " ")[:16], "Model": ", ".join(models)}
    parts = [f"# {_one_line(conversation.title) or name or 'A conversation'}"]
    parts += ["\n".join(f"- {key}: {_one_line(value)}" for key, value in facts.items() if value)]
    if conversation.system:
        parts += ["## System", conversation.system]
    for message in path:
        if message.id == conversation.first and conversation.summary:
            parts += ["## Summary of what was before", conversation.summary]
        parts += _spoken(message, reasoning)
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _spoken(message: Message, reasoning: Markers) -> list[str]:
    if message.role == "user":
        return ["## User", _closed(message.content)]
    thought, answer = _parted(message.content, reasoning)
    heading = f"## Assistant ({_one_line(message.model)})" if message.model else "## Assistant"
    folded = [f"<details>\n<summary>Reasoning</summary>\n\n{thought}\n\n</details>"] if thought else []
    ended = {"length": "*(cut at the limit of tokens)*", "context": "*(the context was full)*"}
    return [
        heading,
        *folded,
        _closed(answer),
        ended.get(message.finish, "" if message.finish == "stop" else "*(stopped)*"),
    ]


def _parted(content: str, reasoning: Markers) -> tuple[str, str]:
    """Reasoning and answer. The first marker may be the template's, and the answer may have ended before the second."""
    if reasoning is None:
        return "", content
    begin, end = reasoning
    before, marker, after = content.partition(end)
    opened = before.lstrip().startswith(begin)
    if not (marker or opened):
        return "", content
    return before.lstrip().removeprefix(begin).strip(), after.strip("\n")


def _closed(text: str) -> str:
    """The text; a block of code that it leaves open ends there, and takes nothing of what follows."""
    fence = ""
    for found in FENCE.finditer(text):
        marks, rest = found[1], found[2].strip()
        if not fence:
            fence = marks
        elif marks.startswith(fence) and not rest:
            fence = ""
    return f"{text}\n{fence}" if fence else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _json(conversation: Conversation, name: str, created: str, reasoning: Markers) -> str:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "created": created,
        "messages": chat_messages(conversation),
        "system": conversation.system,
        "facts": conversation.facts,
        "head": conversation.head,
        "first": conversation.first,
        "summary": conversation.summary,
        "tree": [_entry(message) for message in conversation.messages.values()],
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _entry(message: Message) -> dict[str, Any]:
    keys = ("id", "parent", "role", "content")
    entry: dict[str, Any] = {key: getattr(message, key) for key in keys}
    if message.role == "assistant":
        entry.update(model=message.model, finish=message.finish, tokens=message.tokens)
    return entry


def _json_lines(conversation: Conversation, name: str, created: str, reasoning: Markers) -> str:
    return json.dumps({"messages": chat_messages(conversation)}, ensure_ascii=False) + "\n"


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return Path(path)


FORMS: Mapping[str, Callable[[Conversation, str, str, Markers], str]] = {
    ".md": _markdown,
    ".markdown": _markdown,
    ".json": _json,
    ".jsonl": _json_lines,
}
SUFFIXES = ".md, .markdown, .json or .jsonl"
