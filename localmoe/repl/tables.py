"""A Markdown table laid out for a width by rich, when its last row is known; knows no stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from localmoe.repl.page import Fragment
from localmoe.repl.safe import visible
from localmoe.repl.spans import fragments

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

ALIGNMENT = "text-align:"
WIDEST = 10_000


@dataclass(frozen=True, slots=True)
class MarkdownTable:
    """Cells as styled text, the head being the first row, and how each column is justified."""

    rows: list[list[list[tuple[str, str]]]]
    justified: list[JustifyMethod]


def read_table(tokens: Sequence[Token], parser: MarkdownIt, code_mark: str) -> MarkdownTable:
    """The last table among block tokens."""
    begin = max(number for number, token in enumerate(tokens) if token.type == "table_open")
    table = MarkdownTable([], [])
    for token, inline in pairwise(tokens[begin:]):
        if token.type == "tr_open":
            table.rows.append([])
        elif token.type in ("th_open", "td_open"):
            cell = parser.parseInline(inline.content)[0].children or []
            table.rows[-1].append([(visible(text), style) for text, style in fragments(cell, code_mark=code_mark)])
            if token.type == "th_open":
                style = str(token.attrs.get("style", ALIGNMENT + "left"))
                table.justified.append(cast("JustifyMethod", style.removeprefix(ALIGNMENT)))
    return table


def table_lines(found: MarkdownTable, width: int, is_ascii: bool) -> list[list[Fragment]] | None:
    """The table with its cells folded to a width; None where words of its rows would have to be broken."""
    console = Console(width=width, color_system=None, legacy_windows=False, _environ={})
    table = Table(box=box.ASCII2 if is_ascii else box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title, justify in zip(found.rows[0], found.justified, strict=True):
        table.add_column(Text.assemble(*title), justify=justify, overflow="fold")
    for row in found.rows[1:]:
        table.add_row(*(Text.assemble(*cell) for cell in row))
    wanted = console.measure(table, options=console.options.update(max_width=WIDEST))
    if wanted.minimum > width and len(found.rows) > 1:
        return None
    table.leading = int(wanted.maximum > width)  # rows of several lines stand apart
    lines = console.render_lines(table, console.options.update(max_width=width), pad=False)
    return [_without_end([(piece.text, piece.style or "") for piece in line]) for line in lines]


def _without_end(line: list[Fragment]) -> list[Fragment]:
    """A line without the spaces at its end."""
    while line:
        text, style = line.pop()
        if text.rstrip():
            return [*line, (text.rstrip(), style)]
    return line
