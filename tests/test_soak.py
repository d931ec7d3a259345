"""Thousands of random lines, Ctrl+C at random moments among them: nothing is raised, and the journal says what was
said."""

from __future__ import annotations

import faulthandler
import io
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import FrameType

import pytest
from fakes import FakeModel
from rich.console import Console

from localmoe.conversation.library import Library
from localmoe.conversation.tree import Conversation
from localmoe.errors import FileFormatError
from localmoe.experts.loading import Loading
from localmoe.repl.commands import COMMANDS
from localmoe.repl.loop import converse
from localmoe.repl.models import OpenModels
from localmoe.repl.render import Screen
from localmoe.repl.talk import Talk
from localmoe.session import Session

REPLIES = {
    "hello": "Hi there, how are you?",
    "think": "<think>hm hm</think>Yes.",
    "none": "",
    "code": "```py\nx = 1\n```",
}
MOST_DELAY = 0.004  # seconds before a Ctrl+C: a command takes about one of a thousand


class Mashed:
    """Types random lines, and presses Ctrl+C some time after one of four."""

    def __init__(self, random: Random, count: int, words: list[str], files: Path) -> None:
        self._random, self._left, self._words, self._files = random, count, words, files
        self.typed: list[str] = []

    def read(self, text: str = "") -> str:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._left == 0:
            raise EOFError
        self._left -= 1
        line = self._line() if not text or self._random.random() < 0.5 else text
        self.typed.append(line)
        if self._random.random() < 0.25:
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-5, MOST_DELAY))
        return line

    def read_block(self) -> str:
        return "\n".join(self._random.choices(self._words, k=3))

    def _line(self) -> str:
        random = self._random
        name = random.choice([*COMMANDS, *COMMANDS, "nothing"])
        if random.random() < 0.4 or name == "exit":
            return random.choice([*REPLIES, "ab", "a longer question than the others", "  "])
        argument = {
            "model": ["second.gguf", "fake.gguf", "missing.gguf", "small.gguf"],
            "template": ["chatml", "own", "zephyr", "doctor", "show", "nope"],
            "lazy": ["off", "mmap", "slots 1GiB", "auto", "maybe"],
            "ctx": ["stop", "drop", "shift", "x"],
            "set": ["temperature 0", "top_k 5", "max_tokens 4", "max_tokens 0", "top_p 7", "seed 1"],
            "think": ["on", "off", "budget 3", "budget 0", "show", "hide"],
            "read": [str(self._files / "*.txt"), str(self._files / "a.txt"), "none", "/dev/null", "/nowhere"],
            "save": ["one", "two", "a/b", "three"],
            "load": ["one", "two", "2026", "nobody"],
            "delete": ["one", "two", "nobody"],
        }.get(name, ["", "1", "2", "9", "hello", "1 hello"])
        return f"/{name} {random.choice(['', *argument])}".strip()


def models(second: FakeModel, small: FakeModel) -> OpenModels:
    first = FakeModel(REPLIES)
    for model in (first, second, small):
        model.reasoning = ("<think>", "</think>")
    others = {"second": second, "small": small}

    def load(path: Path, loading: Loading) -> FakeModel:
        found = others.get(path.stem) or (first if path.stem == "fake" else None)
        if found is None:
            raise FileFormatError(f"{path}: no such file")
        found.path, found.closed = path, False
        return found

    return OpenModels(first, load)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """The alarm clock presses Ctrl+C."""

    def press(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, press)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _a_hang_ends_the_run() -> Iterator[None]:
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def told(conversation: Conversation) -> object:
    messages = [
        (m.id, m.parent, m.role, m.content, m.tokens, m.finish, m.model) for m in conversation.messages.values()
    ]
    state = conversation.head, conversation.first, conversation.summary, conversation.system, conversation.facts
    return messages, state


def soak(count: int, seed: int, folder: Path, *, terminal: bool) -> Mashed:
    (folder / "a.txt").write_text("some text")
    library = Library(folder / "kept")
    written = io.StringIO()
    console = Console(file=written, width=40, height=24, highlight=False, color_system=None, force_terminal=terminal)
    opened = models(FakeModel(REPLIES, context=300), FakeModel(REPLIES, context=40))
    session = Session(opened.current)
    saved = library.open_new()
    session.start(saved.conversation)
    talk = Talk(session, Screen(console, console), opened, library=library, saved=saved)
    mashed = Mashed(Random(seed), count, [*REPLIES, "/end", ""], folder)
    try:
        converse(talk, mashed)
    except BaseException as error:
        raise AssertionError(f"after {mashed.typed[-5:]}: {written.getvalue()[-500:]}") from error
    talk.screen.line("the end")
    assert written.getvalue().endswith("the end\n"), "something is left in rich's buffer"
    assert talk.saved
    name, state = talk.saved.name, told(talk.session.conversation)
    talk.close()
    opened.close()
    if name:
        again = library.open_named(name)
        assert not again.problem
        assert told(again.conversation) == state
        again.close()
    for other in library.names():
        found = library.open_named(other)
        assert not found.problem, other
        found.close()
    return mashed


# Python drops an exception that is raised inside a callback of a weak reference.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("ctrl_c"),
]


def test_nothing_is_raised_and_the_journal_says_what_was_said(tmp_path: Path) -> None:
    typed = soak(700, 1, tmp_path, terminal=False).typed
    assert {line.split()[0] for line in typed if line.startswith("/")} >= {f"/{n}" for n in COMMANDS if n != "exit"}


def test_a_terminal_with_bars_and_a_line_below(tmp_path: Path) -> None:
    soak(300, 1, tmp_path, terminal=True)


@pytest.mark.conformance
@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_lines(tmp_path: Path, seed: int) -> None:
    soak(1000, seed + 2, tmp_path, terminal=seed % 2 == 0)
