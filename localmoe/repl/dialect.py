"""The Markdown that models write, as markdown-it reads it: GitHub's tables and strikethrough, no HTML, formulas as they
are; knows nothing of streams or terminals."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_block import table as any_table
from markdown_it.rules_inline import StateInline

FORMULA_MARKS = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"))
# Pandoc's rule (tex_math_dollars), and no digit first: "$5 and $10" are prices, "$PATH and **more**" is none either.
DOLLARS = re.compile(r"\$(?![\s\d$])(?:(?!\*\*)[^\n$`])*(?<!\s)\$(?!\w)")
DISPLAY_MARKS = {"$$": "$$", r"\[": r"\]"}


def dialect() -> MarkdownIt:
    """A parser. References are left as they are: where a link leads must be known when it is drawn. A table's first
    line begins with a bar, so that other lines need not wait for the next one to be known as text."""
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("strikethrough").disable("reference")
    parser.block.ruler.before("code", "table", barred_table, {"alt": ["paragraph"]})
    parser.block.ruler.before("fence", "formula", displayed_formula, {"alt": ["paragraph", "blockquote"]})
    parser.inline.ruler.before("escape", "formula", formula)
    return parser


def barred_table(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    begin = state.bMarks[first] + state.tShift[first]
    return state.src.startswith("|", begin) and any_table(state, first, end, silent)


def displayed_formula(state: StateBlock, first: int, end: int, silent: bool) -> bool:
    r"""Lines from $$ or \[ at the beginning of one to its counterpart at the end of one, or to an empty line."""
    if state.is_code_block(first):
        return False
    closing = DISPLAY_MARKS.get(_line(state, first)[:2])
    if closing is None:
        return False
    opened = _line(state, first)[2:]
    if closing in opened and not opened.rstrip().endswith(closing):
        return False
    if silent:
        return True
    line, closed = first + 1, opened.rstrip().endswith(closing)
    while not closed and line < end and not state.isEmpty(line) and state.sCount[line] >= state.blkIndent:
        closed = _line(state, line).rstrip().endswith(closing)
        line += 1
    token = state.push("formula", "", 0)
    token.content = state.getLines(first, line, state.blkIndent, True)
    token.map = [first, line]
    token.meta = {"closed": closed}
    state.line = line
    return True


def formula(state: StateInline, silent: bool) -> bool:
    """A formula within a line: neither emphasis nor escapes are looked for inside."""
    begin = state.pos
    end = _formula_end(state.src, begin)
    if end is None or end > state.posMax:
        return False
    if not silent:
        state.push("formula", "", 0).content = state.src[begin:end]
    state.pos = end
    return True


def _formula_end(text: str, begin: int) -> int | None:
    for opening, closing in FORMULA_MARKS:
        if text.startswith(opening, begin):
            end = text.find(closing, begin + 2)
            return end + 2 if end > 0 else None
    match = DOLLARS.match(text, begin)
    return match.end() if match else None


def _line(state: StateBlock, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]]
