"""A line below streamed text, redrawn in place and gone without trace; knows terminals, and nothing of what it says."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment, Segments

# ECMA-48 and DEC VT100. Index (ESC D) goes down a line and keeps the column, scrolling at the bottom; afterwards there
# is a line below the text for sure, and the saved place does not move any more.
BELOW = "\x1bD\x1b[A\x1b7\x1b[B\r"
BACK = "\x1b8"
ERASE = "\x1b[J"  # from the end of the text to the end of the screen
SMALLEST_HEIGHT = 4
MARGIN = 4  # columns left free: a terminal may draw a middle dot two columns wide


class StatusLine:
    """`told(columns)` gives the line, "" for none. Nothing is drawn but on a terminal that can move its cursor."""

    def __init__(self, console: Console, told: Callable[[int], str]) -> None:
        self._console, self._told = console, told
        self._able = console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows
        self._column: int | None = 0  # where the text ends; None until the next line where no one can tell
        self._width = console.width
        self._shown = False

    def around(self, text: str, write: Callable[[], None]) -> None:
        """`write` puts `text` on the terminal, in one piece with the line that is taken away and drawn again."""
        if not self._able:
            write()
            return
        with self._console:
            self._erase()
            write()
            width = self._console.width
            self._column = end_column(text, self._column if width == self._width else None, width)
            self._width = width
            # Behind a full line a terminal waits with the cursor on the last letter: moving it would lose that.
            if self._column is not None and self._column < width and self._console.height >= SMALLEST_HEIGHT:
                self._draw(self._told(width - MARGIN))

    def close(self) -> None:
        """Take the line away; may be called twice."""
        self._erase()

    def _draw(self, line: str) -> None:
        if line:
            self._control(BELOW)
            self._console.out(line, style="dim", highlight=False, end="")
            self._control(BACK)
            self._shown = True

    def _erase(self) -> None:
        if self._shown:
            self._control(ERASE)
            self._shown = False

    def _control(self, codes: str) -> None:
        self._console.print(Segments([Segment(codes, None, [])]), end="", soft_wrap=True)


def end_column(text: str, column: int | None, width: int) -> int | None:
    """The column behind `text` that began at `column` of a terminal `width` wide; `width` itself behind a full line.
    None where terminals differ: tabs, marks that combine with a letter, joined emoji."""
    _, newline, last = text.rpartition("\n")
    if newline:
        column = 0
    for letter in last:
        if column is None or letter == "\t" or _combines(letter):
            return None
        cells = cell_len(letter)
        column = column + cells if column + cells <= width else cells
    return column


def _combines(letter: str) -> bool:
    """Marks, joiners, halves of flags, colours of skin."""
    return (
        unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf") or "\U0001f1e6" <= letter <= "\U0001f1ff"
    ) or "\U0001f3fb" <= letter <= "\U0001f3ff"
