"""The line below a streaming answer: never in the way of the text, never left behind, nothing where it cannot be."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some
from rich.console import Console
from terminal import Terminal

from localmoe.experts.telemetry import Counts, Room
from localmoe.memory import Resident
from localmoe.repl import residency
from localmoe.repl.render import Answer
from localmoe.repl.status import end_column

STATUS = "hit 83 %"


class Wire(io.StringIO):
    """What is written reaches a terminal."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self.terminal = terminal

    def write(self, text: str) -> int:
        self.terminal.write(text)
        return super().write(text)


def on(terminal: Terminal, **how: Any) -> Console:
    usual = {"width": terminal.width, "height": terminal.height, "force_terminal": True}
    return Console(file=Wire(terminal), highlight=False, **usual | how)


def streamed(pieces: list[str], terminal: Terminal, below: str, *, watch: bool = False) -> list[str]:
    """All lines of a terminal after an answer in pieces."""
    answer = Answer(on(terminal), markdown=False, below=(lambda columns: below[:columns]) if below else None)
    for piece in pieces:
        answer.write("answer", piece)
        if watch and below and not terminal.waits and not answer.empty:
            row, _ = terminal.position
            assert terminal.lines[row + 1 :] == [below], "the line is below the text"
    answer.end()
    return terminal.lines


pieces = some.lists(some.text("ab 日é.\n", min_size=1, max_size=12), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(pieces, some.integers(13, 17), some.integers(4, 7), some.integers(0, 3))
@example(["a" * 13, "b"], 13, 4, 3)
@example(["a" * 12, "日", "b"], 13, 4, 0)
def test_a_text_stands_on_the_terminal_as_if_there_had_been_no_line(
    texts: list[str], width: int, height: int, row: int
) -> None:
    plain = streamed(texts, Terminal(width, height, row), "")
    assert streamed(texts, Terminal(width, height, row), STATUS, watch=True) == plain


def test_the_line_is_redrawn_in_one_piece_with_the_text() -> None:
    terminal = Terminal(40, 8)
    console = on(terminal)
    answer = Answer(console, markdown=False, below=lambda columns: STATUS)
    written: list[str] = []
    wire = console.file
    write = wire.write
    wire.write = lambda text: written.append(text) or write(text)  # type: ignore[method-assign]
    answer.write("answer", "one")
    answer.write("answer", " two")
    assert len(written) == 2, "one write to the terminal for each piece: nothing flickers"
    assert terminal.lines == ["one two", STATUS]


@pytest.mark.parametrize("how", [{"force_terminal": False}, {"_environ": {"TERM": "dumb"}}, {"height": 3}])
def test_there_is_no_line_off_a_terminal_on_a_dumb_one_and_on_one_too_low(how: dict[str, Any]) -> None:
    terminal = Terminal(40, 8)
    console = on(terminal, **how)
    answer = Answer(console, markdown=False, below=lambda columns: STATUS)
    answer.write("answer", "one\n\ntwo")
    answer.end()
    assert console.file.getvalue() == "one\n\ntwo\n"


def test_without_colour_the_line_is_still_there() -> None:
    terminal = Terminal(40, 8)
    answer = Answer(on(terminal, no_color=True), markdown=False, below=lambda columns: STATUS)
    answer.write("answer", "one")
    assert terminal.lines == ["one", STATUS]


@pytest.mark.parametrize("text", ["a\tb", "e\u0301", "👍🏽", "👩\u200d💻", "🇩🇪"])
def test_where_terminals_differ_in_width_the_line_waits_for_a_new_one(text: str) -> None:
    assert end_column(text, 0, 40) is None
    assert end_column(text + "\nab", 0, 40) == 2
    terminal = Terminal(40, 8)
    answer = Answer(on(terminal), markdown=False, below=lambda columns: STATUS)
    answer.write("answer", "one")
    answer.write("answer", text)
    assert STATUS not in terminal.lines


def test_a_window_of_another_width_is_believed_from_the_next_line_on() -> None:
    terminal = Terminal(40, 8)
    console = on(terminal)
    answer = Answer(console, markdown=False, below=lambda columns: STATUS)
    answer.write("answer", "one")
    console.width = 30
    answer.write("answer", " two")
    assert terminal.lines == ["one two"]
    answer.write("answer", " three\nfour")
    assert terminal.lines == ["one two three", "four", STATUS]


COUNTS = Counts(steps=10, tokens=10, chosen=800, hits=664, nbytes_read=2_100_000_000, waited_seconds=6.1, seconds=10.0)
ROOM = Room(14_200_000_000, 3_900_000_000, 2_310_000_000, 6_000_000_000, 1_100_000_000, 400_000_000)


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "resident", lambda: Resident(4_700_000_000, 1_100_000_000, 5_900_000_000))


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (76, "hit 83 % · 0.21 GB/token · read 61 % compute 39 % · RSS 5.8/6.0 GB"),
        (66, "hit 83 % · 0.21 GB/token · read 61 % compute 39 % · RSS 5.8/6.0 GB"),
        (65, "hit 83 % · 0.21 GB/token · read 61 % compute 39 %"),
        (36, "hit 83 % · 0.21 GB/token · read 61 %"),
        (35, "hit 83 % · 0.21 GB/token"),
        (12, "hit 83 %"),
        (7, ""),
    ],
)
def test_the_line_says_as_much_as_fits(columns: int, line: str) -> None:
    assert residency.status(COUNTS, ROOM, columns) == line


def test_where_nobody_counts_there_is_no_line() -> None:
    assert residency.status(Counts(), None, 80) == ""


def test_little_that_was_read_is_told_in_smaller_units() -> None:
    assert residency.figures(Counts(tokens=4, chosen=8, hits=8)) == ["hit 100 %", "0.00 GB/token"]
    assert residency.figures(Counts(tokens=4, chosen=8, hits=6, nbytes_read=4_000_000))[1] == "1 MB/token"
