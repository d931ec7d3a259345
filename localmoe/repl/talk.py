"""The running chat: a session on a screen, how an answer is drawn and interrupted; knows neither commands nor input."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import cast

from localmoe.engine import Progress
from localmoe.errors import LocalMoeError
from localmoe.repl.keyboard import silent_keyboard
from localmoe.repl.render import Screen
from localmoe.session import Piece, Session


class Interrupt:
    """Whether Ctrl+C was pressed: the first press asks, unless `at_once` is set; the second insists by
    KeyboardInterrupt."""

    asked = False
    at_once = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked or self.at_once:
            raise KeyboardInterrupt
        self.asked = True

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[Interrupt]:
        """Watches Ctrl+C inside a `with` block; off the main thread, where Python hears no signals, it never asks."""
        interrupt = cls()
        try:
            before = signal.signal(signal.SIGINT, interrupt)
        except ValueError:
            yield interrupt
            return
        try:
            yield interrupt
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass
class Talk:
    """What a slash command works on; `open` turned off ends the chat after the command."""

    session: Session
    screen: Screen
    open: bool = True

    def answer(self, generate: Callable[[Progress], Iterator[Piece]]) -> None:
        """Draw an answer as it comes. Ctrl+C stops it at the next token; LocalMoeError becomes a line."""
        drawn = self.screen.answer()
        with silent_keyboard(), Interrupt.watched() as interrupt, self.screen.progress("reading the prompt") as bar:
            interrupt.at_once = True  # reading a prompt may take long; once words come, the current one is finished
            pieces = cast("Generator[Piece]", generate(partial(bar, "reading the prompt")))
            try:
                for piece in pieces:
                    interrupt.at_once = False
                    bar.close()
                    drawn.write(piece.kind, piece.text)
                    if interrupt.asked:
                        break
            except KeyboardInterrupt:
                pass
            except LocalMoeError as error:
                bar.close()
                drawn.end()
                self.screen.error(str(error))
                return
            finally:
                pieces.close()
        drawn.end()
        self._remark(drawn.empty)
        self.screen.line()

    def _remark(self, empty: bool) -> None:
        match self.session.finish:
            case "interrupted" if empty:
                self.screen.notice("(stopped before the first word; Up brings the message back)")
            case "interrupted":
                self.screen.notice("(stopped)")
            case "length":
                self.screen.notice(
                    f"(max_tokens = {self.session.settings.max_tokens} reached; /set max_tokens 0 lifts it)"
                )
            case "context":
                self.screen.notice(
                    f"(the context of {self.session.model.context} tokens is full; /clear starts afresh)"
                )
            case "stop" if empty:
                self.screen.notice("(the model gave an empty answer)")
