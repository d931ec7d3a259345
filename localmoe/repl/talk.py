"""The running chat: a session on a screen, how an answer is drawn and interrupted; knows neither commands nor input."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from types import FrameType
from typing import Protocol, cast

from localmoe.engine import Progress
from localmoe.errors import FileFormatError, LocalMoeError
from localmoe.experts.loading import Loading
from localmoe.repl.keyboard import silent_keyboard
from localmoe.repl.render import Screen
from localmoe.repl.residency import ResidentModel, reads, status
from localmoe.session import ChatModel, Piece, Session

READING = "reading the prompt"
PATIENCE = 1.0  # seconds after a word in which the next one is worth waiting for


class Interrupt:
    """Whether Ctrl+C was pressed. While words come, the first press asks for an end behind the current one, and the
    second insists by KeyboardInterrupt; while someone waits for a word, the first does."""

    asked = False
    heard = -math.inf  # when the last word came

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.asked or monotonic() - self.heard > PATIENCE:
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


class OpenedModel(ChatModel, ResidentModel, Protocol):
    """What a session talks with, its weights somewhere."""


@dataclass
class Talk:
    """What a slash command works on; `open` turned off ends the chat after the command. `load` opens the session's
    model once more, its weights loaded as it is told."""

    session: Session
    screen: Screen
    load: Callable[[Loading], OpenedModel] | None = None
    open: bool = True

    def answer(self, generate: Callable[[Progress], Iterator[Piece]]) -> None:
        """Draw an answer as it comes. Ctrl+C stops it at the next token; LocalMoeError becomes a line."""
        drawn = self.screen.answer(below=self._status)
        bar = self.screen.progress(READING, reads(self.session.model.counts))
        with silent_keyboard(), Interrupt.watched() as interrupt, bar:
            pieces = cast("Generator[Piece]", generate(bar.tokens(READING)))
            try:
                for piece in pieces:
                    bar.close()
                    drawn.write(piece.kind, piece.text)
                    interrupt.heard = monotonic()
                    if interrupt.asked:
                        break
            except KeyboardInterrupt:
                pass
            except LocalMoeError as error:
                bar.close()
                drawn.end()
                self.screen.error(str(error))
                if isinstance(error, FileFormatError) and self.load:
                    self.screen.notice("(/reopen opens it; the conversation stays)")
                return
            finally:
                pieces.close()
        drawn.end()
        self._remark(drawn.empty)
        self.screen.line()

    @property
    def model(self) -> ResidentModel:
        """The session's model as one whose weights are somewhere."""
        return cast("ResidentModel", self.session.model)

    def _status(self, columns: int) -> str:
        return status(self.session.engine.stats.decode_counts, self.model.room(), columns)

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
