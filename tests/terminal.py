"""A VT100 as small as the tests need it; where terminals differ it does what harms most."""

from __future__ import annotations

import re

from rich.cells import cell_len

PIECES = re.compile(r"\x1b\[([\d;]*)([A-Za-z])|\x1b([D78])|(.)", re.DOTALL)


class Terminal:
    """`lines`: everything that ever scrolled away, and the screen; a wide letter takes a cell and an empty one.

    Behind a full line the cursor waits on the last cell, and any movement forgets that it waited.
    """

    def __init__(self, width: int, height: int, row: int = 0) -> None:
        self.width, self.height = width, height
        self.gone: list[list[str]] = []
        self.screen = [[" "] * width for _ in range(height)]
        self.row, self.column, self.waits = row, 0, False
        self.kept = (0, 0)

    @property
    def lines(self) -> list[str]:
        """Without what is empty at the end."""
        return "\n".join("".join(line).rstrip() for line in [*self.gone, *self.screen]).rstrip().split("\n")

    @property
    def position(self) -> tuple[int, int]:
        """The cursor's line, of all of `lines`, and its column."""
        return len(self.gone) + self.row, self.column

    def write(self, text: str) -> None:
        for number, letter, plain, printed in PIECES.findall(text):
            if printed:
                self._print(printed)
            elif plain == "7":
                self.kept = (self.row, self.column)
            elif plain == "8":
                self.row, self.column, self.waits = *self.kept, False
            elif plain == "D":
                self._down()
            elif letter == "A":
                self.row, self.waits = max(self.row - int(number or 1), 0), False
            elif letter == "B":
                self.row, self.waits = min(self.row + int(number or 1), self.height - 1), False
            elif letter == "J":
                self.screen[self.row][self.column :] = [" "] * (self.width - self.column)
                for row in range(self.row + 1, self.height):
                    self.screen[row] = [" "] * self.width
            else:
                assert letter == "m", f"a code the tests do not know: {letter!r}"

    def _print(self, letter: str) -> None:
        if letter == "\r":
            self.column, self.waits = 0, False
        elif letter == "\n":  # the terminal line discipline returns to the first column as well
            self.column = 0
            self._down()
        else:
            cells = cell_len(letter)
            if self.waits or self.column + cells > self.width:
                self.column = 0
                self._down()
            self.screen[self.row][self.column : self.column + cells] = [letter, ""][:cells]
            self.column += cells
            self.waits = self.column == self.width
            self.column = min(self.column, self.width - 1)

    def _down(self) -> None:
        self.waits = False
        if self.row == self.height - 1:
            self.gone.append(self.screen.pop(0))
            self.screen.append([" "] * self.width)
        else:
            self.row += 1
