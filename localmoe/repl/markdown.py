"""Markdown drawn while it is written, each block as soon as it is known; knows a page, neither terminals nor models.

markdown-it reads what stands of the current block together with the line that has begun, and says what that line is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from localmoe.repl.blocks import UNDECIDED, Leaf, last_leaf, read_blocks, still_bearing
from localmoe.repl.dialect import dialect
from localmoe.repl.highlight import Highlighter
from localmoe.repl.page import Page
from localmoe.repl.spans import Spans
from localmoe.repl.tables import MarkdownTable, read_table, table_lines

HASHES = re.compile(r"#{1,6}[ \t]*")
BARS = re.compile(r"[\s>|:-]*")  # the second line of a table, as far as it has come
HEADINGS = {"h1": "bold underline"}
STREAMED = ("paragraph_open", "heading_open")
APART = ("fence", "code_block", "table_open", "hr")  # these have empty lines around them


@dataclass(frozen=True, slots=True)
class Signs:
    """What is drawn where Markdown has marks."""

    bullet: str
    bar: str
    rule: str


UNICODE, ASCII = Signs("•", "│", "─"), Signs("*", "|", "-")


class Markdown:
    """Write to it; take from its page what has to be drawn. A text comes out the same however it was cut.

    A line of code is drawn when it is whole, since what a word in it is depends on what follows; a table when its last
    row is known, since that decides the widths.
    """

    def __init__(self, page: Page, signs: Signs = UNICODE, code_mark: str = "") -> None:
        """`code_mark` is written around code that cannot look different."""
        self._page, self._signs, self._code_mark, self._parser = page, signs, code_mark, dialect()
        self._spans = Spans(page, self._parser, code_mark)
        self._source: list[str] = []  # whole lines that still bear on the next
        self._line = ""
        self._streams = -1  # how much of the line went to the spans, if it is text
        self._leaf: Leaf | None = None  # the last one drawn
        self._blanks = 0  # lines since then
        self._code: Highlighter | None = None
        self._frozen: Leaf | None = None  # a fence or formula that is open
        self._header: tuple[str, Leaf] | None = None  # a line that is a table's first if the next one agrees
        self._table: tuple[list[str], list[str], Leaf] | None = None  # what it stands in with its head, its rows

    @property
    def held(self) -> str:
        """What has come of a line that is not drawn yet."""
        return "" if self._streams >= 0 else self._line

    @property
    def table_rows(self) -> int:
        """Rows of a table that is not drawn yet."""
        return len(self._table[1]) if self._table else 0

    def write(self, text: str) -> None:
        *whole, last = text.split("\n")
        for part in whole:
            self._line += part
            self._read(whole=True)
        self._line += last
        if last:
            self._read(whole=False)

    def end(self) -> None:
        """Draw what was waiting for more."""
        if self._line:
            self._read(whole=True)
        self._settle()
        self._spans.finish()

    def _read(self, *, whole: bool) -> None:
        line, remembered = self._line, True
        if self._streams < 0 and (whole or not self._waits(line)):
            remembered = self._begin(line, whole)
        if self._streams >= 0:
            self._stream(line, whole)
        if whole:
            if remembered:
                self._source.append(line)
            self._line, self._streams = "", -1

    def _waits(self, line: str) -> bool:
        """Whether more of the line could make it something else."""
        if self._frozen or self._table or (self._header and BARS.fullmatch(line)):
            return True
        return UNDECIDED.fullmatch(line) is not None

    def _begin(self, line: str, whole: bool) -> bool:
        """Find out what a line is, and draw it or let it stream; returns whether it bears on the lines that follow."""
        number = len(self._source)
        tokens = read_blocks(self._parser, [*self._source, line])
        leaf = last_leaf(tokens, number, self._signs.bullet)
        if self._frozen:
            if leaf.token and leaf.token.map == [number - 1, number + 1]:
                return self._go_on(leaf)
            self._frozen = None
        if leaf.kind == "table_open" and self._table:
            self._table[1].append(line)
            return False
        if leaf.kind == "table_open" and self._header:
            self._table, self._header = ([*self._source, line], [], self._header[1]), None
            return True
        self._settle()
        if not line.strip():
            self._spans.finish()
            self._blanks += 1
        elif whole or leaf.kind in STREAMED:
            self._source = still_bearing(self._source, leaf)
            if whole and leaf.kind == "paragraph_open" and leaf.text.lstrip().startswith("|"):
                self._header = line, leaf
            else:
                self._draw(leaf, line)
        return True

    def _settle(self) -> None:
        """Draw the table that has ended, or the line that began none."""
        if self._table:
            head, body, leaf = self._table
            self._table = None
            self._draw_table(read_table(read_blocks(self._parser, head + body), self._parser, self._code_mark), leaf)
        if self._header:
            line, leaf = self._header
            self._header = None
            self._draw(leaf, line)
            self._stream(line, whole=True)
            self._streams = -1

    def _draw_table(self, table: MarkdownTable, leaf: Leaf) -> None:
        """In columns, or row by row as "title: cell" where columns would be too narrow for the words."""
        page, leaf = self._page, Leaf("table_open", leaf.inside, True)
        self._start(leaf)
        lines = table_lines(table, page.width - page.column, self._signs == ASCII)
        for number, line in enumerate(lines or ()):
            if number:
                page.new_line()
            page.verbatim(line)
        for number, row in enumerate(table.rows[1:] if lines is None else ()):
            if number:
                self._start(Leaf(leaf.kind, tuple(replace(part, is_new=False) for part in leaf.inside), True))
            for text, style in row[0]:
                page.text(text, f"bold {style}".strip())
            indent = page.indent
            for title, cell in zip(table.rows[0][1:], row[1:], strict=True):
                page.start(indent + "  ", indent + "    ")
                for text, style in [*title, (": ", ""), *cell]:
                    page.text(text, style)
        page.flush()

    def _stream(self, line: str, whole: bool) -> None:
        self._spans.write(line[self._streams :])
        self._streams = len(line)
        if whole and self._leaf and self._leaf.kind == "heading_open":
            self._spans.finish()
        elif whole:
            self._spans.write("\n")

    def _draw(self, leaf: Leaf, line: str) -> None:
        if leaf.is_new or leaf.kind not in STREAMED:
            self._spans.finish()
        if leaf.kind in ("fence", "code_block") and any(part.is_new and not part.is_quote for part in leaf.inside):
            self._start(Leaf("", leaf.inside, True))  # code at the left edge, below the mark of its item
        match leaf.kind:
            case "paragraph_open":
                if leaf.is_new:
                    self._start(leaf)
                    self._spans.start()
                self._streams = len(line.rstrip()) - len(leaf.text.strip())
            case "heading_open" if leaf.is_new and (hashes := HASHES.search(line)) and leaf.token:
                self._start(leaf)
                self._spans.start(HEADINGS.get(leaf.token.tag, "bold"), heading=True)
                self._streams = hashes.end()
            case "heading_open" | "hr":  # a line below a text makes it a heading, too late: the line is drawn
                self._start(Leaf("hr", leaf.inside, True))
                self._page.verbatim([(self._signs.rule * (self._page.width - self._page.column), "dim")])
            case "fence" if leaf.token:
                self._code, self._frozen = Highlighter(leaf.token.info), leaf
            case "code_block":
                self._draw_code(leaf, leaf.text, self._blanks)
            case "formula" if leaf.token:
                self._start(leaf)
                self._page.verbatim([(leaf.text, "")])
                self._frozen = None if leaf.token.meta["closed"] else leaf
            case _ if leaf.is_new:
                self._start(leaf)
            case _:
                self._blanks += 1

    def _go_on(self, leaf: Leaf) -> bool:
        """A line of an open fence or formula; returns whether it ends it, which is all that later lines depend on."""
        assert leaf.token is not None, "an open block without a token"
        if leaf.kind == "formula":
            self._page.new_line()
            self._page.verbatim([(leaf.text, "")])
            if leaf.token.meta["closed"]:
                self._frozen = None
        elif not leaf.token.content:
            self._frozen = None
        elif self._frozen:
            self._draw_code(self._frozen, leaf.text, 0)
            self._frozen = Leaf("fence", leaf.inside, False)
        return self._frozen is None

    def _draw_code(self, leaf: Leaf, text: str, blanks: int) -> None:
        """At the left edge and without a frame, so that what is copied from the screen is the code alone."""
        if leaf.is_new:
            self._start(Leaf(leaf.kind, (), True))
        else:
            for _ in range(blanks + 1):
                self._page.new_line()
        self._blanks = 0
        self._page.verbatim(self._code.line(text) if self._code and leaf.kind == "fence" else [(text, "")])

    def _start(self, leaf: Leaf) -> None:
        """Begin a block behind the marks of what it stands in, with an empty line before it where it needs one."""
        last, quotes = self._leaf, ""
        apart = self._blanks or leaf.kind in (*APART, "heading_open") or (last and last.kind in APART)
        if last and leaf.inside and not leaf.inside[0].is_new and leaf.inside[0].is_quote:
            quotes = self._signs.bar
        first = rest = ""
        for container in leaf.inside:
            mark = (self._signs.bar if container.is_quote else container.mark) + " "
            indent = mark if container.is_quote else " " * len(mark)
            first, rest = first + (mark if container.is_new else indent), rest + indent
        self._page.start(first, rest, quotes if apart else None)
        self._leaf, self._blanks = leaf, 0
