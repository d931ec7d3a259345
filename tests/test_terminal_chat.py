"""Every slash command, typed at a terminal: `localmoe chat` in a process of its own over a fake model, exact
transcripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pseudo_terminal import PROMPT, Chat

from localmoe.repl.commands import COMMANDS

SETUP = """
import localmoe
import localmoe.cli.conversation
from fakes import FakeModel

def load(path, progress=None, **how):
    code = "*Look*:\\n```py\\nx = 1\\n```"
    fake = FakeModel({"hello": "Hi there.", "bye": "Bye.", "code": code, "nothing else.": "We greeted."})
    fake.path = path
    return fake

localmoe.load = load
localmoe.cli.conversation.kept_state = lambda model, asked: None
"""

# What is typed, and what the screen says to it, dates and speeds masked; None where sizes or lists change.
TRANSCRIPT: list[tuple[str, str | None]] = [
    ("/regen", "there is no answer yet to generate again"),
    ("/undo", "there is nothing to take back"),
    ("/stats", "there is no answer yet to count"),
    ("hello", "Hi there."),
    ("/stats", "prompt   8 tokens, 0 of them kept from before\nreading  8 tokens in TIME\nanswer   10 tokens in TIME\n"
               "context  17 of 512 tokens used"),
    ("/regen", "Hi there."),
    ("/branch", "1   2 messages  Hi there.\n2*  2 messages  Hi there."),
    ("/branch 3", "branch is a number from 1 to 2, not '3'"),
    ("/branch 1", ">>> hello\nHi there."),
    ("/edit 1 bye", "Bye."),
    ("/edit 4 x", "message of yours is a number from 1 to 1, not '4'"),
    ("/history", "1  bye\n   Bye."),
    ("/history x", "messages is a number from 1 to 2, not 'x'"),
    ("code", "Look:\n\nx = 1"),
    ("/markdown off", "(markdown: off)"),
    ("/regen", "*Look*:\n```py\nx = 1\n```"),
    ("/markdown maybe", "/markdown takes on or off, not 'maybe'"),
    ("/summary", "We greeted.\n\n(the model sees this in the place of 2 messages)"),
    ("/trim", "1 of 2 questions are not seen by the model; /trim N leaves out N more"),
    ("/trim 1", "there is only one question to see: nothing can be left out"),
    ("/system be brief", "(system prompt set)"),
    ("/system", "be brief"),
    ('/system ""', "(system prompt removed)"),
    ("/set top_k 7", "(top_k = 7, was 40)"),
    ("/set top_k -1", "top_k is a whole number from 0 up, not '-1'"),
    ("/set topk", "there is no setting 'topk': did you mean top_k?"),
    ("/params", None),
    ("/ctx", "context    81 of 512 tokens, 16 %; 431 left\ncached     TOKENS\nwhen full  stop\n"
             "not seen   2 messages, summed up"),
    ("/ctx shift", "(when the context is full: shift)"),
    ("/ctx maybe", "a full context can stop, drop, shift, not 'maybe'"),
    ("/think on", "the template has no switch for /think on: it has none"),
    ("/think show", "(reasoning is shown from now on)"),
    ("/tokens ab", "    261  'ab'\n(1 tokens)"),
    ("/tokens [999]", "there is no token 999: ids are from 0 to 261"),
    ("/read nothing", "nothing: no such file, and nothing matches it as a pattern"),
    ("/read a.txt", "(with your next message: a.txt; 24 tokens attached)"),
    ("/read none", "(nothing attached)"),
    ("/template", None),
    ("/template nope", None),
    ("/template chatml", "(template: chatml)"),
    ("/template own", "(template: plain)"),
    ("/template doctor", None),
    ("/model", None),
    ("/model nowhere.gguf", "(fake-moe answers from now on: fake · 1.23 MB · context 512)"),
    ("/model nothing like it", "'nothing like it' is neither a file nor a model that is known here; `localmoe\nmodels` "
                               "lists those that are"),
    ("/reopen", "(fake-moe opened anew)"),
    ("/lazy off", "(loading off: as asked; was mmap)"),
    ("/lazy maybe", "there is no loading mode 'maybe'; possible: auto, mmap, slots, off"),
    ("/experts", "nobody counts here which experts are chosen: /lazy slots does, from then on"),
    ("/memory", None),
    ("/save a/b", "'a/b' is no name: '/' cannot be in it (letters, digits, spaces and . _ - are\npossible)"),
    ("/save mine", "(kept as mine)"),
    ("/export talk.md", "(written: talk.md)"),
    ("/export talk.md", "talk.md is there already: /export --force talk.md overwrites it"),
    ("/export talk.doc", "talk.doc: a conversation is exported to a name that ends in .md, .markdown,\n"
                         ".json or .jsonl, not .doc"),
    ("/clear", "(a new conversation; /load mine goes back)"),
    ("/list", "mine  WHEN  8 messages · hello"),
    ("/load nobody", "there is no conversation 'nobody': /list shows what is saved"),
    ("/load mine", ">>> code\n*Look*:\n```py\nx = 1\n```"),
    ("/delete mine", "mine is this conversation: /clear leaves it first"),
    ("/clear", "(a new conversation; /load mine goes back)"),
    ("/delete mine", "(mine deleted)"),
    ("/list", "no conversation is kept yet"),
    ("/help regen", "/regen  answer the last message again, on a branch of its own; a fixed seed\n"
                    "        gives the same answer"),
    ("/help me", "there is no command /me: did you mean /memory? (a message may begin with a slash\nafter a space)"),
    ("/nothing", "there is no command /nothing: did you mean /think? (a message may begin with a\n"
                 "slash after a space)"),
]  # fmt: skip


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Chat]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with Chat("fake.gguf", setup=SETUP, COLUMNS="80", XDG_STATE_HOME=str(tmp_path), NO_COLOR="1") as found:
        yield found


def masked(text: str) -> str:
    text = re.sub(r"[\d.]+ s, [\d.]+ tokens/s", "TIME", text)
    text = re.sub(r"\d\d:\d\d(?= )", "WHEN", text)
    text = re.sub(r"\d+ tokens have been read and need not be read again", "TOKENS", text)
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def test_every_command_answers_good_and_bad_input(chat: Chat) -> None:
    for typed, expected in TRANSCRIPT:
        if expected and expected.startswith(PROMPT):  # what looks like a prompt is none
            chat.say(typed)
            found = masked(chat.until("\n\n" + PROMPT).removesuffix(PROMPT).removeprefix(typed + "\n"))
        else:
            found = masked(chat.ask(typed))
        assert found, typed
        assert "bug" not in found, (typed, found)
        if expected is not None:
            assert found == expected, typed
    assert chat.leave() == 0
    used = {typed.split()[0].lstrip("/") for typed, _ in TRANSCRIPT if typed.startswith("/")}
    assert used | {"exit", "paste"} >= set(COMMANDS)


def test_many_lines_are_typed_as_one_message(chat: Chat) -> None:
    chat.press("/paste\r")
    chat.until("... ")
    chat.press("first\rhello\r/end\r")
    assert "Hi there." in chat.until("\n>>> ")
    assert "first" in chat.ask("/history")
