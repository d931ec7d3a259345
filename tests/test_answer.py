"""An answer on terminals of all kinds: what stands there in the end, what stood below it, what went down the wire."""

from __future__ import annotations

import io
from typing import Any

import pytest
from answers import ANSWERS, PYTHON
from hypothesis import given, settings
from hypothesis import strategies as some
from rich.console import Console
from terminal import Terminal
from test_status import on

from localmoe.repl import answer as answers
from localmoe.repl.answer import Answer, Thought, lasting
from localmoe.repl.render import Screen

STATUS = "hit 83 %"
NO_COLOUR, DUMB = {"_environ": {"NO_COLOR": "1"}}, {"_environ": {"TERM": "dumb"}}


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later."""
    seconds = iter(range(1_000_000))
    monkeypatch.setattr(answers, "monotonic", lambda: float(next(seconds)))


def piped() -> Screen:
    console = Console(file=io.StringIO(), width=40, highlight=False)
    return Screen(console, console)


def letters(text: str) -> list[tuple[str, str]]:
    return [("answer", letter) for letter in text]


def after(pieces: list[tuple[str, str]], width: int = 40, height: int = 60, **how: Any) -> list[str]:
    """All lines of a terminal after an answer."""
    terminal = Terminal(width, height)
    written(Answer(on(terminal), **how), pieces)
    return terminal.lines


def written(answer: Answer, pieces: list[tuple[str, str]]) -> None:
    for kind, text in pieces:
        answer.write(kind, text)
    answer.end()


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("answer", ANSWERS)
def test_with_a_line_below_the_screen_ends_as_without_however_the_answer_came(answer: str, width: int) -> None:
    whole = after([("answer", answer)], width)
    below = {"below": lambda columns: STATUS}
    assert after(letters(answer), width, **below) == whole
    assert after([("answer", word + " ") for word in answer.split(" ")], width, 8, **below) == whole
    assert after([("answer", answer)], width, 8, **below) == whole


@settings(max_examples=100, deadline=None)
@given(some.text("ab 日é-*`#|>1.\n", max_size=60), some.integers(12, 30), some.integers(4, 8))
def test_any_text_stands_there_as_if_there_had_been_no_line(text: str, width: int, height: int) -> None:
    plain = after([("answer", text)], width, height)
    assert after(letters(text), width, height, below=lambda columns: STATUS[:columns]) == plain


def test_nothing_that_was_drawn_is_drawn_again() -> None:
    """Without a line below, what goes down the wire is text and colours alone."""
    terminal = Terminal(80, 8)
    console = on(terminal, color_system="standard")
    for part in (1, 3, 2000):
        written(Answer(console), [("answer", PYTHON[at : at + part]) for at in range(0, len(PYTHON), part)])
    codes = console.file.getvalue().split("\x1b")[1:]
    assert codes
    assert all(code.startswith("[") and code.lstrip("[0123456789;").startswith("m") for code in codes)


REASONING = [("reasoning", "\nhm, "), ("reasoning", "so "), ("reasoning", "it is.\n")]
THOUGHT = [*REASONING, ("answer", "\n\n"), ("answer", "Yes.")]


def test_reasoning_is_one_line_while_it_comes_and_one_afterwards() -> None:
    terminal = Terminal(60, 8)
    answer = Answer(on(terminal))
    seen = []
    for kind, text in REASONING:
        answer.write(kind, text)
        seen.append(terminal.lines[-1])
    assert seen == [
        "thinking 1.0 s · 1 token · …hm,",
        "thinking 2.0 s · 2 tokens · …hm, so",
        "thinking 3.0 s · 3 tokens · …hm, so it is.",
    ]
    written(answer, THOUGHT[3:])
    assert terminal.lines == ["thought for 3.0 s (3 tokens; /think show)", "", "Yes."]


def test_news_stand_in_the_line_below_until_more_is_written() -> None:
    for how in ({}, {"below": lambda columns: STATUS}):
        terminal = Terminal(40, 8)
        answer = Answer(on(terminal), markdown=False, **how)
        answer.write("answer", "Once upon")
        answer.tell("making room, 0 of 30 tokens" + "!" * 40)
        assert terminal.lines == ["Once upon", "making room, 0 of 30 tokens!!!!!!!!!"]
        answer.tell("making room, 16 of 30 tokens")
        assert terminal.lines == ["Once upon", "making room, 16 of 30 tokens"]
        answer.write("answer", " a time")
        assert terminal.lines == ["Once upon a time", *([STATUS] if how else [])]
        answer.tell("")
        answer.end()
        assert terminal.lines == ["Once upon a time"]


def test_news_of_a_pipe_are_not_written() -> None:
    on_pipe = piped()
    answer = on_pipe.answer()
    answer.write("answer", "Once")
    answer.tell("making room")
    answer.end()
    assert on_pipe.console.file.getvalue() == "Once\n"  # type: ignore[attr-defined]


def test_of_a_long_reasoning_the_last_words_are_told_as_far_as_the_window_goes() -> None:
    terminal = Terminal(40, 8)
    answer = Answer(on(terminal), tokens=lambda: 1234)
    answer.write("reasoning", "first I thought of \x1b[2J\nmany things, then of 日本 and others")
    assert terminal.lines[-1] == "thinking 1.0 s · 1234 tokens"
    answer.write("reasoning", "!")
    answer.end()
    assert terminal.lines == ["thought for 2.0 s (/think show)"]
    for width, line in ((20, "thinking 1.0 s"), (48, "thinking 1.0 s · 2 tokens · …日本 and others")):
        terminal = Terminal(width, 8)
        answer = Answer(on(terminal), tokens=lambda: 2)
        answer.write("reasoning", "first I thought of \x1b[2J\nmany things, then of 日本 and others")
        assert terminal.lines[-1] == line


def test_reasoning_may_be_shown_before_the_answer() -> None:
    assert after(THOUGHT, folds=False) == ["hm, so it is.", "", "thought for 3.0 s (3 tokens)", "", "Yes."]


def test_reasoning_that_was_folded_can_be_shown_later() -> None:
    terminal = Terminal(60, 20)
    screen = Screen(on(terminal))
    assert screen.thought is None
    written(screen.answer(), THOUGHT)
    assert screen.thought == Thought("hm, so it is.\n", 3.0, 3)
    screen.show_reasoning(screen.thought)
    assert terminal.lines[3:] == ["hm, so it is.", "", "thought for 3.0 s (3 tokens)"]
    written(screen.answer(), letters("No."))
    assert screen.thought is None, "the last answer had none"


def test_an_answer_that_is_reasoning_alone_is_not_empty() -> None:
    terminal = Terminal(60, 8)
    answer = Answer(on(terminal))
    written(answer, THOUGHT[:2])
    answer.end()
    assert terminal.lines == ["thought for 2.0 s (2 tokens; /think show)"]
    assert (answer.empty, answer.answered) == (False, False)


def test_empty_reasoning_is_no_reasoning() -> None:
    assert after([("reasoning", "\n"), ("reasoning", "\n"), ("answer", "\n\nYes.")]) == ["Yes."]


@pytest.mark.parametrize("how", [DUMB, {"force_terminal": False}])
def test_where_no_line_can_be_drawn_again_reasoning_stands_between_marks(how: dict[str, Any]) -> None:
    terminal = Terminal(40, 20)
    written(Answer(on(terminal, **how)), THOUGHT)
    assert terminal.lines == ["(reasoning)", "hm, so it is.", "", "(answer)", "Yes."]


def test_off_a_terminal_an_answer_is_exact() -> None:
    for answer in ANSWERS:
        screen = piped()
        written(screen.answer(exact=True), letters(answer))
        assert screen.console.file.getvalue() == answer.strip() + "\n"


def test_a_carriage_return_ends_a_line_with_its_newline_and_is_shown_elsewhere() -> None:
    for pieces in (["a\r\n\r\nb\rc\r"], list("a\r\n\r\nb\rc\r")):
        assert after([("answer", piece) for piece in pieces]) == ["a", "", "b\\rc\\r"]


def test_markdown_can_be_turned_off() -> None:
    screen = Screen(on(Terminal(40, 8)))
    screen.markdown = False
    written(screen.answer(), letters("a **b** c\n\n"))
    assert screen.console.file.getvalue() == "a **b** c\n"


def test_a_dumb_terminal_gets_words_wrapped_and_no_code_at_all() -> None:
    console = on(Terminal(24, 8), **DUMB)
    written(Answer(console), letters("a **bold** word and `code`, a line that goes on"))
    assert console.file.getvalue() == "a bold word and `code`,\na line that goes on\n"


def test_without_colour_bold_is_bold_and_code_keeps_its_marks() -> None:
    console = on(Terminal(40, 8), color_system="standard", **NO_COLOUR)
    written(Answer(console), letters("a **bold** `code`\n```py\nreturn 1\n```"))
    assert console.file.getvalue() == "a \x1b[1mbold\x1b[0m `code`\n\nreturn 1\n"


def test_a_window_that_changes_its_width_has_the_new_one_from_the_next_word_on() -> None:
    terminal = Terminal(40, 8)
    console = on(terminal)
    answer = Answer(console)
    answer.write("answer", "word " * 3)
    console.width = 20
    answer.write("answer", "word " * 5)
    answer.end()
    assert terminal.lines == ["word word word word", "word word word word"]


def test_a_table_and_a_long_line_of_code_are_told_while_they_wait() -> None:
    terminal = Terminal(40, 20)
    answer = Answer(on(terminal))
    answer.write("answer", "Look:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    assert terminal.lines == ["Look:", "a table, 1 row"]
    answer.write("answer", "\n```\n" + "some code " * 5)
    assert terminal.lines[-1] == "…code some code some code some code"
    answer.end()
    assert terminal.lines == [
        "Look:",
        "",
        "a   b",
        "─────",
        "1   2",
        "",
        "some code some code some code some code",
        "some code",
    ]


def test_times() -> None:
    assert [lasting(seconds) for seconds in (0.04, 8.25, 59.9, 61.2, 3725)] == [
        "0.0 s",
        "8.2 s",
        "59.9 s",
        "1 min 1 s",
        "62 min 5 s",
    ]
