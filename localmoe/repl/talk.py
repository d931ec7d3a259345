"""The running chat: a session on a screen, how an answer is drawn and interrupted, how model and template are changed;
knows neither commands nor input."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING, Protocol, cast

from localmoe.conversation.library import Library
from localmoe.conversation.saved import Saved
from localmoe.conversation.tree import Conversation
from localmoe.engine import Progress
from localmoe.errors import ContextError, FileFormatError, LocalMoeError, SettingError
from localmoe.reasoning import Piece
from localmoe.repl.attachments import Attachment, message_with
from localmoe.repl.keyboard import silent_keyboard
from localmoe.repl.models import OpenModels
from localmoe.repl.render import Screen
from localmoe.repl.residency import ResidentModel, reads, status
from localmoe.session import Session

if TYPE_CHECKING:
    from localmoe.discovery.catalogue import Catalogue

READING = "reading the prompt"
MAKING_ROOM = "making room in the context"
REREADING = "reading the conversation"
END_OF_BLOCK = "/end"
ROOM_MADE_BY = (
    "/trim N leaves out the oldest turns, /summary sums them up, /ctx drop does without them, /clear starts anew"
)
LONG_MESSAGE = 400  # characters
PATIENCE = 1.0  # seconds after a word in which the next one is worth waiting for


class Interrupt:
    """Whether Ctrl+C was pressed. While words come, the first press asks for an end behind the current one, and the
    second insists by KeyboardInterrupt; while someone waits for a word, the first does. `calm`, none does."""

    asked = False
    calm = True
    heard = -math.inf  # when the last word came

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.calm and (self.asked or monotonic() - self.heard > PATIENCE):
            raise KeyboardInterrupt
        self.asked = True

    @classmethod
    @contextmanager
    def watched(cls, *, calm: bool = False) -> Iterator[Interrupt]:
        """Watches Ctrl+C inside a `with` block; off the main thread, where Python hears no signals, it never asks.

        It is calm while it takes over and gives back: an exception there would leave it in charge for ever.
        """
        interrupt = cls()
        try:
            before = signal.signal(signal.SIGINT, interrupt)
        except ValueError:
            yield interrupt
            return
        try:
            try:
                interrupt.calm = calm
                if interrupt.asked and not calm:
                    raise KeyboardInterrupt
                yield interrupt
            finally:
                interrupt.calm = True
        finally:
            signal.signal(signal.SIGINT, before)


class Reader(Protocol):
    """Where messages come from."""

    def read(self, text: str = "") -> str:
        """The next message, `text` being there already to be changed; EOFError at the end, KeyboardInterrupt for Ctrl+C
        on an empty line."""
        ...

    def read_block(self) -> str:
        """Lines up to one that says END_OF_BLOCK, or the end; KeyboardInterrupt for Ctrl+C."""
        ...


@dataclass
class Talk:
    """What a slash command works on; `open` turned off ends the chat after the command. `attachments` go along with the
    next message. `models` opens others, and the session's own once more; `reader` asks the user; `saved` keeps the
    session's conversation in `library`."""

    session: Session
    screen: Screen
    models: OpenModels | None = None
    reader: Reader | None = None
    library: Library | None = None
    saved: Saved | None = None
    attachments: list[Attachment] = field(default_factory=list)
    open: bool = True

    def say(self, text: str) -> None:
        """Send a message, attached files before it, and draw the answer. They stay attached where none begins."""
        attached, before = list(self.attachments), self.session.conversation.head
        self.answer(partial(self.session.send, message_with(attached, text) if attached else text))
        if self.session.conversation.head != before:
            self.attachments = [each for each in self.attachments if each not in attached]

    def answer(self, generate: Callable[[Progress], Iterator[Piece]]) -> None:
        """Draw an answer as it comes. Ctrl+C stops it at the next token; LocalMoeError becomes a line."""
        self.note()
        before = self.session.conversation.head
        drawn = self.screen.answer(below=self._status, tokens=lambda: self.session.engine.stats.generated_tokens)
        bar = self.screen.progress(READING, reads(self.session.model.counts))
        reading = bar.tokens(READING)

        def progress(done: int, total: int) -> None:
            if not bar.closed:
                reading(done, total)
            elif done < total or not total:
                drawn.tell(f"{MAKING_ROOM}, {done} of {total} tokens" if total else MAKING_ROOM)

        with silent_keyboard(), Interrupt.watched() as interrupt, bar:
            pieces = cast("Generator[Piece]", generate(progress))
            try:
                for piece in pieces:
                    bar.close()
                    interrupt.calm = True  # what is being drawn is drawn whole
                    drawn.write(piece.kind, piece.text)
                    interrupt.heard, interrupt.calm = monotonic(), False
                    if interrupt.asked:
                        break
            except KeyboardInterrupt:
                pass
            except LocalMoeError as error:
                bar.close()
                drawn.end()
                self.screen.error(str(error))
                if isinstance(error, FileFormatError) and self.models:
                    self.screen.notice("(/reopen opens it; the conversation stays)")
                if isinstance(error, ContextError):
                    self.screen.notice(f"({ROOM_MADE_BY})")
                return
            finally:
                pieces.close()
        drawn.end()
        self._remark(drawn.empty, drawn.answered, kept=self.session.conversation.head != before)
        self.tell_news()
        self.screen.line()

    def read_again(self) -> None:
        """Have the model read the conversation now, with progress; Ctrl+C leaves the rest to the next message."""
        with (
            silent_keyboard(),
            Interrupt.watched(),
            self.screen.progress(REREADING, reads(self.session.model.counts)) as bar,
        ):
            try:
                self.session.read(bar.tokens(REREADING))
            except KeyboardInterrupt:
                bar.close()
                self.screen.notice("(stopped; what is left is read with your next message)")

    def prepare(self) -> None:
        """Have ready what the first answer would wait for; from any thread. Raises TokenizerError, TemplateError."""
        self.session.prepare()
        self.screen.prepare()
        if self.models and (kept := self.models.kept(self.models.current)):
            kept.prepare()

    def check(self, session: Session) -> None:
        """Whether a session can go on with the conversation. Raises SettingError when it is too long, and what makes no
        prompt."""
        used, room = len(session.tokens()), session.model.context
        if used >= room and session.overflow == "stop":
            raise SettingError(
                f"the conversation has {used} tokens for {session.model.name}, whose context holds {room}: "
                f"{used - room + 1} too many; {ROOM_MADE_BY}"
            )

    def go_on_with(self, session: Session) -> None:
        """Change to a session of the same conversation."""
        self.session = session

    def start_anew(self) -> None:
        """An empty conversation; system prompt and settings stay."""
        kept = self.saved is None or self.saved.keep
        before = self.saved.name if self.saved else ""
        self.go_to(self.library.open_new(keep=kept) if self.library else None)
        self.screen.notice("(a new conversation" + (f"; /load {before} goes back)" if before else ")"))

    def go_to(self, saved: Saved | None) -> None:
        """Go on with another conversation; the one before is closed."""
        if self.saved:
            self.saved.close()
            self.tell_news()
        self.saved = saved
        for line in self.session.start(saved.conversation if saved else Conversation()):
            self.screen.notice(f"({line})")
        self.tell_news()

    def note(self) -> None:
        """Keep with the conversation how it is led, from its next answer on: who only looks at it changes nothing."""
        self.session.remember()
        if self.models:
            path = self.models.current.path.absolute()
            self.session.conversation.note(model=str(path), opening=dict(self.models.opening) or None)

    def tell_news(self) -> None:
        """What happened to the files that keep the conversation, if anything did."""
        if self.saved and (news := self.saved.news()):
            self.screen.error(news)
        kept = self.models.kept(self.models.current) if self.models else None
        messages = kept.take_messages() if kept else []
        if messages:
            others = f"; and {len(messages) - 1} more like it" if messages[1:] else ""
            self.screen.notice(f"({messages[0]}{others})")

    def close(self) -> None:
        """The end of the chat; on a terminal it is said how to come back."""
        if self.saved:
            self.saved.close()
            self.tell_news()
            if self.screen.is_terminal and self.session.messages and not self.saved.in_memory:
                self.screen.notice(f"(kept as {self.saved.name}; localmoe chat --continue goes on)")

    def attach(self, files: Sequence[Attachment]) -> None:
        """Files for the next message. SettingError where they would not fit the context with what is there already."""
        wanted = {each.name: each for each in (*self.attachments, *files)}
        used = len(self.session.tokens())
        new, room = sum(map(self.tokens_in, wanted.values())), self.session.model.context - used
        if new >= room:
            raise SettingError(f"{new} tokens of files do not fit: {max(room, 0)} of the context are left")
        self.attachments = list(wanted.values())

    @property
    def attached_tokens(self) -> int:
        return sum(map(self.tokens_in, self.attachments))

    def tokens_in(self, attachment: Attachment) -> int:
        return len(self.session.model.tokenizer.encode(message_with([attachment], ""), bos=False))

    def show_last(self) -> None:
        """The last question and its answer, for whoever comes back to them."""
        path = self.session.conversation.path()
        start = max((i for i, message in enumerate(path) if message.role == "user"), default=0)
        for message in path[start:]:
            if message.role == "user":
                self.screen.notice(f">>> {ending(message.content)}")
                continue
            drawn = self.screen.answer()
            splitter = self.session.splitter_for(message)
            for piece in (*splitter.push(message.content), *splitter.finish()):
                drawn.write(piece.kind, piece.text)
            drawn.end()
            self.screen.line()

        if path and path[-1].role == "user":
            self.screen.notice("(this has not been answered yet: /regen does)")

    @property
    def model(self) -> ResidentModel:
        """The session's model as one whose weights are somewhere."""
        return cast("ResidentModel", self.session.model)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The models on this machine."""
        from localmoe.discovery.catalogue import Catalogue  # late: it reads headers with the whole loader

        return Catalogue()

    @property
    def model_told(self) -> str:
        model = self.models.current if self.models else None
        place = f" ({model.path})" if model else ""
        return f"{self.session.model.name}{place}, context {self.session.model.context}"

    def _status(self, columns: int) -> str:
        return status(self.session.engine.stats.decode_counts, self.model.room(), columns)

    def _remark(self, empty: bool, answered: bool, kept: bool) -> None:
        match self.session.finish:
            case "interrupted" if empty:
                self.screen.notice("(stopped before the first word; Up brings the message back)")
            case "interrupted" if not answered and not kept:  # where reasoning is no part of what is kept
                self.screen.notice("(stopped while it was thinking; Up brings the message back)")
            case "interrupted" if not answered:
                self.screen.notice("(stopped while it was thinking)")
            case "interrupted":
                self.screen.notice("(stopped)")
            case "length":
                self.screen.notice(
                    f"(max_tokens = {self.session.settings.max_tokens} reached; /set max_tokens 0 lifts it)"
                )
            case "context":
                self.screen.notice(f"(the context of {self.session.model.context} tokens is full; {ROOM_MADE_BY})")
            case "stop" if empty:
                self.screen.notice("(the model gave an empty answer)")
            case "stop" if not answered:
                self.screen.notice("(no answer followed the reasoning)")


def ending(text: str) -> str:
    """The end of a long message, where the question stands behind attached files."""
    return text if len(text) <= LONG_MESSAGE else "… " + text[-LONG_MESSAGE:].partition(" ")[2]
