"""The chat's main loop: read a message or a command, answer, again; must not know how either is drawn or typed."""

from __future__ import annotations

from functools import partial

from localmoe.errors import LocalMoeError
from localmoe.repl.commands import execute
from localmoe.repl.input import Reader
from localmoe.repl.talk import Talk


def converse(talk: Talk, reader: Reader) -> None:
    """Run the chat until /exit, Ctrl+D or two Ctrl+C in a row at an empty prompt."""
    hinted = False
    while talk.open:
        try:
            text = reader.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if hinted:
                return
            talk.screen.notice("(Ctrl+C again, Ctrl+D or /exit to leave)")
            hinted = True
            continue
        hinted = False
        if text.startswith("/"):
            try:
                execute(talk, text)
            except LocalMoeError as error:
                talk.screen.error(str(error))
        elif text.strip():
            talk.answer(partial(talk.session.send, text.strip()))
