"""Typing: what Tab offers, pasted text, the editor, searching back, and the history that chats share."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from localmoe.repl import history
from localmoe.repl.completion import SlashCompleter
from localmoe.repl.history import history_at
from localmoe.repl.input import TerminalReader, continuation

COMMANDS = {"set": "change settings", "system": "", "read": "attach", "load": "go on with another"}
WORDS = {
    "set": ["temperature", "temperature 0.7", "top_p", "top_p 0.9", "top_k", "top_k 40"],
    "load": ["my talk", "my other talk", "yours"],
}


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def offered(typed: str) -> list[str]:
    """The lines that Tab can make of `typed`."""
    completer = SlashCompleter(lambda: COMMANDS, lambda name, typed: WORDS.get(name, ()), lambda name: name == "read")
    found = completer.get_completions(Document(typed), CompleteEvent())
    return [typed[: len(typed) + each.start_position] + each.text for each in found]


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("/s", ["/set", "/system"]),
        ("/", ["/set", "/system", "/read", "/load"]),
        ("/set top", ["/set top_p", "/set top_p 0.9", "/set top_k", "/set top_k 40"]),
        ("/set temperature ", ["/set temperature 0.7"]),
        ("/set temperature 0", ["/set temperature 0.7"]),
        ("/set temperature 0.7", []),
        ("/load my", ["/load my talk", "/load my other talk"]),
        ("/load my o", ["/load my other talk"]),
        ("/load  yo", ["/load  yours"]),
        ("/nothing x", []),
        ("hello /s", []),
        ("/set\n", []),
    ],
)
def test_tab_offers_what_may_follow(typed: str, lines: list[str]) -> None:
    assert offered(typed) == lines


def test_tab_offers_files_where_a_command_takes_them(tmp_path: Path) -> None:
    for name in ("one.txt", "two words.txt", "other"):
        (tmp_path / name).touch()
    at = f"/read {tmp_path}{os.sep}"
    assert sorted(offered(at)) == [at + "one.txt", at + "other", at + "two words.txt"]
    assert offered(at + "two w") == [at + "two words.txt"]
    assert offered(f"/read a.txt {tmp_path}{os.sep}on") == [f"/read a.txt {tmp_path}{os.sep}one.txt"]
    assert offered(f"/system {tmp_path}{os.sep}") == []


def paste(text: str) -> str:
    return f"\x1b[200~{text}\x1b[201~"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (paste("one\r\ntwo\n") + "\r", "one\ntwo"),
        (paste("/etc/passwd\nis a file") + "\r", " /etc/passwd\nis a file"),
        (paste("/exit") + "\r", "/exit"),
        (paste("/exit\n") + "\r", "/exit"),
        (paste("make a \\\n  b \\\n") + "\r", "make a \\\n  b \\"),
        (paste('"""doc\nstring') + "\r", '"""doc\nstring'),
        ("what is " + paste("a\nb") + "?\r", "what is a\nb?"),
        ('"""' + paste("a\n\nb") + '"""\r', "a\n\nb"),
        (paste("a\nb") + "\x03c\\\rd\r", "c\nd"),
    ],
)
def test_a_pasted_text_is_one_message_as_it_is(keys: PipeInput, typed: str, message: str) -> None:
    keys.send_text(typed)
    assert TerminalReader().read() == message


def test_after_a_pasted_message_backslashes_have_their_meaning_again(keys: PipeInput) -> None:
    keys.send_text(paste("a \\\nb") + "\r" + "c\\\rd\r")
    reader = TerminalReader()
    assert [reader.read(), reader.read()] == ["a \\\nb", "c\nd"]


@pytest.mark.skipif(os.name == "nt", reason="a shell script is the editor")
@pytest.mark.parametrize("key", ["\x18\x05", "\x1be"], ids=["ctrl-x ctrl-e", "esc e"])
def test_the_editor_opens_what_was_typed(
    keys: PipeInput, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\ncase "$1" in *.md) echo "and more" >> "$1";; esac\n')
    editor.chmod(0o700)
    monkeypatch.setenv("EDITOR", str(editor))
    monkeypatch.delenv("VISUAL", raising=False)
    reader = TerminalReader()
    buffer = reader._session.default_buffer
    buffer.on_text_changed += lambda _: keys.send_text("\r") if "more" in buffer.text else None
    keys.send_text("hello\x1b\r" + key)
    assert reader.read() == "hello\nand more"


def test_a_line_that_is_merely_wrapped_looks_unlike_a_new_one() -> None:
    assert [continuation(4, 1, wraps) for wraps in (0, 1, 2)] == ["... ", "    ", "    "]


def test_ctrl_r_searches_back(keys: PipeInput) -> None:
    reader = TerminalReader()
    for text in ("first question", "second one"):
        reader._session.history.append_string(text)
    buffer, typed = reader._session.default_buffer, ["\x12first\r\r"]
    # The history comes in the background; a person would see it before typing.
    reader._session.app.after_render += lambda _: (
        typed and len(buffer._working_lines) == 3 and keys.send_text(typed.pop())
    )
    keys.send_text("x\x7f")
    assert reader.read() == "first question"


def test_ctrl_z_suspends_the_chat() -> None:
    assert TerminalReader()._session.enable_suspend


def kept(path: Path) -> list[str]:
    """The newest first."""
    return list(history_at(path).load_history_strings())


def test_chats_share_their_history_and_nothing_stands_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "history"
    one, other = history_at(path), history_at(path)
    for text in ("a", "b", "a"):
        one.append_string(text)
    other.append_string("b\nc")
    other.append_string("b")
    assert kept(path) == ["b", "b\nc", "a"]
    assert one.get_strings() == ["b", "a"]


def test_a_long_history_is_cut_to_its_newest_part_when_a_chat_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "LARGEST_FILE", 2000)
    path = tmp_path / "history"
    for number in range(100):
        history_at(path).store_string(f"question {number}\nüber mehrere")
    assert path.stat().st_size <= 2100
    found = kept(path)
    assert found == [f"question {number}\nüber mehrere" for number in range(99, 99 - len(found), -1)]
    assert len(found) > 10
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["history"]


def test_a_huge_message_is_remembered_until_the_chat_ends(tmp_path: Path) -> None:
    one = history_at(tmp_path / "history")
    one.append_string("x" * 100_000)
    assert len(one.get_strings()) == 1
    assert kept(tmp_path / "history") == []


def test_a_full_disk_ends_no_chat(tmp_path: Path) -> None:
    one = history_at(tmp_path / "history")
    (tmp_path / "history").unlink()
    (tmp_path / "history").mkdir()
    one.append_string("a")
    assert one.get_strings() == ["a"]
    assert list(one.load_history_strings()) == []
    assert isinstance(history_at(tmp_path / "history"), InMemoryHistory)
