"""Text put into lines as it comes: words wrapped behind a hanging prefix, nothing taken back; knows no Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.cells import cell_len, get_character_cell_size
from rich.style import Style

from localmoe.repl.letters import may_break
from localmoe.repl.safe import visible

Fragment = tuple[str, str | Style]  # text and how it looks
SMALLEST_WIDTH = 8


class Page:
    """A word goes out when it has ended, in a line of `columns()` cells: what is drawn is never drawn again."""

    def __init__(self, columns: Callable[[], int], style: str = "") -> None:
        """`style` lies under every other one."""
        self._columns, self._style = columns, style
        self._out: list[Fragment] = []
        self._word: list[Fragment] = []
        self._word_cells = 0
        self._spaces: Fragment = ("", "")
        self._breaks = False  # a new line before the next word
        self.column = 0
        self._fresh = True  # no word yet on this line
        self.indent = ""  # before the lines of a block but for the first
        self.empty = True

    @property
    def width(self) -> int:
        return max(self._columns(), SMALLEST_WIDTH)

    def take(self) -> list[Fragment]:
        """What has to be drawn since the last call."""
        taken, self._out = self._out, []
        return taken

    def start(self, first: str = "", rest: str = "", blank: str | None = None) -> None:
        """A new block: `first` stands before its first line, `rest` before the others, `blank` on a line of its own."""
        self.flush()
        if not self.empty:
            self._put("\n")
            if blank is not None:
                self._put(blank + "\n")
        half = self.width // 2  # the text keeps the other half, however deep it stands
        self.indent = rest if cell_len(rest) <= half else " " * half
        self._begin_line(first[-half:])
        self.empty = self.empty and not first.strip()

    def new_line(self) -> None:
        self._put("\n")
        self._begin_line(self.indent)

    def text(self, text: str, style: str = "") -> None:
        """Words and the spaces between them; a newline is one."""
        for letter in visible(text):
            if letter in " \t":
                self._end_word()
                self._spaces = (self._spaces[0] + " ", style)
            elif letter == "\n":
                self._end_word()
                self._breaks = True
            else:
                if self._word and may_break(self._word[-1][0][-1], letter):
                    self._end_word()
                self._add(letter, style)

    def flush(self) -> None:
        """The last word, which nothing will follow."""
        self._end_word()
        self._spaces, self._breaks = ("", ""), False

    def verbatim(self, line: Iterable[Fragment]) -> None:
        """A line as it is, which the terminal folds where it is too long."""
        for text, style in line:
            self._put(visible(text), style)
        self._fresh = self.empty = False

    def _add(self, letter: str, style: str) -> None:
        cells = get_character_cell_size(letter)
        if self._word_cells + cells > self.width - cell_len(self.indent):
            self._end_word()
        if self._word and self._word[-1][1] == style:
            self._word[-1] = (self._word[-1][0] + letter, style)
        else:
            self._word.append((letter, style))
        self._word_cells += cells

    def _end_word(self) -> None:
        if not self._word:
            return
        spaces, style = self._spaces
        if self._breaks or (not self._fresh and self.column + len(spaces) + self._word_cells > self.width):
            self.new_line()
        elif not self._fresh:
            self._put(spaces, style if style == self._word[0][1] else "")
            self.column += len(spaces)
        for fragment in self._word:
            self._put(*fragment)
        self.column += self._word_cells
        self._word, self._word_cells, self._spaces = [], 0, ("", "")
        self._fresh = self._breaks = self.empty = False

    def _begin_line(self, prefix: str) -> None:
        self._put(prefix)
        self.column, self._fresh = cell_len(prefix), True

    def _put(self, text: str, style: str | Style = "") -> None:
        if not text:
            return
        under = self._style
        over = Style.parse(under) + style if isinstance(style, Style) else f"{under} {style}".strip()
        if self._out and self._out[-1][1] == over:
            text = self._out.pop()[0] + text
        self._out.append((text, over))
