"""All drawing of the chat, through rich: streamed answers, tables, notices, progress; knows no session and no model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from io import TextIOWrapper
from shutil import get_terminal_size
from threading import Lock, Timer
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions, RenderableType
from rich.padding import Padding
from rich.text import Text

from localmoe.interrupt import Uninterrupted, start_threads
from localmoe.repl.answer import Answer, Thought, is_ascii
from localmoe.repl.safe import visible as visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DELAY = 0.5  # seconds that work may take before a bar appears
SMALLEST_DRAWING = 8  # lines
NARROW = 60  # columns
SLOWEST = 3600.0  # seconds between two steps of work that still tell how long the rest takes


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
        self.closed = False
        self._lock = Lock()
        self._timer = Timer(DELAY, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            try:
                start_threads([self._timer])
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, label: str, done: int, total: int) -> None:
        """Work of `total` units has come to `done`; a total of 0 is unknown."""
        with Uninterrupted(), self._lock:
            self._state = (label, done, total)
            self._draw()

    def tokens(self, label: str) -> Callable[[int, int], None]:
        """A function of (done, total) for work on tokens, which are told in numbers too."""
        return lambda done, total: self(f"{label}, {done} of {total} tokens", done, total)

    def beside(self, draw: Callable[[], None]) -> None:
        """Calls `draw`, which may print lines, while no bar stands there."""
        with Uninterrupted(), self._lock:
            if self._bar:
                self._bar.stop()
            draw()
            if self._bar:
                self._bar.start()

    def close(self) -> None:
        """Take the bar away; may be called twice."""
        if self.closed:
            return
        with Uninterrupted():
            self._timer.cancel()
            with self._lock:
                self.closed = True
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
            if not self.closed:
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


def open_console(stderr: bool = False) -> Console:
    """A console of the terminal's size, which rich takes for 80 columns where TERM is dumb."""
    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal and console.is_dumb_terminal:
        console.size = ConsoleDimensions(*get_terminal_size())
    return console


def _print(console: Console, drawn: RenderableType) -> None:
    with Uninterrupted():  # between two of its steps rich would leave this, and all that comes later, in its buffer
        console.print(drawn)


class Screen:
    """Standard output for words, standard error for troubles and progress.

    `markdown` draws answers as what their marks mean, on a terminal; `shows_reasoning` draws it before the answer, dim,
    and does not fold it.
    """

    def __init__(self, console: Console | None = None, errors: Console | None = None) -> None:
        if console is None and isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a letter that the encoding lacks ends no chat
        self.console = console or open_console()
        self.errors = errors or open_console(stderr=True)
        self.markdown, self.shows_reasoning = True, False
        self._answer: Answer | None = None
        self._bars: list[DelayedBar] = []

    @property
    def is_terminal(self) -> bool:
        return self.console.is_terminal

    @property
    def width(self) -> int:
        return self.console.width

    @property
    def is_ascii(self) -> bool:
        """Whether nothing but ASCII can be shown."""
        return is_ascii(self.console)

    def lines_beside(self, others: int) -> int:
        """How many lines a drawing may have, so that it stands on the screen with so many others."""
        return max(self.console.height - others, SMALLEST_DRAWING)

    def line(self, text: str = "", style: str = "") -> None:
        """A line of ours, wrapped at words."""
        _print(self.console, Text(visible(text), style=style))

    def notice(self, text: str) -> None:
        """A remark beside the conversation."""
        self.line(text, "dim")

    def error(self, text: str) -> None:
        _print(self.errors, Text(visible(text), style="red"))

    def verbatim(self, text: str) -> None:
        """Text as it is, unwrapped: for pipes. Control characters still never reach a terminal."""
        with Uninterrupted():
            self.console.out(visible(text) if self.is_terminal else text, highlight=False, end="")

    def rows(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        """A plain table; the last column takes the width that is left. In a narrow window long titles stand above."""
        from rich.table import Table

        rows = [tuple(map(visible, row)) for row in rows]
        if self.width < NARROW and not header and self._crowded(rows):
            for title, text in rows:
                _print(self.console, Text(title, "bold"))
                _print(self.console, Padding(Text(text, overflow="fold"), (0, 0, 0, 2)))
            return
        table = Table(*header, box=None, show_header=bool(header), pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))
        for column in table.columns:
            column.overflow = "fold"
        _print(self.console, table)

    def _crowded(self, rows: Sequence[Sequence[str]]) -> bool:
        """Whether the titles of rows of two would leave the texts less than half of the window."""
        if not all(len(row) == 2 for row in rows):
            return False
        titles, texts = (max((cell_len(row[side]) for row in rows), default=0) for side in (0, 1))
        return titles > self.width // 2 - 2 and titles + 2 + texts > self.width

    def answer(
        self,
        exact: bool = False,
        below: Callable[[int], str] | None = None,
        tokens: Callable[[], int] | None = None,
    ) -> Answer:
        """An answer to be written: see Answer. The last one's reasoning can be shown until the next begins."""
        folds = not self.shows_reasoning
        self._answer = Answer(self.console, exact, below, tokens, markdown=self.markdown, folds=folds)
        return self._answer

    def aside(self) -> Answer:
        """An answer drawn on standard error, reasoning in full."""
        return Answer(self.errors, markdown=self.markdown, folds=False)

    def prepare(self) -> None:
        """Have ready what the first answer would wait for, a twentieth of a second; from any thread."""
        if self.is_terminal and self.markdown:
            import localmoe.repl.markdown  # noqa: F401

    @property
    def thought(self) -> Thought | None:
        """The reasoning before the last answer, if there was any."""
        return self._answer.thought if self._answer and self._answer.thought else None

    def show_reasoning(self, thought: Thought) -> None:
        """Draw a reasoning in full."""
        drawn = Answer(self.console, markdown=self.markdown, folds=False)
        drawn.write("reasoning", thought.text)
        drawn.thought = thought
        drawn.end()

    def progress(self, label: str, note: Callable[[], str] = str) -> DelayedBar:
        """A bar for the work inside a `with` block; call it with (label, done, total)."""
        bar = DelayedBar(self.errors, label, note)
        self._bars = [*(other for other in self._bars if not other.closed), bar]
        return bar

    def settle(self) -> None:
        """Take away what is drawn as long as work lasts: an interrupt may have come before the work's end did."""
        for bar in self._bars:
            bar.close()
        self._bars.clear()
