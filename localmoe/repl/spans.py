"""The text of a paragraph as it comes: bold, code, links, drawn as soon as nothing later can change them; knows a page
and the parser, no blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from localmoe.repl.letters import is_wide
from localmoe.repl.page import Page

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

LIMIT = 240  # letters that wait for an end, such as that of **: three lines of 80 columns
MARKUP = re.compile(r"[\\`*_\[\]<>!&~$]")
STYLES = {"strong_open": "bold", "em_open": "italic", "s_open": "strike", "link_open": "underline"}
CODE, ADDRESS = "cyan", "dim"
OPEN_ADDRESS = re.compile(r"\]\((?:[^()]|\([^()]*\))*$")
OPEN_DOLLARS = re.compile(r"\$\$|\$(?![\s\d$])(?:(?!\*\*)[^\n$`])*$")
CLOSING_HASHES = re.compile(r"(?:^|[ \t]+)#+[ \t]*$")


class Spans:
    """What was written since the last place where all was decided is kept, parsed at the end of each word, and drawn
    once no mark in it still waits for its counterpart. After LIMIT letters it is drawn as it stands."""

    def __init__(self, page: Page, parser: MarkdownIt, code_mark: str = "") -> None:
        """`code_mark` is written around code where it cannot look different."""
        self._page, self._parser, self._code_mark = page, parser, code_mark
        self._held = ""
        self._style = ""
        self._heading = False

    def start(self, style: str = "", heading: bool = False) -> None:
        self._style, self._heading = style, heading

    def write(self, text: str) -> None:
        for letter in text:
            if self._held and is_wide(self._held[-1]) and letter.isalpha():
                self._decide()
            self._held += letter
            broken = self._held.endswith("\\\n")  # a line ends there if another one follows
            if (letter.isspace() and not broken) or len(self._held) > LIMIT:
                self._decide()

    def finish(self) -> None:
        """Nothing more will come: what still waits for its counterpart is text."""
        if self._heading:
            self._held = CLOSING_HASHES.sub("", self._held)
        self._draw(self._tokens(self._held.rstrip("\n"))[0])
        self._held = ""
        self._page.flush()

    def _decide(self) -> None:
        if self._heading and CLOSING_HASHES.fullmatch(self._held):
            return
        tokens, open = self._tokens(self._held)
        if not open or len(self._held) > LIMIT:
            self._draw(tokens)
            self._held = ""

    def _tokens(self, source: str) -> tuple[Sequence[Token], bool]:
        """What the parser reads, and whether later text could make it read otherwise."""
        from markdown_it.rules_inline import StateInline
        from markdown_it.token import Token

        if not MARKUP.search(source):
            return [Token("text", "", 0, content=source)], False
        state = StateInline(source, self._parser, {}, [])
        self._parser.inline.tokenize(state)
        for rule in self._parser.inline.ruler2.getRules(""):
            rule(state)
        return state.tokens, any(d.open and d.end < 0 for d in state.delimiters) or waits(state.tokens)

    def _draw(self, tokens: Sequence[Token]) -> None:
        for text, style in fragments(tokens, self._style, self._code_mark):
            self._page.text(text, style)


def waits(tokens: Sequence[Token]) -> bool:
    """Whether an opened code, link, address or formula has not found its end. A mark that has is no text any more."""
    text = "".join(token.content if token.type == "text" else "\0" for token in tokens)
    depth = 0
    for letter in text:
        depth = depth + 1 if letter == "[" else max(depth - 1, 0) if letter == "]" else depth
    return (
        depth > 0
        or "`" in text
        or OPEN_ADDRESS.search(text) is not None
        or OPEN_DOLLARS.search(text) is not None
        or any(token.type == "text_special" and token.markup in (r"\(", r"\[") for token in tokens)
    )


def fragments(tokens: Sequence[Token], style: str = "", code_mark: str = "") -> Iterator[tuple[str, str]]:
    """The visible text of inline tokens, each piece with its style; a link is followed by its address."""
    styles = [style] if style else []
    address = shown = ""
    for token in tokens:
        match token.type:
            case "strong_open" | "em_open" | "s_open" | "link_open":
                styles.append(STYLES[token.type])
                if token.type == "link_open":
                    address, shown = str(token.attrs["href"]), ""
            case "strong_close" | "em_close" | "s_close" | "link_close":
                styles.pop()
                if token.type == "link_close" and address not in ("", shown, f"mailto:{shown}"):
                    yield f" ({address})", " ".join([*styles, ADDRESS])
            case "softbreak" | "hardbreak":
                yield "\n", ""
            case "code_inline":
                yield code_mark + token.content + code_mark, " ".join([*styles, CODE])
                shown += token.content
            case "image":
                yield f"{token.content} ({token.attrs['src']})".lstrip(), " ".join([*styles, ADDRESS])
            case _:
                yield token.content, " ".join(styles)
                shown += token.content
