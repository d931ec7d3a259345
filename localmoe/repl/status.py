"""A line below streamed text, redrawn in place and gone without trace; knows terminals, and nothing of what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.console import COLOR_SYSTEMS, Console

from localmoe.repl.letters import combines
from localmoe.repl.page import Fragment

# ECMA-48 and DEC VT100. Index (ESC D) goes down a line and keeps the column, scrolling at the bottom; afterwards there
# is a line below the text for sure, and the saved place does not move any more.
BELOW = "\x1bD\x1b[A\x1b7\x1b[B\r"
BACK = "\x1b8"
ERASE = "\x1b[J"  # from the end of the text to the end of the screen
SMALLEST_HEIGHT = 4
MARGIN = 4  # columns left free: a terminal may draw a middle dot two columns wide


def can_redraw(console: Console) -> bool:
    """Whether a line can be drawn again."""
    return console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows


class StatusLine:
    """`told(columns)` gives the line, "" for none. Nothing is drawn but on a terminal that can move its cursor."""

    def __init__(self, console: Console, told: Callable[[int], str]) -> None:
        self._console, self._told = console, told
        self._able = can_redraw(console)
        self._column: int | None = 0  # where the text ends; None until the next line where no one can tell
        self._width = console.width
        self._shown = ""

    def around(self, fragments: Sequence[Fragment]) -> None:
        """Put text on the terminal, in one write with the line that is taken away and drawn again."""
        if not self._able:
            for text, style in fragments:
                self._console.out(text, style=style or None, highlight=False, end="")
            return
        text, width = "".join(text for text, _ in fragments), self._console.width
        self._column = end_column(text, self._column if width == self._width else None, width)
        self._width = width
        # Behind a full line a terminal waits with the cursor on the last letter: moving it would lose that.
        is_placed = self._column is not None and self._column < width and self._console.height >= SMALLEST_HEIGHT
        line = self._told(width - MARGIN) if is_placed else ""
        if text or line != self._shown:
            drawn = BELOW + self._encoded([(line, "dim")]) + BACK if line else ""
            codes = (ERASE if self._shown else "") + self._encoded(fragments) + drawn
            self._shown = line
            self._write(codes)

    def close(self) -> None:
        """Take the line away; may be called twice."""
        if self._shown:
            self._write(ERASE)
            self._shown = ""

    def _encoded(self, fragments: Sequence[Fragment]) -> str:
        """Text with the codes of its looks, as far as the terminal has them."""
        colours = COLOR_SYSTEMS.get(self._console.color_system or "")
        if colours is None:
            return "".join(text for text, _ in fragments)
        looks = ((text, self._console.get_style(style)) for text, style in fragments)
        return "".join(
            (look.without_color if self._console.no_color else look).render(text, color_system=colours)
            for text, look in looks
        )

    def _write(self, codes: str) -> None:
        self._console.file.write(codes)
        self._console.file.flush()


def end_column(text: str, column: int | None, width: int) -> int | None:
    """The column behind `text` that began at `column` of a terminal `width` wide; `width` itself behind a full line.
    None where terminals differ: tabs, marks that combine with a letter, joined emoji."""
    _, newline, last = text.rpartition("\n")
    if newline:
        column = 0
    for letter in last:
        if column is None or letter == "\t" or combines(letter):
            return None
        cells = cell_len(letter)
        column = column + cells if column + cells <= width else cells
    return column
