"""Commands about what the model is told: template, thinking, tokens, context, files that go along."""

from __future__ import annotations

from localmoe.errors import SettingError
from localmoe.repl.attachments import read_files
from localmoe.repl.changing import change_template
from localmoe.repl.commands.branches import brief
from localmoe.repl.commands.table import command
from localmoe.repl.talk import Talk
from localmoe.session import OVERFLOWS
from localmoe.template import choices
from localmoe.thinking import USAGE

MOST_EXAMINED, BETWEEN_TOKENS = 400, "\u2502"  # tokens of a prompt that the doctor shows
MOST_TOKENS = 4096  # that /tokens shows


@command(
    "think", help="whether the model reasons before it answers, how long, and whether that is shown", usage=f"[{USAGE}]"
)
def think(talk: Talk, argument: str) -> None:
    session, screen = talk.session, talk.screen
    if argument in ("show", "hide"):
        screen.shows_reasoning = argument == "show"
        thought = screen.thought if screen.shows_reasoning else None
        if thought:
            screen.show_reasoning(thought)
        screen.notice(f"(reasoning is {'shown' if screen.shows_reasoning else 'folded'} from now on)")
    elif argument:
        session.think(argument)
        screen.notice(f"(thinking: {session.thinking})")
    else:
        markers = (
            "none: this model's template has no reasoning"
            if session.reasoning is None
            else " … ".join(session.reasoning)
        )
        screen.rows([("thinking", str(session.thinking)), ("markers", markers)])


@command(
    "tokens", help="a text as tokens, or tokens as text: /tokens some words, /tokens [1, 2, 3]", usage="TEXT|[IDS]"
)
def tokens(talk: Talk, argument: str) -> None:
    tokenizer = talk.session.model.tokenizer
    if not argument:
        raise SettingError("/tokens takes a text, or ids in brackets: /tokens [1, 2, 3]")
    ids = ids_of(argument)
    if ids is None:
        ids = tokenizer.encode(argument, bos=False)
    elif wrong := [id for id in ids if id >= tokenizer.vocabulary_size]:
        raise SettingError(f"there is no token {wrong[0]}: ids are from 0 to {tokenizer.vocabulary_size - 1}")
    for id in ids[:MOST_TOKENS]:
        told = f"{id:>7}  {tokenizer.token(id)!r}" + ("  special" if tokenizer.is_special(id) else "")
        talk.screen.line(told)
    talk.screen.notice(f"({len(ids)} tokens)")


def ids_of(text: str) -> list[int] | None:
    """The ids in brackets, None where the text is no such list."""
    inside = text.removeprefix("[").removesuffix("]").replace(",", " ").split()
    if (
        len(text) < 2
        or text[0] + text[-1] != "[]"
        or not all(w.isascii() and w.isdecimal() and len(w) < 10 for w in inside)
    ):
        return None
    return [int(word) for word in inside]


@command(
    "ctx",
    help="how full the context is; what happens when it is: stop, drop the oldest turns, or shift",
    usage=f"[{'|'.join(OVERFLOWS)}]",
    complete=lambda talk, typed: OVERFLOWS,
)
def context(talk: Talk, argument: str) -> None:
    session = talk.session
    if argument:
        session.set_overflow(argument)
        talk.screen.notice(f"(when the context is full: {session.overflow})")
        return
    whole, used = session.model.context, len(session.tokens())
    hidden = session.conversation.trimmed
    rows = [
        (
            "context",
            f"{used} of {whole} tokens, {100 * used / whole:.0f} %; {max(whole - used, 0)} left",
        ),
        ("cached", f"{session.used_tokens} tokens have been read and need not be read again"),
        ("when full", session.overflow),
    ]
    if hidden:
        rows.append(("not seen", f"{hidden} messages" + (", summed up" if session.conversation.summary else "")))
    if talk.attachments:
        rows.append(
            ("attached", f"{talk.attached_tokens} tokens in {len(talk.attachments)} files, for the next message")
        )
    talk.screen.rows(rows)


@command("read", help="put files before your next message; * and ** match many", usage="[FILE|GLOB|none]", paths=True)
def read(talk: Talk, argument: str) -> None:
    if argument == "none":
        talk.attachments.clear()
        talk.screen.notice("(nothing attached)")
        return
    if not argument:
        if not talk.attachments:
            raise SettingError("/read takes a file or a pattern; nothing is attached so far")
        talk.screen.rows((each.name, f"{talk.tokens_in(each)} tokens") for each in talk.attachments)
        return
    found = read_files(argument)
    talk.attach(found)
    names = brief(", ".join(each.name for each in found))
    talk.screen.notice(f"(with your next message: {names}; {talk.attached_tokens} tokens attached)")


@command("paste", help="type or paste a message of many lines; a line /end (or Ctrl+D) ends it")
def paste(talk: Talk, argument: str) -> None:
    try:
        text = talk.reader.read_block() if talk.reader else ""
    except KeyboardInterrupt:
        text = ""
    if text.strip():
        talk.say(text)
    else:
        talk.screen.notice("(nothing pasted)")


@command(
    "template",
    help="show, check or change the chat template",
    usage="[NAME|FILE|own|show|doctor]",
    complete=lambda talk, typed: ("own", "show", "doctor", *choices()),
    paths=True,
)
def template(talk: Talk, argument: str) -> None:
    if not argument:
        now = talk.session.template.name
        talk.screen.rows([("template", now), ("possible", "own, a file, " + ", ".join(choices()))])
    elif argument == "show":
        talk.screen.notice(talk.session.template.name)
        talk.screen.line(talk.session.template.source)
    elif argument == "doctor":
        examine_template(talk)
    else:
        change_template(talk, argument)


def examine_template(talk: Talk) -> None:
    """The prompt as the model would get it, token by token, and what is wrong with the template."""
    from localmoe.template_doctor import examine  # late: it is large, and seldom asked for

    session, screen = talk.session, talk.screen
    tokenizer, template = session.model.tokenizer, session.template
    ids = session.tokens()
    if len(ids) > MOST_EXAMINED:
        screen.notice(f"(the last {MOST_EXAMINED} of {len(ids)} tokens)")
    if ids:
        text = BETWEEN_TOKENS.join(tokenizer.token(id) for id in ids[-MOST_EXAMINED:])
        screen.line(text.replace("\n" + BETWEEN_TOKENS, "\n").rstrip("\n"))
        screen.line()
    architecture = talk.models.current.architecture if talk.models else ""
    own = session.model.template if session.given_template and session.model.has_template else None
    found = examine(tokenizer, template, own.source if own else None, architecture)
    screen.rows((each.severity, f"{each.text}{': ' if each.advice else ''}{each.advice}") for each in found)
    worst = [each for each in found if each.severity != "note"]
    screen.notice(f"({template.name}: {f'{len(worst)} to look at' if worst else 'nothing is wrong'})")
