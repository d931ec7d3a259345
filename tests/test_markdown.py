"""Markdown drawn while it comes: what is drawn is what a parser of the whole text would say, however it was cut."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from answers import ANSWERS, PYTHON
from hypothesis import example, given, settings
from hypothesis import strategies as some

from localmoe.repl.dialect import dialect
from localmoe.repl.highlight import Highlighter
from localmoe.repl.markdown import ASCII, UNICODE, Markdown, Signs
from localmoe.repl.page import Fragment, Page
from localmoe.repl.safe import visible
from localmoe.repl.spans import LIMIT


def drawn(pieces: Iterable[str], width: int = 60, signs: Signs = UNICODE, style: str = "") -> list[Fragment]:
    """Everything that is drawn of a text that comes in pieces."""
    page = Page(lambda: width, style)
    markdown = Markdown(page, signs)
    found = []
    for piece in pieces:
        markdown.write(piece)
        found += page.take()
    markdown.end()
    return found + page.take()


def shown(text: str | Iterable[str], width: int = 60, signs: Signs = UNICODE) -> str:
    return "".join(part for part, _ in drawn([text] if isinstance(text, str) else text, width, signs))


def styled(text: str, width: int = 60) -> list[Fragment]:
    """Every letter with its style."""
    return [(letter, style) for part, style in drawn([text], width) for letter in part]


def looks(text: str, part: str) -> set[str]:
    """The styles of the letters of `part`."""
    found = styled(text)
    at = "".join(letter for letter, _ in found).index(part)
    return {str(style) for letter, style in found[at : at + len(part)] if letter.strip()}


def parsed_words(text: str) -> list[str]:
    """The words that markdown-it reads in a whole text, without what it draws itself."""
    words: list[str] = []
    for token in dialect().parse(text):
        match token.type:
            case "list_item_open" if token.info:
                words += [token.info + token.markup]
            case "fence" | "code_block" | "formula":
                words += token.content.split()
            case "inline":  # a line's indentation is none of it, in code neither; markdown-it keeps it there
                [inline] = dialect().parseInline(re.sub(r"^[ \t]+", "", token.content, flags=re.MULTILINE))
                words += inline_text(inline).split()
    return visible(" ".join(words)).split()


def inline_text(inline: object) -> str:
    text = ""
    for token in inline.children:  # type: ignore[attr-defined]
        match token.type:
            case "link_open":
                address, begin = token.attrs["href"], len(text)
            case "link_close":
                text += f" ({address})" if address and text[begin:] != address.removeprefix("mailto:") else ""
            case "image":
                text += f"{token.content} ({token.attrs['src']})"
            case "softbreak" | "hardbreak":
                text += "\n"
            case _:
                text += token.content
    return text


def shown_words(text: str) -> list[str]:
    signs = Signs("\ue000", "\ue001", "\ue002")
    return shown(text, 4000, signs).replace("─", " ").translate(dict.fromkeys(range(0xE000, 0xE003), " ")).split()


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_words_are_those_of_a_parser_that_sees_the_whole_answer(answer: str) -> None:
    assert shown_words(answer) == parsed_words(answer)


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_looks_the_same_letter_by_letter_word_by_word_and_whole(answer: str, width: int) -> None:
    whole = shown(answer, width)
    assert shown(answer, width) == whole
    assert shown(list(answer), width) == whole
    assert shown((word + " " for word in answer.split(" ")), width).rstrip() == whole.rstrip()
    assert shown([answer[at : at + 7] for at in range(0, len(answer), 7)], width) == whole


MARKS = "- ¦* ¦+ ¦1. ¦2) ¦10. ¦> ¦>¦ ¦  ¦   ¦    ¦\t¦  - ¦   - ¦# ¦## ¦#¦- [ ] ¦> - ¦-¦- - ¦    - ¦¦¦"
TEXTS = """\
a word¦two words¦**bold text**¦*a* b¦**a *b* c**¦***a* b**¦`code here`¦``a ` b``¦`open¦**open¦*open and¦a_b_c¦_x_ y
2 * 3 * 4¦*args and **kw¦[a link](http://x.y/z)¦[open¦[a] (b)¦[a](b "c d")¦![i](j.png)¦<http://a.b>¦<br>¦&amp; &#27;
~~gone~~¦~a¦```¦```py¦~~~¦---¦===¦***¦| a | b |¦|---|---|¦| c |¦a | b¦\\¦\\*a\\*¦a\\¦$x_1$ y¦$5 a $6¦\\(a_1\\)¦\\[
\\]¦$$¦x = 1¦日本語の文、です。¦**日本**語¦ends  ¦#¦# x #¦# >#¦1.¦12¦=¦-¦+ +¦`¦``¦a `b¦c` d¦[a¦b](c)¦![¦**a¦b**¦*¦**
_a¦b_¦~~a¦b~~¦&copy; &#x202e;"""
marks = some.sampled_from(MARKS.split("¦"))
texts = some.sampled_from(TEXTS.replace("\n", "¦").split("¦"))
lines = some.one_of(some.just(""), some.builds(lambda a, b, c: f"{a}{b}{c}", marks, marks, texts))
documents = some.lists(lines, min_size=1, max_size=7).map("\n".join)


@settings(max_examples=1500, deadline=None)
@given(documents)
@example("-   \n   - a word\n    - a word")
@example("- - a word\n  -    - a word\n\n      a word\na word")
@example("-\n\n  a\n  - b\n- c")
@example("1. a\n   - b\n\n     2. c\n\n   d")
@example("> > `\n> > a word\n>  `code here`")
def test_any_text_has_the_words_that_a_parser_of_the_whole_sees(text: str) -> None:
    assert shown_words(text) == parsed_words(text)


@settings(max_examples=600, deadline=None)
@given(documents, some.integers(12, 50), some.data())
def test_any_text_looks_the_same_however_it_is_cut(text: str, width: int, data: some.DataObject) -> None:
    cuts = sorted(data.draw(some.lists(some.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert drawn_letters(pieces, width) == drawn_letters([text], width) == drawn_letters(list(text), width)


def drawn_letters(pieces: list[str], width: int) -> list[Fragment]:
    return [(letter, style) for part, style in drawn(pieces, width) for letter in part]


def test_an_answer_at_40_columns() -> None:
    assert shown(PYTHON, 39).split("\n") == [
        "Sorting in Python",
        "",
        "You can sort a list with sorted() or in",
        "place with list.sort(). See",
        "the docs",
        "(https://docs.python.org/3/howto/sortin",
        "g.html) for more and less, snake_case",
        "and 2 * 3.",
        "",
        "Steps",
        "",
        "1. First, read the file, which is a",
        "   long sentence that has to be wrapped",
        "   at the width of the window:",
        "",
        "def read(path: str) -> list[int]:",
        '    """Read numbers.',
        "",
        '    One per line."""',
        "    return [int(x) for x in open(path)]  # 42",
        "",
        "2. Then sort.",
        "   • nested bold item with a long text",
        "     that goes on and on, so that it is",
        "     wrapped somewhere",
        "     • deeper",
        "   • another",
        "",
        "10. Done.",
        "",
        "│ A quote that is long enough to be",
        "│ wrapped at the end of the line, I",
        "│ hope it is.",
        "│",
        "│ • in a quote",
    ]


def test_a_table_is_drawn_when_its_last_row_is_known_and_folded_where_it_is_too_wide() -> None:
    table = "| Name | Value | What |\n|:-----|------:|:---:|\n| foo | 1 | **b** `c` |\n| `a \\| b` | | |\n"
    assert shown(table) == "Name    Value   What\n────────────────────\nfoo         1   b c\na | b"
    assert shown(table.replace("foo", "a longer text in a cell"), 24).split("\n") == [
        "Name        Value   What",
        "────────────────────────",
        "a longer        1   b c",
        "text in a",
        "cell",
        "",
        "a | b",
    ]
    page = Page(lambda: 60)
    markdown = Markdown(page)
    markdown.write("text\n" + table)
    assert "".join(part for part, _ in page.take()) == "text", "not before a line that is no row"
    assert markdown.table_rows == 2
    markdown.write("\n")
    assert "foo" in "".join(part for part, _ in page.take())


def test_a_table_too_wide_for_its_words_is_drawn_row_by_row() -> None:
    rows = [
        "| Language | Concurrency | Memory |",
        "|---|---|---|",
        "| **Rust** | async, threads | Ownership |",
        "| Go | Goroutines |",
    ]
    table = "\n".join("> " + row for row in rows)
    assert shown(table, 24).split("\n") == [
        "│ Rust",
        "│   Concurrency: async,",
        "│     threads",
        "│   Memory: Ownership",
        "│",
        "│ Go",
        "│   Concurrency:",
        "│     Goroutines",
        "│   Memory:",
    ]
    item = "- " + "\n  ".join(rows)
    assert [line for line in shown(item, 24).split("\n") if line[2:3].strip()] == ["• Rust", "  Go"]
    assert shown(table, 36).split("\n")[0] == "│ Language   Concurrency   Memory"
    assert shown("| Immeasurable |\n|---|", 9).replace("\n", "").startswith("Immeasurable")


def test_where_only_ascii_is_shown_the_marks_are_ascii() -> None:
    text = "- a\n\n> b\n\n---\n\n| a | b |\n|---|---|\n| c | d |"
    assert shown(text, 12, ASCII).isascii()
    assert shown(text, 12, ASCII).split("\n")[:5] == ["* a", "", "| b", "", "-" * 12]


@pytest.mark.parametrize(
    ("text", "part", "style"),
    [
        ("a **b c** d", "b c", "bold"),
        ("a *b* d", "b", "italic"),
        ("a ***b*** d", "b", "bold italic"),
        ("~~b~~", "b", "strike"),
        ("a `b *c*` d", "b *c*", "cyan"),
        ("[b](http://c.d)", "b", "underline"),
        ("[b](http://c.d)", "(http://c.d)", "dim"),
        ("<http://c.d>", "http://c.d", "underline"),
        ("# b **c**", "b", "bold underline"),
        ("### b", "b", "bold"),
        ("a snake_case_name b", "snake_case_name", ""),
        ("2 * 3 * 4", "2 * 3 * 4", ""),
        ("*args and **kwargs", "*args and **kwargs", ""),
        ("a `b c", "a `b c", ""),
        ("<b>c</b>", "<b>c</b>", ""),
        (r"$a_{i}_b$ and \(c_1 * d_2 *\)", r"$a_{i}_b$ and \(c_1 * d_2 *\)", ""),
        (r"$a \{ b \}$ c", r"$a \{ b \}$", ""),
        (r"so $$a \{ b \}$$ c", r"$$a \{ b \}$$", ""),
        (r"\(a \{ b \) c", r"\(a \{ b \)", ""),
        ("from $5 to $6_", "from $5 to $6_", ""),
        ("# b #", "b", "bold underline"),
    ],
)
def test_marks_become_looks(text: str, part: str, style: str) -> None:
    assert {frozenset(found.split()) for found in looks(text, part)} == {frozenset(style.split())}


def test_a_word_goes_out_when_it_has_ended_and_marks_wait_for_their_counterparts() -> None:
    page = Page(lambda: 60)
    markdown = Markdown(page)
    out = []
    for piece in ["Hel", "lo wor", "ld **bo", "ld te", "xt** a", "nd 2 * 3 ", "*x ", "y\n\n", "-", " it", "em "]:
        markdown.write(piece)
        out.append("".join(part for part, _ in page.take()))
    assert out == ["", "Hello", " world", "", " bold text", " and 2 * 3", "", " *x y", "", "\n\n• ", "item"]


def test_what_waits_too_long_is_text() -> None:
    text = "a **b " + "c " * LIMIT + "d** e"
    page = Page(lambda: 4000)
    markdown = Markdown(page)
    markdown.write(text[: LIMIT + 20])
    assert "".join(part for part, _ in page.take()).startswith("a **b c c")
    assert shown(text, 4000) == text


def test_code_is_at_the_left_edge_and_exact_so_that_it_can_be_copied() -> None:
    code = "def f():\n\treturn '*a* `b` '  \n\n    # " + "long " * 20
    for text in (f"```py\n{code}\n```", f"text\n~~~\n{code}\n~~~\n", f"```unheard-of {{x}}\n{code}"):
        assert shown(text, 30).removeprefix("text\n\n") == code
    item = "- a\n  ```\n  b\n\n    c\n  ```\n  d"
    assert shown(item) == "• a\n\nb\n\n  c\n\n  d"
    assert shown("a\n\n    b\n\n\n    c\n\nd") == "a\n\nb\n\n\nc\n\nd"


def kinds(language: str, *lines: str) -> list[list[tuple[str, str]]]:
    highlighter = Highlighter(language)
    return [[(text, style) for text, style in highlighter.line(line) if text.strip()] for line in lines]


def test_code_keeps_its_state_from_line_to_line() -> None:
    lines = kinds("python", "def f(x):", '    """Say', "    for all.", '    """', "    return 42  # why")
    assert lines[0][:2] == [("def", "magenta"), ("f", "bold")]
    assert {style for line in lines[1:4] for _, style in line} == {"green"}
    assert lines[4] == [("return", "magenta"), ("42", "cyan"), ("# why", "dim italic")]


@pytest.mark.parametrize("language", ["c", "javascript", "java", "css", "sql", "go", "rust", "typescript", "swift"])
def test_comments_over_several_lines_are_comments(language: str) -> None:
    comment = "dim italic"
    first, second, third, fourth = kinds(language, "a /* b", "for c", "*/ d", "/* e */ f")
    assert "".join(text for text, style in first if style == comment) == "/* b"
    assert {style for _, style in second} == {comment}
    assert "".join(text for text, style in third if style == comment) == "*/"
    assert "".join(text for text, style in fourth if style == comment) == "/* e */"


@pytest.mark.parametrize("language", "python bash json yaml html toml diff console cpp ruby php make lua x.y".split())
def test_the_pieces_of_a_line_are_the_line(language: str) -> None:
    lines = ["rm -rf /*", '{"a": [1, "b', "x = `a ${b} 'c", "", "<p a='b'> \t", "- a: |", "EOF", "日本 \u00e9"]
    highlighter = Highlighter(language)
    assert ["".join(text for text, _ in highlighter.line(line)) for line in lines] == lines


def test_control_characters_hide_in_no_mark() -> None:
    hidden = "&#x202e; `\x1b[2J` [a](http://b/\x1b) \x9b **\x07**\n\n```sh\n\x1b]0;x\x07\n```\n\n|\x1b[A|\n|---|\n"
    told = shown(hidden)
    assert not set(told) & set("\x1b\x07\x9b\u202e")


def test_reasoning_has_its_look_below_all_others() -> None:
    assert {style for _, style in drawn(["a **b**"], style="dim")} == {"dim", "dim bold"}


def test_a_text_of_one_endless_word_comes_out_while_it_grows() -> None:
    page = Page(lambda: 20)
    markdown = Markdown(page)
    markdown.write("x" * 50)
    assert not page.take()
    markdown.write("x" * 300)
    assert page.take()
    assert shown("x" * 50, 20) == "\n".join(["x" * 20, "x" * 20, "x" * 10])


def test_text_of_scripts_without_spaces_is_broken_anywhere_but_before_closing_marks() -> None:
    assert shown("日本語の文、です。", 11) == "日本語の\n文、です。"


@pytest.mark.parametrize("letter", ["👩\u200d💻", "👍🏽", "☝️", "が", "e\u0301"])
def test_no_line_ends_within_a_letter(letter: str) -> None:
    for width in range(8, 16):
        told = shown("日本" + letter * 12, width)
        assert all(line.replace("日", "").replace("本", "").replace(letter, "") == "" for line in told.split("\n")), (
            told
        )
