"""Slash commands about conversations as a whole, and the flags that go on with one: transcripts over a fake model."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel
from rich.console import Console
from test_cli import call, model, pipe_in  # noqa: F401 - a fixture

from localmoe.conversation.library import Library
from localmoe.repl.input import LineReader
from localmoe.repl.loop import converse
from localmoe.repl.models import OpenModels
from localmoe.repl.render import Screen
from localmoe.repl.talk import Talk
from localmoe.session import Session

REPLIES = {"hello": "Hi there.", "bye": "Bye.", "text": "Text."}


class Chat:
    """Chats of one user, whose conversations lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.library = Library(folder)
        self.kept: Any = None
        self.name = "fake-moe"

    def __call__(self, *lines: str, keep: bool = True) -> list[str]:
        """The screen, dates masked."""
        console = Console(file=io.StringIO(), width=80, highlight=False, color_system=None)
        fake = self.model(Path("first.gguf"))
        saved = self.library.open_new(keep=keep)
        talk = Talk(
            Session(fake, conversation=saved.conversation),
            Screen(console, console),
            OpenModels(fake, lambda path, loading: self.model(path), lambda _: self.kept),
            library=self.library,
            saved=saved,
        )
        converse(talk, LineReader(io.StringIO("".join(line + "\n" for line in lines))))
        talk.close()
        self.messages = [message.content for message in talk.session.conversation.path()]
        told = re.sub(r"\d{4}-\d\d-\d\d-\d{4}", "DATE", console.file.getvalue())
        return [line.rstrip() for line in re.sub(r"\d\d:\d\d", "TIME", told).splitlines()]

    def model(self, path: Path) -> FakeModel:
        found = FakeModel(REPLIES)
        found.name, found.path = self.name, path
        return found


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    return Chat(tmp_path / "kept")


def test_a_conversation_is_kept_under_its_first_words_until_it_has_a_name(chat: Chat) -> None:
    assert chat("/save", "hello", "/save", "/save first talk", "/save", "/list") == [
        "(kept from its first message on; /save NAME names it)",
        "Hi there.",
        "",
        "(kept as DATE-hello)",
        "(kept as first talk)",
        "(kept as first talk)",
        "first talk*  TIME  2 messages · hello",
    ]
    assert chat.library.names() == ["first talk"]


def test_another_conversation_goes_on_and_the_first_one_stays(chat: Chat) -> None:
    told = chat("hello", "/save one", "/clear", "bye", "/save two", "/load one", "text", "/load two", "/list")
    assert told == [
        "Hi there.",
        "",
        "(kept as one)",
        "(a new conversation; /load one goes back)",
        "Bye.",
        "",
        "(kept as two)",
        ">>> hello",
        "Hi there.",
        "",
        "Text.",
        "",
        ">>> bye",
        "Bye.",
        "",
        "one   TIME  4 messages · hello",
        "two*  TIME  2 messages · bye",
    ]
    assert chat.messages == ["bye", "Bye."]


def test_what_is_not_there_or_no_name_is_told(chat: Chat) -> None:
    chat("hello", "/save one")
    told = chat("/load", "/load nobody", "/save a/b", "hello", "/save one", "/load two", "/delete", "/delete two")
    assert told == [
        "/load takes the name of a conversation; /list shows them",
        "there is no conversation 'nobody': /list shows what is saved",
        "'a/b' is no name: '/' cannot be in it (letters, digits, spaces and . _ - are",
        "possible)",
        "Hi there.",
        "",
        "one is in use: choose another name, or /delete one first",
        "there is no conversation 'two': /list shows what is saved",
        "/delete takes the name of a conversation; /list shows them",
        "there is no conversation 'two': /list shows what is saved",
    ]


def test_who_only_looks_at_a_conversation_changes_nothing(chat: Chat) -> None:
    chat("/set top_k 3", "hello", "/save one")
    before = chat.library.open_named("one")
    facts = dict(before.conversation.facts)
    before.close()
    told = chat("/set top_k 9", "bye", "/load o", "/list 3")
    assert told[-1] == "conversations is a number from 1 to 2, not '3'"
    after = chat.library.open_named("one")
    assert after.conversation.facts == facts
    after.close()
    assert chat("/load one", "/load on")[-1] == "one is this conversation"


def test_a_conversation_is_deleted_but_not_the_one_that_goes_on(chat: Chat) -> None:
    chat("hello", "/save one")
    told = chat("bye", "/save two", "/delete two", "/delete one", "/list")
    assert told[3:] == [
        "two is this conversation: /clear leaves it first",
        "(one deleted)",
        "two*  TIME  2 messages · bye",
    ]


class Kept:
    """What would keep a model's state; `forgotten` are the texts of which it was to keep nothing."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def forget(self, tokens: list[int]) -> int:
        self.forgotten.append("".join(map(FakeModel().tokenizer.token, tokens)))
        return 1

    def keep(self, *, done: bool) -> None: ...
    def restore(self, tokens: list[int]) -> int:
        return len(tokens)

    def take_messages(self) -> list[str]:
        return []

    def close(self) -> None: ...


def test_of_a_deleted_conversation_the_model_keeps_nothing(chat: Chat) -> None:
    chat("hello", "/edit 1 bye", "/save one")
    chat.kept = Kept()
    assert chat("/delete one") == ["(one deleted)"]
    assert chat.kept.forgotten == [
        "<|user|>hello<|end|><|assistant|>Hi there.<|end|><|assistant|>",
        "<|user|>bye<|end|><|assistant|>Bye.<|end|><|assistant|>",
    ]


def test_of_a_deleted_conversation_nothing_stays_that_was_read_by_another_template_or_a_model_left_open(
    chat: Chat, tmp_path: Path
) -> None:
    chat("/template chatml", "hello", "/save one")
    chat("hello", "/save two")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    chat.kept, own = Kept(), "<|user|>hello<|end|><|assistant|>Hi there.<|end|><|assistant|>"
    assert chat("/delete one") == ["(one deleted)"]
    assert [text[: text.index("hello")] for text in chat.kept.forgotten] == ["<|user|>", "<|im_start|>user\n"]
    chat.kept = Kept()
    chat(f"/model {tmp_path / 'other.gguf'}", "/delete two")
    assert chat.kept.forgotten == [own, own], "of both models"


def test_of_a_deleted_conversation_it_is_told_which_models_may_have_kept_something(chat: Chat) -> None:
    chat("hello", "/save one")
    chat.name, chat.kept = "another", Kept()
    assert chat("/delete one") == [
        "(one deleted)",
        "(what fake-moe kept of having read it stays on disk until room is needed: not",
        "open now)",
    ]


def test_nothing_is_listed_before_anything_is_kept(chat: Chat) -> None:
    assert chat("/list") == ["no conversation is kept yet"]


def test_a_private_conversation_is_kept_when_it_is_named(chat: Chat) -> None:
    assert chat("hello", "/save", keep=False)[-1] == "(nothing of this is kept; /save NAME keeps it)"
    assert chat.library.names() == []
    chat("hello", "/save mine", "bye", keep=False)
    assert chat.library.names() == ["mine"]
    assert len(chat.library.open_named("mine").conversation.messages) == 4


def test_export_and_back(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = chat("/export talk.md", "hello", "/export", "/export talk.md", "/export talk.md", "/export --force talk.md",
                "/export talk.json", "/export talk.pdf", "/export nowhere/talk.md")  # fmt: skip
    assert told[0] == "there is nothing to export yet"
    assert told[3:] == [
        "/export takes the name of a file that ends in .md, .json or .jsonl",
        "(written: talk.md)",
        "talk.md is there already: /export --force talk.md overwrites it",
        "(written: talk.md)",
        "(written: talk.json)",
        "talk.pdf: a conversation is exported to a name that ends in .md, .markdown,",
        ".json or .jsonl, not .pdf",
        "nowhere/talk.md: there is no folder nowhere",
    ]
    assert "Hi there." in Path("talk.md").read_text()
    assert json.loads(Path("talk.json").read_text())["messages"][1]["content"] == "Hi there."
    assert chat("/load talk.json", "bye") == [">>> hello", "Hi there.", "", "Bye.", ""]
    assert chat.messages == ["hello", "Hi there.", "bye", "Bye."]


def test_a_full_disk_is_told_once_and_the_chat_goes_on(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    told = chat("hello", "bye", "/save mine")
    monkeypatch.undo()
    assert told == [
        "Hi there.",
        "conversations: no space left on device: this conversation goes on in memory only",
        "",
        "Bye.",
        "",
        "mine could not be written: conversations: no space left on device: this",
        "conversation goes on in memory only",
    ]


def settled(fake: FakeModel, tmp_path: Path) -> None:
    """A model whose file is there."""
    fake.path = tmp_path / "fake.gguf"
    fake.path.touch()
    fake.replies = REPLIES


def test_the_last_conversation_is_continued_with_its_model_and_settings(
    model: FakeModel,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settled(model, tmp_path)
    pipe_in(monkeypatch, "hello\n/set top_k 3\n/ctx drop\n")
    assert call("chat", str(model.path)) == 0
    capsys.readouterr()
    pipe_in(monkeypatch, "/set top_k\n/ctx\nbye\n/history\n")
    assert call("chat", "--continue") == 0
    told = capsys.readouterr().out
    assert model.opened["path"] == model.path
    assert ">>> hello\nHi there.\n" in told
    assert "top_k = 3" in told
    assert "when full  drop" in told
    assert told.rstrip().endswith("Bye.")
    pipe_in(monkeypatch, "/history\n")
    assert call("chat", "--continue", "--top-k", "7") == 0
    assert "2  bye" in capsys.readouterr().out


def test_a_conversation_goes_on_in_the_context_that_it_was_led_in(
    model: FakeModel,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settled(model, tmp_path)
    pipe_in(monkeypatch, "hello\n")
    assert call("chat", str(model.path), "--context", "9000", "--kv", "q8_0") == 0
    pipe_in(monkeypatch, "hello\n")
    assert call("chat", "--continue", "--kv", "f32") == 0
    assert (model.opened["context"], model.opened["kv_format"], model.opened["quantize"]) == (9000, "f32", None)
    pipe_in(monkeypatch, "/clear\nhello\n")
    assert call("chat", "--continue") == 0
    assert (model.opened["context"], model.opened["kv_format"]) == (9000, "f32")
    pipe_in(monkeypatch, "hello\n")
    assert call("chat", "--continue") == 0
    assert model.opened["context"] == 9000, "of the conversation that was begun behind /clear"


@pytest.mark.parametrize(
    "opening", [7, {"context": "x", "kv_format": [1], "quantize": 3}, {"context": -1, "kv_format": "q9"}]
)
def test_a_strange_opening_counts_as_none(
    model: FakeModel,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    opening: object,
) -> None:
    settled(model, tmp_path)
    saved = Library().open_new()
    saved.conversation.add("hello")
    saved.conversation.note(model=str(model.path), opening=opening)
    saved.close()
    pipe_in(monkeypatch, "hello\n")
    assert call("chat", "--continue") == 0
    assert (model.opened["context"], model.opened["kv_format"], model.opened["quantize"]) == (None, "f16", None)


def test_a_conversation_is_resumed_by_its_name(
    model: FakeModel,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settled(model, tmp_path)
    pipe_in(monkeypatch, "hello\n/save mine\n/clear\nbye\n")
    assert call("chat", str(model.path)) == 0
    pipe_in(monkeypatch, "text\n/history\n")
    assert call("chat", "--resume", "mine") == 0
    assert "1  hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--continue"], "there is no conversation yet to go on with"),
        (["--resume", "nobody"], "there is no conversation 'nobody'"),
        (["--resume", "x", "--continue"], "--continue and --resume exclude each other"),
        (["--no-save", "--continue"], "--no-save is for new conversations"),
        (["--overflow", "forget"], "forget"),
        (["--think", "hard"], "/think takes on, off"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    model: FakeModel,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    pipe_in(monkeypatch, "")
    assert call("chat", *words) == 2
    assert told in capsys.readouterr().err


def test_reasoning_may_be_shown_from_the_start(
    model: FakeModel,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe_in(monkeypatch, "hello\n")
    assert call("chat", "--think", "show") == 0
    assert "reasoning is shown from now on" in "".join(capsys.readouterr())


def test_a_model_that_is_gone_is_named(
    model: FakeModel,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settled(model, tmp_path)
    pipe_in(monkeypatch, "hello\n/save mine\n")
    assert call("chat", str(model.path)) == 0
    model.path.unlink()
    assert call("chat", "--continue") == 2
    assert f"mine: was led with {model.path}, which is not there any more; name a model" in capsys.readouterr().err


def test_nothing_is_kept_when_it_is_not_wanted(
    model: FakeModel,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe_in(monkeypatch, "hello\n/list\n")
    assert call("chat", "x.gguf", "--no-save") == 0
    assert "no conversation is kept yet" in capsys.readouterr().err
