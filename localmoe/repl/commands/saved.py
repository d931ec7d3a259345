"""Commands about conversations as a whole: they are kept as they go, and these name, find, export and delete them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime

from localmoe.conversation.export import export
from localmoe.conversation.imports import is_export, read_export
from localmoe.conversation.library import Library
from localmoe.conversation.tree import Conversation
from localmoe.errors import ConversationError, LocalMoeError, SettingError
from localmoe.repl.commands.branches import chosen_of
from localmoe.repl.commands.table import command
from localmoe.repl.models import Kept, OpenedModel
from localmoe.repl.talk import Talk
from localmoe.session import Session
from localmoe.template_fit import open_template

FORCE = "--force "
SHOWN = 30  # conversations in a list without a number


def names(talk: Talk, typed: str) -> Iterable[str]:
    return talk.library.names() if talk.library else ()


@command("save", help="name this conversation; it is kept as it goes in any case", usage="[NAME]")
def save(talk: Talk, argument: str) -> None:
    if talk.saved is None:
        raise SettingError("this chat has no place where conversations are kept")
    if argument:
        talk.saved.rename(argument)
    talk.tell_news()
    if not talk.saved.keep:
        talk.screen.notice("(nothing of this is kept; /save NAME keeps it)")
    elif not talk.saved.name:
        talk.screen.notice("(kept from its first message on; /save NAME names it)")
    elif talk.saved.in_memory:
        raise SettingError(f"{talk.saved.name} could not be written: {talk.saved.problem}")
    else:
        talk.screen.notice(f"(kept as {talk.saved.name})")


@command(
    "load",
    help="go on with another conversation, kept or exported as JSON",
    usage="NAME|FILE.json",
    complete=names,
    paths=True,
)
def load(talk: Talk, argument: str) -> None:
    if not argument:
        raise SettingError("/load takes the name of a conversation; /list shows them")
    if talk.library is None:
        raise SettingError("this chat has no place where conversations are kept")
    if is_export(argument):
        talk.go_to(talk.library.open_new(conversation=read_export(argument)))
    else:
        name = talk.library.find(argument)
        if talk.saved and name == talk.saved.name:
            raise ConversationError(f"{name} is this conversation")
        talk.go_to(talk.library.open_named(name))
    talk.show_last()


@command("list", help="the conversations that are kept, the last one first", usage="[N]", aliases=("ls",))
def show_list(talk: Talk, argument: str) -> None:
    found = talk.library.listing() if talk.library else []
    if not found:
        raise SettingError("no conversation is kept yet")
    count = chosen_of(argument, len(found), "conversations") if argument else SHOWN
    here = talk.saved.name if talk.saved else ""
    rows = []
    for each in found[:count]:
        told = each.problem or f"{each.messages} messages · {each.title}"
        rows.append((each.name + ("*" if each.name == here else ""), when(each.changed), told))
    talk.screen.rows(rows)
    if len(found) > count:
        talk.screen.notice(f"({len(found) - count} older ones; /list {len(found)} shows all)")


@command(
    "export",
    help="write the conversation into a file: .md, .json (all branches), .jsonl",
    usage="[--force] FILE",
    paths=True,
)
def write_export(talk: Talk, argument: str) -> None:
    force = argument.startswith(FORCE)
    path = argument.removeprefix(FORCE).strip()
    if not path:
        raise SettingError("/export takes the name of a file that ends in .md, .json or .jsonl")
    saved, session = talk.saved, talk.session
    name, created = (saved.name, saved.created) if saved else ("", "")
    written = export(
        path, session.conversation, name=name, created=created, reasoning=session.reasoning, overwrite=force
    )
    talk.screen.notice(f"(written: {written})")


@command("delete", help="delete a conversation that is kept", usage="NAME", complete=names)
def delete(talk: Talk, argument: str) -> None:
    if not argument or talk.library is None:
        raise SettingError("/delete takes the name of a conversation; /list shows them")
    if talk.saved and argument == talk.saved.name:
        raise SettingError(f"{argument} is this conversation: /clear leaves it first")
    elsewhere = forget(talk, talk.library, argument)
    talk.library.delete(argument)
    talk.tell_news()
    talk.screen.notice(f"({argument} deleted)")
    if elsewhere:
        talk.screen.notice(
            f"(what {', '.join(elsewhere)} kept of having read it stays on disk until room is needed: not open now)"
        )


def forget(talk: Talk, library: Library, name: str) -> list[str]:
    """Remove what the models that are open have kept of having read the conversation; the names of others that answered
    in it."""
    if talk.models is None or name not in library.names():
        return []
    try:
        saved = library.open_named(name)
        saved.close()
    except LocalMoeError:  # what cannot be read can be deleted all the same
        return []
    conversation = saved.conversation
    named = conversation.facts.get("template")
    for model in talk.models.all:
        if kept := talk.models.kept(model):
            for template in (None, named) if isinstance(named, str) else (None,):
                forget_read(kept, model, template, conversation)
    answered = {message.model for message in conversation.messages.values() if message.model}
    return sorted(answered - {model.name for model in talk.models.all}) if talk.models.kept(talk.models.current) else []


def forget_read(kept: Kept, model: OpenedModel, template: str | None, conversation: Conversation) -> None:
    """Remove what is kept of every branch as the template of that name, or the model's own, gives it to the model."""
    with suppress(LocalMoeError):  # there is no such template: then nothing was read by it
        chosen = open_template(model.tokenizer, template) if template else None
        session = Session(model, chosen, conversation=conversation)
        session.recall()
        for tokens in session.branches():
            kept.forget(tokens)


def when(then: datetime) -> str:
    """Short and local: the time of today, else the day."""
    return then.strftime("%H:%M" if then.date() == datetime.now().date() else "%Y-%m-%d")
