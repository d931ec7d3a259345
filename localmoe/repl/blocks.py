"""Which Markdown block the last line of a text belongs to, asked of markdown-it; draws nothing, keeps nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

LEAVES = frozenset({"paragraph_open", "heading_open", "fence", "code_block", "hr", "formula", "table_open"})
MARKS = r"[ \t>]*(?:(?:[-+*]|\d{1,9}[.)])[ \t]+[ \t>]*)*"  # quotes, bullets and numbers before a text
UNDECIDED = re.compile(
    MARKS
    + r"""(?:
        | [-+*] | ([-*_])[ \t]*(?:\1[ \t]*)*     # a bullet, a rule, bold text
        | =+[ \t]* | \#{1,6}[ \t]* | \d{1,9}[.)]?
        | `{1,2} | `{3,}[^`]* | ~{1,2} | ~{3,}.*
        | \|.* | \$ | \$\$.* | \\ | \\\[.*       # a table, a formula
    )""",
    re.VERBOSE,
)


MARK_LETTERS = " \t>-+*.)0123456789"
MARK = re.compile(r"[ \t]*(?:[-+*]|\d{1,9}[.)])[ \t]+")


@dataclass(frozen=True, slots=True)
class Container:
    """A quote (without a mark), or an item of a list, begun in line `start`; `is_new`: that is the last line."""

    mark: str
    start: int
    is_new: bool

    @property
    def is_quote(self) -> bool:
        return not self.mark


@dataclass(frozen=True, slots=True)
class Leaf:
    """The block of the last line; `kind` is "" where there is none yet, as behind a bare bullet. `text` is what the
    block has of that line."""

    kind: str
    inside: tuple[Container, ...]
    is_new: bool
    text: str = ""
    token: Token | None = None


def read_blocks(parser: MarkdownIt, lines: Sequence[str]) -> list[Token]:
    """Block tokens; the text within blocks is not parsed."""
    tokens: list[Token] = []
    parser.block.parse("\n".join(lines) + "\n", parser, {}, tokens)
    return tokens


def last_leaf(tokens: Sequence[Token], last: int, bullet: str) -> Leaf:
    """What line number `last`, the last one, is."""
    inside: list[Container] = []
    bare: tuple[Container, ...] = ()
    for token, following in zip(tokens, [*tokens[1:], None], strict=False):
        first, end = token.map or (0, 0)
        covers = first <= last < end
        match token.type:
            case "blockquote_open":
                inside.append(Container("", first, first == last))
            case "list_item_open":
                mark = token.info + token.markup if token.info else bullet
                inside.append(Container(mark, first, first == last))
            case "blockquote_close" | "list_item_close":
                inside.pop()
            case kind if covers and kind in LEAVES:
                lines = (following.content if following and kind == "paragraph_open" else token.content).split("\n")
                text = lines[-1] if kind == "paragraph_open" else (lines[:-1] or lines)[-1]
                return Leaf(kind, tuple(inside), first == last, text, token)
        if covers and inside:
            bare = tuple(inside)
    return Leaf("", bare, any(container.is_new for container in bare))


def still_bearing(lines: Sequence[str], leaf: Leaf) -> list[str]:
    """Of the lines before a block, those that bear on it and on what follows: of a list, the marks that it stands
    behind. So that a long list is not read anew with each of its lines."""
    if not leaf.is_new or any(container.is_quote and not container.is_new for container in leaf.inside):
        return list(lines)
    kept = Counter(container.start for container in leaf.inside if not container.is_new)
    marks = [(MARK.findall(lines[start]), count) for start, count in kept.items()]
    if any(len(found) < count for found, count in marks) or any(not lines[start].strip(MARK_LETTERS) for start in kept):
        return list(lines)  # behind a bare mark other columns count
    return [line for found, count in marks for line in ("".join(found[:count]) + "x", "")]
