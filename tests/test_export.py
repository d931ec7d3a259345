"""A conversation as a file for others, and back: markdown, JSON, lines of messages, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from conversations import CHANGES, Change, changed, state, talk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmoe.conversation import imports
from localmoe.conversation.export import chat_messages, export
from localmoe.conversation.imports import is_export, read_export
from localmoe.conversation.tree import Conversation
from localmoe.errors import ConversationError

FREE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENDINGS = (".md", ".markdown", ".json", ".jsonl")


def asked() -> Conversation:
    found = Conversation()
    found.set_system("Be brief.")
    found.note(model="demo.gguf")
    found.add("Show me code.\n\nIn *two* lines.")
    found.begin("demo 17M")
    found.grow("<think>They want\ncode.</think>\n\nHere:\n\n```python\na = '</details>'\n# b\n```\n", [1, 2])
    found.end("stop")
    found.add("And?")
    found.begin("other")
    found.grow("````\n```\nopen", [3])
    found.end("interrupted")
    return found


MARKDOWN = """\
# Show me code. In *two* lines.

- Name: code
- Date: 2026-11-21 17:05
- Model: demo 17M, other

## System

Be brief.

## User

Show me code.

In *two* lines.

## Assistant (demo 17M)

<details>
<summary>Reasoning</summary>

They want
code.

</details>

Here:

```python
a = '</details>'
# b
```

## User

And?

## Assistant (other)

````
```
open
````

*(stopped)*
"""


def test_markdown_is_the_branch_that_is_shown(tmp_path: Path) -> None:
    path = export(
        tmp_path / "x.md",
        asked(),
        name="code",
        created="2026-11-21T17:05:12+01:00",
        reasoning=("<think>", "</think>"),
    )
    assert path.read_text(encoding="utf-8") == MARKDOWN


@pytest.mark.parametrize(
    ("content", "thought", "answer"),
    [
        ("<think>\nwhy\n</think>\nbecause", "why", "because"),
        ("why</think>because", "why", "because"),
        ("<think>why", "why", None),
        ("because", None, "because"),
        ("say <think> aloud", None, "say <think> aloud"),
    ],
)
def test_reasoning_is_folded_where_it_is(tmp_path: Path, content: str, thought: str | None, answer: str | None) -> None:
    found = Conversation()
    found.add("hello")
    found.begin("")
    found.grow(content, [])
    found.end("stop")
    text = export(tmp_path / "x.md", found, reasoning=("<think>", "</think>")).read_text()
    folded = f"<details>\n<summary>Reasoning</summary>\n\n{thought}\n\n</details>"
    parts = [part for part in (thought and folded, answer) if part]
    assert text.endswith("## Assistant\n\n" + "\n\n".join(parts) + "\n")


def test_without_markers_an_answer_is_as_it_is(tmp_path: Path) -> None:
    assert "<think>They want" in export(tmp_path / "x.md", asked()).read_text()


def test_a_summary_stands_before_what_a_model_sees(tmp_path: Path) -> None:
    found = asked()
    found.trim(3, "They got code.")
    text = export(tmp_path / "x.md", found).read_text()
    assert "## Summary of what was before\n\nThey got code.\n\n## User\n\nAnd?" in text


def test_json_has_the_branch_that_is_shown_and_all_others(tmp_path: Path) -> None:
    found = Conversation()
    talk(found)
    content = json.loads(export(tmp_path / "x.json", found, name="n", created="c").read_text(encoding="utf-8"))
    assert (content["format"], content["version"]) == ("localmoe conversation export", 1)
    assert content["messages"] == chat_messages(found)
    assert [m["role"] for m in content["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["id"] for m in content["tree"]] == [1, 2, 3, 4, 5, 6]
    assert content["tree"][1] == {
        "id": 2,
        "parent": 1,
        "role": "assistant",
        "content": found.messages[2].content,
        "model": "demo",
        "finish": "stop",
        "tokens": found.messages[2].tokens,
    }
    assert (content["head"], content["first"], content["summary"]) == (6, 1, "what was said")
    assert content["facts"] == {"model": "demo.gguf", "settings": {"temperature": 0.7}}


def test_json_lines_are_one_conversation_a_line(tmp_path: Path) -> None:
    (line,) = export(tmp_path / "x.jsonl", asked()).read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"messages": chat_messages(asked())}


def without_ids(conversation: Conversation) -> dict[str, Any]:
    found = state(conversation)
    found["messages"] = {id: (*m[:3], *m[4:]) for id, m in found["messages"].items()}
    return {key: value for key, value in found.items() if key != "facts"}


@FREE
@given(changes=st.lists(CHANGES, max_size=20))
def test_an_export_comes_back_but_for_ids_and_facts(tmp_path: Path, changes: list[Change]) -> None:
    found = Conversation()
    found.add("hello")
    changed(found, changes)
    again = read_export(export(tmp_path / "x.json", found, overwrite=True))
    assert without_ids(again) == without_ids(found)
    assert not any(message.tokens for message in again.messages.values())
    assert again.facts == {}


@FREE
@given(changes=st.lists(CHANGES, max_size=20))
def test_lines_of_messages_come_back_as_the_branch(tmp_path: Path, changes: list[Change]) -> None:
    found = Conversation()
    found.add("hello")
    changed(found, changes)
    path = export(tmp_path / "x.jsonl", found, overwrite=True)
    if found.head:
        assert chat_messages(read_export(path)) == chat_messages(found)
    else:
        with pytest.raises(ConversationError, match="holds no messages"):
            read_export(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_is_there_is_not_overwritten_unasked(tmp_path: Path, ending: str) -> None:
    path = tmp_path / ("x" + ending.upper())
    path.write_text("mine")
    with pytest.raises(ConversationError, match=f"{path} is there already: /export --force {path} overwrites it"):
        export(path, asked())
    assert path.read_text() == "mine"
    export(path, asked(), overwrite=True)
    assert "Show me code." in path.read_text()
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_an_export_is_for_the_user_alone(tmp_path: Path) -> None:
    assert stat.S_IMODE(export(tmp_path / "x.md", asked()).stat().st_mode) == 0o600


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.md").mkdir()
    for name, said in {
        "x.txt": r"ends in \.md, \.markdown, \.json or \.jsonl, not \.txt",
        "x": r"which says the form",
        "missing/x.md": "there is no folder",
        "folder.md": "is not a file",
        "a\0b.md": "null",
        "a" * 300 + ".md": "file name too long",
    }.items():
        with pytest.raises(ConversationError, match=said):
            export(tmp_path / name, asked())
    with pytest.raises(ConversationError, match="nothing to export yet"):
        export(tmp_path / "x.md", Conversation())
    assert os.listdir(tmp_path) == ["folder.md"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, step, full)
            with pytest.raises(ConversationError, match="no space left on device"):
                export(tmp_path / "x.md", asked())
        assert os.listdir(tmp_path) == ["folder.md"]


def test_messages_as_other_programs_write_them_are_read(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "In German."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " you"}], "name": "x"},
        {"role": "assistant", "content": "Hallo"},
    ]
    for content in ({"messages": messages, "model": "x"}, messages):
        (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
        found = read_export(tmp_path / "x.json")
        assert found.system == "Be brief.\n\nIn German."
        assert [(m.role, m.content, m.finish) for m in found.path()] == [
            ("user", "Hello you", ""),
            ("assistant", "Hallo", "stop"),
        ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"3", "holds no conversation"),
        (b"{}", "messages is not a list"),
        (b'{"messages": [1]}', "messages is not a list"),
        (b'{"messages": []}', "holds no messages"),
        (b'[{"role": "system", "content": "x"}]', "holds no messages"),
        (b'[{"role": "tool", "content": "x"}]', "message 1 is of 'tool': user and assistant are possible"),
        (
            b'[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]',
            "message 2 is of 'system' behind the first message",
        ),
        (b'[{"role": "user", "content": null}]', "message 1 has content that is not text"),
        (b'[{"role": "user", "content": [{"type": "image_url"}]}]', "message 1 has content that is not text"),
        (b'{"format": "localmoe conversation export", "version": 2}', "it is of version 2; this localmoe reads 1"),
        (b'{"format": "localmoe conversation export", "version": 1}', "tree is not a list"),
        (
            b'{"format": "localmoe conversation export", "version": 1, "tree": [{"id": 1, "parent": 7, "role": "x"}]}',
            "message 1 of the tree: parent: there is no message 7",
        ),
        (
            b'{"format": "localmoe conversation export", "version": 1, "tree": [], "head": 3}',
            "head: there is no message 3",
        ),
    ],
)
def test_what_is_no_conversation_is_refused_with_the_place(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ConversationError, match=said) as raised:
        read_export(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.jsonl").write_text('{"messages": []}\n\n{"messages": []}\n')
    (tmp_path / "big.json").write_bytes(bytes(100))
    monkeypatch.setattr(imports, "SIZE_LIMIT", 99)
    cases = {"two.jsonl": "holds 2 conversations", "big.json": "is larger than", ".": "is a folder"}
    for name, said in {**cases, "none.json": "no such file", "a\0b.json": "null"}.items():
        with pytest.raises(ConversationError, match=said):
            read_export(tmp_path / name)


TREE = st.recursive(
    st.none() | st.integers(-1, 3) | st.sampled_from(["user", "assistant", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
    max_leaves=6,
)
ENTRY = st.dictionaries(st.sampled_from(["id", "parent", "role", "content", "finish", "model", "do"]), TREE)
TOP = st.sampled_from(["messages", "tree", "head", "first", "summary", "system", "facts"])


@FREE
@given(content=st.dictionaries(TOP, TREE | st.lists(ENTRY, max_size=4)) | TREE, own=st.booleans())
def test_any_json_is_read_or_refused(tmp_path: Path, content: Any, own: bool) -> None:
    if own and isinstance(content, dict):
        content = {"head": 0, **content, "format": "localmoe conversation export", "version": 1}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    try:
        assert read_export(path).messages
    except ConversationError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_names_of_files_and_of_conversations_are_told_apart() -> None:
    assert is_export("x.json")
    assert is_export("~/A.JSONL")
    assert not is_export("2026-11-21-1705-what")
