"""Commands that go back and forth in a conversation, change what the model sees of it, or start another one."""

from __future__ import annotations

from functools import partial

from localmoe.conversation.tree import Conversation, Message
from localmoe.errors import SettingError
from localmoe.repl.commands.table import command
from localmoe.repl.talk import Talk

SHOWN = 60  # characters of a message in a list


@command("clear", help="start a new conversation; system prompt and settings stay", aliases=("new",))
def clear(talk: Talk, argument: str) -> None:
    talk.start_anew()


@command("regen", help="answer the last message again, on a branch of its own; a fixed seed gives the same answer")
def regenerate(talk: Talk, argument: str) -> None:
    talk.answer(talk.session.regenerate)


@command(
    "edit", help="change a message of yours (the last one, or N of /history) and branch from there", usage="[N] [text]"
)
def edit(talk: Talk, argument: str) -> None:
    questions = asked(talk.session.conversation)
    word, _, text = argument.partition(" ")
    number = len(questions)
    if word.isdecimal():
        number = chosen_of(word, len(questions), "message of yours")
    elif argument:
        text = argument
    if not questions:
        raise SettingError("there is no message yet to edit")
    message = questions[number - 1]
    text = text.strip() or _typed_anew(talk, message.content)
    if not text:
        talk.screen.notice("(not changed)")
    else:
        talk.answer(partial(talk.session.edit, message, text))


@command("undo", help="take back the last message and its answer; /branch still lists them")
def undo(talk: Talk, argument: str) -> None:
    conversation = talk.session.conversation
    questions = asked(conversation)
    if not questions:
        raise SettingError("there is nothing to take back")
    conversation.move(questions[-1].parent)
    talk.screen.notice(f"(taken back: {brief(questions[-1].content)})")


@command("history", help="the messages of this branch, with the numbers that /edit takes", usage="[N]")
def history(talk: Talk, argument: str) -> None:
    conversation = talk.session.conversation
    path = conversation.path()
    if not path:
        raise SettingError("nothing has been said yet")
    number, hidden, rows = 0, conversation.trimmed, []
    for place, message in enumerate(path):
        number += message.role == "user"
        label = str(number) if message.role == "user" else ""
        rows.append((label, brief(message.content) if place >= hidden else f"[not seen] {brief(message.content)}"))
    count = chosen_of(argument, len(rows), "messages") if argument else len(rows)
    talk.screen.rows(rows[-count:])


@command("branch", help="list the branches of this conversation, or go on with one of them", usage="[N]")
def branch(talk: Talk, argument: str) -> None:
    conversation = talk.session.conversation
    leaves = conversation.leaves()
    if not leaves:
        raise SettingError("nothing has been said yet")
    if argument:
        leaf = leaves[chosen_of(argument, len(leaves), "branch") - 1]
        conversation.move(leaf.id)
        talk.show_last()
        return
    here = {message.id for message in conversation.path()}
    rows = []
    for number, leaf in enumerate(leaves, 1):
        path = conversation.path(leaf.id)
        parting = next((message for message in path if message.id not in here), leaf)
        mark = "*" if leaf.id == conversation.head else ""
        rows.append((f"{number}{mark}", f"{len(path)} messages", brief(parting.content) or "(empty)"))
    talk.screen.rows(rows)


@command("trim", help="the model no longer sees the oldest N questions and their answers", usage="N")
def trim(talk: Talk, argument: str) -> None:
    conversation = talk.session.conversation
    seen = [message for message in conversation.seen() if message.role == "user"]
    if not argument:
        hidden = sum(message.role == "user" for message in conversation.path()) - len(seen)
        talk.screen.line(
            f"{hidden} of {hidden + len(seen)} questions are not seen by the model; /trim N leaves out N more"
        )
        return
    if len(seen) < 2:
        raise SettingError("there is only one question to see: nothing can be left out")
    count = chosen_of(argument, len(seen) - 1, "of the questions that may go")
    conversation.trim(seen[count].id, conversation.summary_seen)
    talk.screen.notice(f"({count} left out; {len(seen) - count} are seen)")


@command("summary", help="have the model sum up all but the last question, to see that instead")
def summary(talk: Talk, argument: str) -> None:
    conversation, before = talk.session.conversation, talk.session.conversation.trimmed
    talk.answer(talk.session.summarise)
    if conversation.trimmed > before:
        talk.screen.notice(f"(the model sees this in the place of {conversation.trimmed} messages)")


def _typed_anew(talk: Talk, text: str) -> str:
    """The text as the user changes it; empty where it stays."""
    if talk.reader is None:
        return ""
    try:
        typed = talk.reader.read(text).strip()
    except (EOFError, KeyboardInterrupt):
        return ""
    return "" if typed == text.strip() else typed


def asked(conversation: Conversation) -> list[Message]:
    """The user's messages of the branch."""
    return [message for message in conversation.path() if message.role == "user"]


def brief(text: str) -> str:
    words = " ".join(text[: 4 * SHOWN].split())
    return words if len(words) <= SHOWN else words[: SHOWN - 1] + "…"


def chosen_of(text: str, most: int, what: str) -> int:
    """A number from 1 to `most`; SettingError says what else was found."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or not 1 <= int(text) <= most:
        raise SettingError(f"{what} is a number from 1 to {most}, not {text[:40]!r}")
    return int(text)
