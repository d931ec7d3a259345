"""Commands about which model answers."""

from __future__ import annotations

from collections.abc import Iterable

from localmoe.repl import changing
from localmoe.repl.commands.table import command
from localmoe.repl.talk import Interrupt, Talk


def names(talk: Talk, typed: str) -> Iterable[str]:
    return talk.catalogue.names()


@command(
    "model",
    help="list the models found, or go on with another one; the conversation stays",
    usage="[PATH|NAME]",
    complete=names,
    paths=True,
)
def model(talk: Talk, argument: str) -> None:
    if argument:
        changing.change_model(talk, argument)
        return
    screen = talk.screen
    with screen.progress("looking for models") as bar, Interrupt.watched():
        header, rows, remarks = talk.catalogue.rows(screen.width, bar)
    screen.notice(f"(answering: {talk.model_told})")
    screen.rows(rows, header)
    for remark in remarks:
        screen.notice(f"({remark})")


@command("reopen", help="open the model anew, as after its file changed; the conversation stays")
def reopen(talk: Talk, argument: str) -> None:
    changing.reopen(talk)
