"""The chat's main loop: read a message or a command, answer, again; must not know how either is drawn or typed."""

from __future__ import annotations

from time import monotonic

from localmoe.errors import LocalMoeError
from localmoe.repl.commands import execute
from localmoe.repl.talk import Interrupt, Reader, Talk


def converse(talk: Talk, reader: Reader) -> None:
    """Run the chat until /exit, Ctrl+D or two Ctrl+C in a row at an empty prompt."""
    talk.reader, hinted = reader, False
    with Interrupt.watched(calm=True) as interrupt:  # between two messages there is nothing to stop
        while talk.open:
            try:
                with Interrupt.watched():
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
            try:
                interrupt.asked, interrupt.heard, interrupt.calm = False, monotonic(), False
                try:
                    respond(talk, text)
                finally:
                    interrupt.calm = True
                    talk.screen.settle()
            except KeyboardInterrupt:
                talk.screen.notice("(stopped)")


def respond(talk: Talk, text: str) -> None:
    """Do what a line asks for; LocalMoeError becomes a line itself."""
    try:
        if text.startswith("/"):
            execute(talk, text)
        elif text.strip():
            talk.say(text.strip())
    except LocalMoeError as error:
        talk.screen.error(str(error))
