"""All drawing of the chat, through rich: streamed answers, tables, notices, progress; knows no session and no model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock, Timer
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.text import Text

from localmoe.repl.status import StatusLine

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DELAY = 0.5  # seconds that work may take before a bar appears
SLOWEST = 3600.0  # seconds between two steps of work that still tell how long the rest takes
# C0 but for tab and newline, DEL, C1, lone surrogates, and the bidi overrides that make text read other than it is.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text that cannot drive a terminal: control characters are shown as escapes such as \\x1b."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "backslashreplace").decode(), text)


class Answer:
    """One streamed answer: reasoning dim and before it, blank lines at both ends left out."""

    def __init__(self, console: Console, exact: bool = False, below: Callable[[int], str] | None = None) -> None:
        """`exact` leaves control characters as they are where no terminal would obey them; `below(columns)` tells what
        stands in a line below the text while it grows."""
        self._console = console
        self._status = StatusLine(console, below) if below else None
        self._safe = str if exact and not console.is_terminal else visible
        self._kind = ""
        self._newlines = ""
        self._ended = False
        self.empty = True

    def write(self, kind: str, text: str) -> None:
        if kind != self._kind:
            self._begin(kind, text)
            text = text.lstrip()
            if not text:
                return
            self._kind = kind
        text = self._newlines + self._safe(text)
        body = text.rstrip("\n")
        self._newlines = text[len(body) :]
        if body:
            self._out(body, "dim" if kind == "reasoning" else None)
            self.empty = False

    def end(self) -> None:
        """Close the line that the answer stands on; may be called twice."""
        if self._status:
            self._status.close()
        if not self.empty and not self._ended:
            self._console.out("")
        self._ended = True

    def _begin(self, kind: str, text: str) -> None:
        if not text.strip():
            return
        self._newlines = ""
        if self._kind:
            self._out("\n\n")
        if self._console.color_system is None and (kind == "reasoning" or self._kind):
            self._out(f"({kind})\n")

    def _out(self, text: str, style: str | None = None) -> None:
        write = partial(self._console.out, text, style=style, highlight=False, end="")
        if self._status:
            self._status.around(text, write)
        else:
            write()


class Lately:
    """Text that is asked for whenever it is drawn."""

    def __init__(self, told: Callable[[], str]) -> None:
        self._told = told

    def __str__(self) -> str:
        return self._told()


class DelayedBar:
    """A progress bar with the time left, drawn only when the work outlasts DELAY; gone without trace when it ends."""

    def __init__(self, console: Console, label: str, note: Callable[[], str] = str) -> None:
        """`note` says behind the label what else is known; it is asked from another thread, several times a second."""
        self._console = console
        self._note = Lately(note)
        self._state = (label, 0, 0)
        self._drawn = (0, 0)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._closed = False
        self._lock = Lock()
        self._timer = Timer(DELAY, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, label: str, done: int, total: int) -> None:
        """Work of `total` units has come to `done`; a total of 0 is unknown."""
        with self._lock:
            self._state = (label, done, total)
            self._draw()

    def tokens(self, label: str) -> Callable[[int, int], None]:
        """A function of (done, total) for work on tokens, which are told in numbers too."""
        return lambda done, total: self(f"{label}, {done} of {total} tokens", done, total)

    @contextmanager
    def away(self) -> Iterator[None]:
        """No bar inside a `with` block, which may print lines."""
        with self._lock:
            if self._bar:
                self._bar.stop()
            yield
            if self._bar:
                self._bar.start()

    def close(self) -> None:
        """Take the bar away; may be called twice."""
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._bar:
                self._bar.stop()
                self._bar = None

    def _show(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}{task.fields[note]}", markup=False),
            BarColumn(None),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        with self._lock:
            if not self._closed:
                self._bar = Progress(*columns, console=self._console, transient=True, speed_estimate_period=SLOWEST)
                self._bar.start()
                self._draw()

    def _draw(self) -> None:
        if self._bar is None:
            return
        label, done, total = self._state
        if self._task is None or total != self._drawn[1] or done < self._drawn[0]:  # other work, with a time of its own
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(visible(label), total=total or None, completed=done, note=self._note)
        self._drawn = (done, total)
        self._bar.update(self._task, description=visible(label), completed=done, total=total or None)


class Screen:
    """Standard output for words, standard error for troubles and progress."""

    def __init__(self, console: Console | None = None, errors: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.errors = errors or Console(stderr=True, highlight=False)

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    def line(self, text: str = "", style: str = "") -> None:
        """A line of ours, wrapped at words."""
        self.console.print(Text(visible(text), style=style))

    def notice(self, text: str) -> None:
        """A remark beside the conversation."""
        self.line(text, "dim")

    def error(self, text: str) -> None:
        self.errors.print(Text(visible(text), style="red"))

    def verbatim(self, text: str) -> None:
        """Text as it is, unwrapped: for pipes. Control characters still never reach a terminal."""
        self.console.out(visible(text) if self.is_terminal else text, highlight=False, end="")

    def rows(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        """A plain table; the last column takes the width that is left."""
        from rich.table import Table

        table = Table(*header, box=None, show_header=bool(header), pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        for column in table.columns:
            column.overflow = "fold"
        self.console.print(table)

    def answer(self, exact: bool = False, below: Callable[[int], str] | None = None) -> Answer:
        return Answer(self.console, exact, below)

    def aside(self) -> Answer:
        """An answer drawn on standard error."""
        return Answer(self.errors)

    def progress(self, label: str, note: Callable[[], str] = str) -> DelayedBar:
        """A bar for the work inside a `with` block; call it with (label, done, total)."""
        return DelayedBar(self.errors, label, note)
