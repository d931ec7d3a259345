"""One answer as it comes: its reasoning folded into a line, its text as Markdown; knows no session and no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console

from localmoe.interrupt import Uninterrupted
from localmoe.repl.page import Fragment, Page
from localmoe.repl.safe import visible
from localmoe.repl.status import StatusLine, can_redraw

HINT = "/think show"
SMALLEST_ENDING = 8  # columns of last words that are worth showing


@dataclass(slots=True)
class Thought:
    """The reasoning before an answer, how long it took and how many tokens."""

    text: str = ""
    seconds: float = 0.0
    tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.text.strip())

    def told(self, columns: int, hint: str = "") -> str:
        """As in "thought for 8.2 s (214 tokens; /think show)", shorter where that is too long."""
        facts = [count(self.tokens), hint] if hint else [count(self.tokens)]
        lines = [f"thought for {lasting(self.seconds)} ({'; '.join(some)})" for some in (facts, facts[-1:])]
        return next((line for line in lines if len(line) <= columns), lines[-1])


class Writer(Protocol):
    """What turns text that comes into what has to be drawn."""

    def write(self, text: str) -> list[Fragment]: ...
    def end(self) -> list[Fragment]: ...
    def waiting(self, columns: int) -> str:
        """What may be said of text that is not drawn yet."""
        ...


class Plain:
    """Text as it is, without newlines at its end."""

    def __init__(self, safe: Callable[[str], str] = visible, style: str = "") -> None:
        self._safe, self._style = safe, style
        self._newlines = ""

    def write(self, text: str) -> list[Fragment]:
        text = self._newlines + self._safe(text)
        body = text.rstrip("\n")
        self._newlines = text[len(body) :]
        return [(body, self._style)] if body else []

    def end(self) -> list[Fragment]:
        return []

    def waiting(self, columns: int) -> str:
        return ""


class Marked:
    """Markdown, wrapped at words to a console's width less one: behind a full line no one can tell where the cursor is.
    Without colours code keeps its marks."""

    def __init__(self, console: Console, style: str = "") -> None:
        from localmoe.repl.markdown import ASCII, UNICODE, Markdown

        signs, self._dots = (ASCII, "...") if is_ascii(console) else (UNICODE, "…")
        self._page = Page(lambda: console.width - 1, style)
        self._return = ""  # a carriage return is part of a line's end, or shown
        self._markdown = Markdown(self._page, signs, "`" if console.no_color or not console.color_system else "")

    def write(self, text: str) -> list[Fragment]:
        text = self._return + text
        self._return = "\r" if text.endswith("\r") else ""
        self._markdown.write(visible(text.removesuffix("\r").replace("\r\n", "\n")))
        return self._page.take()

    def end(self) -> list[Fragment]:
        self._markdown.write(visible(self._return))
        self._markdown.end()
        return self._page.take()

    def waiting(self, columns: int) -> str:
        """A table grows unseen, and so does a line of code; of that, what would not fit on one line."""
        rows, line = self._markdown.table_rows, visible(self._markdown.held)
        if rows:
            return f"a table, {rows} {'row' if rows == 1 else 'rows'}"
        return _ending(line, columns, self._dots) if cell_len(line) > columns else ""


class Answer:
    """One streamed answer, reasoning before it.

    Where a line can be drawn again, reasoning is told in one line below and folded into one; elsewhere it is written
    out between marks.
    """

    def __init__(
        self,
        console: Console,
        exact: bool = False,
        below: Callable[[int], str] | None = None,
        tokens: Callable[[], int] | None = None,
        *,
        markdown: bool = True,
        folds: bool = True,
    ) -> None:
        """`exact` leaves control characters as they are where no terminal would obey them; `below(columns)` tells what
        stands in a line below the text while it grows; `tokens()` counts what was generated, else pieces are counted.
        """
        self._console, self._below, self._tokens = console, below, tokens
        self._status = StatusLine(console, self._told)
        self._able = can_redraw(console)
        self._folds = folds and self._able
        self._markdown = markdown and console.is_terminal
        self._safe = str if exact and not console.is_terminal else visible
        self._dot, self._dots = (" - ", "...") if is_ascii(console) else (" · ", "…")
        self._kind = ""
        self._writer: Writer | None = None
        self._began: float | None = None
        self._ended = False
        self._drawn = False
        self._news = ""
        self.thought = Thought()
        self.answered = False

    @property
    def empty(self) -> bool:
        """Nothing came, not even reasoning."""
        return not self.answered and not self.thought

    def write(self, kind: str, text: str) -> None:
        self._news = ""
        if kind == "reasoning":
            self._think(text)
        if kind != self._kind:
            text = text.lstrip()
            if not text:
                return
            self._begin(kind)
        self.answered = self.answered or kind == "answer"
        assert self._writer is not None, "an answer without a writer"
        self._out(self._writer.write(text) if kind == "answer" or not self._folds else [])

    def tell(self, text: str) -> None:
        """Have this in the line below until more is written."""
        self._news = text
        self._out([])

    def end(self) -> None:
        """Close the line that the answer stands on; may be called twice."""
        with Uninterrupted():
            if not self._ended:
                self._end_kind()
            self._status.close()
            if self._drawn and not self._ended:
                self._console.out("")
            self._ended = True

    def _think(self, text: str) -> None:
        thought = self.thought
        if self._began is None:
            self._began = monotonic()
        thought.text = thought.text + text if thought.text else text.lstrip()
        thought.seconds = monotonic() - self._began
        thought.tokens = self._tokens() if self._tokens else thought.tokens + 1

    def _begin(self, kind: str) -> None:
        followed = bool(self._kind)
        self._end_kind()
        if followed:
            self._out([("\n\n", "")])
        if not self._able and (followed or kind == "reasoning"):
            self._out([(f"({kind})\n", "")])
        style = "dim" if kind == "reasoning" and self._able else ""
        self._kind = kind
        self._writer = Marked(self._console, style) if self._markdown else Plain(self._safe, style)

    def _end_kind(self) -> None:
        if self._writer and not (self._folds and self._kind == "reasoning"):
            self._out(self._writer.end())
        kind, self._kind = self._kind, ""
        if kind == "reasoning" and self._able:
            page = Page(lambda: self._console.width - 1, "dim")
            page.text(self.thought.told(page.width, HINT if self._folds else ""))
            page.flush()
            self._out([*([] if self._folds else [("\n\n", "")]), *page.take()])

    def _told(self, columns: int) -> str:
        """The line below."""
        if self._news:
            return self._news[: max(columns, 0)]
        if self._kind != "reasoning" or not self._folds:
            below = self._below(columns) if self._below else ""
            return below or (self._writer.waiting(columns) if self._writer else "")
        time = f"thinking {lasting(self.thought.seconds)}"
        facts = time + self._dot + count(self.thought.tokens)
        room = columns - cell_len(facts + self._dot)
        if room >= SMALLEST_ENDING:
            return facts + self._dot + _ending(visible(self.thought.text[-2 * columns :]), room, self._dots)
        return facts if room >= -len(self._dot) else time[: max(columns, 0)]

    def _out(self, fragments: list[Fragment]) -> None:
        self._drawn = self._drawn or bool(fragments)
        with Uninterrupted():
            self._status.around(fragments)


def lasting(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def count(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def is_ascii(console: Console) -> bool:
    """Whether nothing but ASCII can be shown for sure."""
    return not console.encoding.lower().startswith("utf")


def _ending(text: str, columns: int, dots: str = "…") -> str:
    """As much of the end of a text as fits, on one line."""
    text = " ".join(text[-2 * columns :].split())
    while cell_len(text) > columns - len(dots):
        text = text[1:]
    return dots + text.lstrip()
