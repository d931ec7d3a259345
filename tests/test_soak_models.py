"""Random lines and Ctrl+C over real tiny models, their kernels, threads, slots and kept state: nothing is raised, the
next answer is a fresh process's, and no thread is left behind."""

from __future__ import annotations

import faulthandler
import gc
import io
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import cast

import pytest
from rich.console import Console
from test_hot_swap import GREEDY, TURNED, fresh_answer, other_vocabulary, pad, said
from test_soak import Mashed, ctrl_c
from tiny_models import deepseek2, qwen3moe, qwen3next

import localmoe
from localmoe.conversation.library import Library
from localmoe.errors import ContextError
from localmoe.model import Model
from localmoe.notebook import LoadedModel
from localmoe.prompt_cache.cache import open_prompt_cache
from localmoe.repl.loop import converse
from localmoe.repl.models import Kept, OpenedModel, OpenModels
from localmoe.repl.render import Screen
from localmoe.repl.talk import Talk
from localmoe.session import Session

__all__ = ["ctrl_c"]
pytestmark = pytest.mark.usefixtures("ctrl_c")
MOST_DELAY = 0.04  # seconds before a Ctrl+C: opening a model takes about one of a hundred
CHANGES = [
    *("/regen", "/undo", "/edit 1 hello again", "/trim 1", "/clear", "/summary", "/reopen", "/memory", "/experts"),
    *("/load one", "/save one", "/load two", "/save two", "/ctx shift", "/ctx drop", "/ctx stop"),
]


@pytest.fixture(autouse=True)
def _a_hang_ends_the_run() -> Iterator[None]:
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class Typist(Mashed):
    """Long messages, changes of model and of how weights are loaded; Ctrl+C after almost every second line."""

    def __init__(self, random: Random, count: int, models: list[Path], files: Path) -> None:
        super().__init__(random, count, ["hello", "the"], files)
        self._models = models

    def read(self, text: str = "") -> str:
        line = super().read(text)
        if self._random.random() < 0.4:
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-5, MOST_DELAY))
        return line

    def _line(self) -> str:
        random, kind = self._random, self._random.random()
        if kind < 0.45:
            return " ".join(random.choices(["hello", "the", "in", "what about", "it"], k=random.choice([2, 3, 30, 60])))
        if kind < 0.6:
            return f"/lazy {random.choice(['off', 'mmap', 'slots 1GiB', 'slots 3', 'auto'])}"
        if kind < 0.7:
            return f"/model {random.choice(self._models)}"
        return random.choice(CHANGES) if kind < 0.8 else super()._line()


def with_team(path: Path) -> LoadedModel:
    return localmoe.load(path, threads=2, context=512, kv_format="f32")


def kept_in(folder: Path, model: OpenedModel) -> Kept:
    return open_prompt_cache(cast(Model, model), folder / "prompts")


@contextmanager
def lost_presses_forgotten() -> Iterator[None]:
    """Python drops a Ctrl+C that it hears in a callback of a weak reference. pytest would keep it until the test has
    ended, and by its traceback all that stood on the stack: slots that were dropped, with their readers."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        exec("")  # Python exits as if interrupted where the last of these was, as in making a dataclass


@lost_presses_forgotten()
def soak(count: int, seed: int, folder: Path) -> None:
    (folder / "a.txt").write_text("some text")
    vocabulary = pad(other_vocabulary(TURNED))
    paths = [
        qwen3moe(folder / "qwen.gguf"),
        deepseek2(folder / "deepseek.gguf", **vocabulary),
        qwen3next(folder / "delta.gguf", seed=3),
    ]
    library, model, written = Library(folder / "kept"), with_team(paths[0]), io.StringIO()
    console = Console(file=written, width=60, height=24, highlight=False, color_system=None, force_terminal=True)
    models = OpenModels(model, lambda path, loading: with_team(path), lambda m: kept_in(folder, m))
    session, saved = Session(model, settings=GREEDY, kept=models.kept(model)), library.open_new()
    session.start(saved.conversation)
    talk = Talk(session, Screen(console, console), models, library=library, saved=saved)
    typist = Typist(Random(seed), count, paths, folder)
    try:
        converse(talk, typist)
    except BaseException as error:
        raise AssertionError(f"after {typist.typed[-5:]}: {written.getvalue()[-500:]}") from error
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert "damaged" not in written.getvalue()
    try:
        expected = fresh_answer(talk, "and in the end?")
    except ContextError:
        with pytest.raises(ContextError):
            said(talk.session, "and in the end?")
    else:
        assert said(talk.session, "and in the end?") == expected, typist.typed[-20:]
    talk.close()
    models.close()


def left_behind(before: set[threading.Thread]) -> list[str]:
    """Threads that do not end. What one of them holds, such as slots with their readers, is garbage only behind it."""
    end = time.monotonic() + 20
    while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
        gc.collect()
        for thread in left:
            thread.join(0.1)
    return [thread.name for thread in left]


def test_real_models_take_any_line_and_any_interrupt(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    soak(200, 1, tmp_path)
    assert left_behind(before) == []


@pytest.mark.conformance
@pytest.mark.parametrize("seed", range(20))
def test_six_thousand_lines_over_real_models(tmp_path: Path, seed: int) -> None:
    before = set(threading.enumerate())
    soak(300, seed + 2, tmp_path)
    assert left_behind(before) == []
