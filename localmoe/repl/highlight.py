"""Code coloured line by line, as it comes: pygments' lexers with their state kept between lines; draws nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pygments.lexer import Lexer, RegexLexer
    from pygments.token import _TokenType

Piece = tuple[str, str]  # of a line: its kind ("Comment.Single"), later its style, and its text
# Of the 16 colours of a terminal those that are read on light and on dark ground.
STYLES = {
    "Comment": "dim italic",
    "Keyword": "magenta",
    "Operator.Word": "magenta",
    "Literal.String": "green",
    "Literal.Number": "cyan",
    "Name.Function": "bold",
    "Name.Class": "bold",
    "Name.Builtin": "cyan",
    "Name.Decorator": "magenta",
    "Name.Tag": "magenta",
    "Generic.Deleted": "red",
    "Generic.Inserted": "green",
    "Generic.Heading": "bold",
    "Generic.Subheading": "bold",
    "Generic.Prompt": "bold",
}
WORD = re.compile(r"[\w+#.-]+")


class Highlighter:
    """One code block, of which each line is known once it is whole: a name is a function's if a bracket follows."""

    def __init__(self, language: str) -> None:
        """`language` is a fence's info string; unknown ones stay plain."""
        self._lexer = lexer_for(language)
        self._states = ["root"]
        self._has_comments = self._lexer is not None and _is_comment("/* */", self._pieces("/* */"))
        self._states = ["root"]
        self._comment = False  # inside /* */, which most lexers know in one piece only

    def line(self, text: str) -> list[tuple[str, str]]:
        """The pieces of the next line, each with a style; `text` is without its newline."""
        if self._lexer is None:
            return [(text, "")]
        drawn = []
        if self._comment:
            before, end, text = text.partition("*/")
            drawn.append((before + end, STYLES["Comment"]))
            self._comment = not end
            if not text:
                return drawn
        pieces = self._pieces(text + "\n")
        opened = self._comment_begins(pieces)
        if opened is not None:
            self._comment, at = True, 0
            for number, (kind, piece) in enumerate(pieces):
                if at + len(piece) > opened:
                    pieces[number:] = [(kind, text[at:opened]), ("Comment", text[opened:])]
                    break
                at += len(piece)
        return drawn + [(piece.rstrip("\n"), _style(kind)) for kind, piece in pieces]

    def _pieces(self, text: str) -> list[Piece]:
        from pygments.lexer import RegexLexer

        lexer = self._lexer
        assert lexer is not None
        if isinstance(lexer, RegexLexer) and type(lexer).get_tokens_unprocessed is RegexLexer.get_tokens_unprocessed:
            found = lexed(lexer, text, self._states)
        else:  # lexers that are programs of their own see each line alone
            found = ((kind, piece) for _, kind, piece in lexer.get_tokens_unprocessed(text))
        pieces = [(str(kind).removeprefix("Token."), piece) for kind, piece in found]
        return (
            pieces if "".join(piece for _, piece in pieces) == text else [("", text)]
        )  # some lexers leave out letters

    def _comment_begins(self, pieces: list[Piece]) -> int | None:
        """Where in the line a comment /* begins that does not end in it, unless the lexer's state remembers."""
        if not self._has_comments or "comment" in self._states[-1]:
            return None
        text, at = "".join(piece for _, piece in pieces), 0
        for kind, piece in pieces:
            begin = text.find("/*", at, at + len(piece) + 1)
            at += len(piece)
            is_other = kind.startswith("Literal.String") or (kind.startswith("Comment") and not piece.startswith("/*"))
            if begin >= 0 and not is_other and "*/" not in text[begin + 2 :]:
                return begin
        return None


def lexer_for(language: str) -> Lexer | None:
    """pygments' lexer for the first word of a fence's info string, if there is one."""
    word = WORD.search(language)
    if word is None:
        return None
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(word[0].lower())
    except ClassNotFound:
        return None


def lexed(lexer: RegexLexer, text: str, states: list[str]) -> Iterator[tuple[_TokenType, str]]:
    """The tokens of `text` by the lexer's own rules. `states` is the stack to begin in, and afterwards the one in which
    the text ended, which `get_tokens_unprocessed` does not tell."""
    from pygments.token import Error, Whitespace, _TokenType

    rules, at = lexer._tokens, 0
    while True:
        for match, action, change in rules[states[-1]]:
            found = match(text, at)
            if found is None:
                continue
            if isinstance(action, _TokenType):
                yield action, found.group()
            elif action is not None:
                yield from ((kind, piece) for _, kind, piece in action(lexer, found))
            at = found.end()
            _change(states, change)
            break
        else:
            if at >= len(text):
                return
            if text[at] == "\n":  # a line that no rule understands begins again, as in pygments
                states[:] = ["root"]
            yield (Whitespace if text[at] == "\n" else Error), text[at]
            at += 1


def _change(states: list[str], change: int | str | tuple[str, ...] | None) -> None:
    for step in change if isinstance(change, tuple) else () if change is None else (change,):
        if isinstance(step, int) or step == "#pop":
            count = -step if isinstance(step, int) else 1
            del states[max(len(states) - count, 1) :]
        else:
            states.append(states[-1] if step == "#push" else step)


def _is_comment(text: str, pieces: list[Piece]) -> bool:
    return text == "".join(piece for kind, piece in pieces if kind.startswith("Comment"))


def _style(kind: str) -> str:
    while kind not in STYLES and "." in kind:
        kind = kind.rpartition(".")[0]
    return STYLES.get(kind, "")
