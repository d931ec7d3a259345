"""The whole chat killed at random moments: every conversation opens, and what stood on the screen is in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from localmoe.conversation.library import Library

TESTS = Path(__file__).parent
CHAT = """
import sys, time
from pathlib import Path
from fakes import FakeModel
from rich.console import Console
from localmoe.conversation.library import Library
from localmoe.repl.loop import converse
from localmoe.repl.render import Screen
from localmoe.repl.talk import Talk
from localmoe.session import Session

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
replies = {f"q{n}": f"answer {n}: " + "word after word " * (n % 7) + "end." for n in range(2000)}
model = FakeModel(replies, context=100000)
model.before_call = lambda: time.sleep(0.0002)
library = Library(folder)
saved = library.open_new()
session = Session(model, conversation=saved.conversation)
talk = Talk(session, Screen(Console(highlight=False, width=200)), library=library, saved=saved)

class Typing:
    count = 0
    def read(self, text=""):
        sys.stdout.flush()
        self.count += 1
        step = self.count % 9
        number = self.count + 10 * seed
        return {3: "/regen", 5: f"/edit 1 q{number}", 7: "/undo", 8: f"/set seed {number}"}.get(step, f"q{number}")
    def read_block(self):
        return ""

class Flushed:
    def write(self, text):
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
    def flush(self):
        sys.__stdout__.flush()

talk.screen.console.file = Flushed()
converse(talk, Typing())
"""


def killed(folder: Path, seed: int) -> str:
    """What stood on the screen of a chat that was killed."""
    random = Random(seed)
    process = subprocess.Popen(
        [sys.executable, "-c", CHAT, str(folder), str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )
    assert process.stdout
    begun = process.stdout.read(1)  # it talks
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    rest, errors = process.communicate(timeout=60)
    assert not errors, errors.decode()
    return (begun + rest).decode()


def check(folder: Path, seed: int) -> None:
    screen = killed(folder, seed)
    library = Library(folder)
    (name,) = library.names()
    saved = library.open_named(name)
    assert not saved.problem, saved.problem
    contents = [message.content for message in saved.conversation.messages.values()]
    answers = [line for line in screen.split("\n") if line and not line.startswith("(")]
    for line in answers[:-1]:
        assert line in contents
    assert any(content.startswith(answers[-1]) for content in contents), f"lost: {answers[-1]} ({contents[-2:]})"
    message = saved.conversation.add("and then?")
    saved.close()
    again = library.open_named(name)
    assert again.conversation.messages[message.id].content == "and then?", "and it goes on"
    again.close()


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.conformance)])
def test_a_killed_chat_has_lost_nothing_that_stood_on_the_screen(tmp_path: Path, count: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, [tmp_path / str(seed) for seed in range(count)], range(count)))
