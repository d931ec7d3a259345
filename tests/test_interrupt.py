"""Ctrl+C at each single step of what holds threads together: whoever comes next neither waits for ever nor misses
anything."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from queue import SimpleQueue
from threading import Event, Thread
from types import FrameType
from typing import Any, Self

import numpy as np
import pytest
from rich.console import Console

from localmoe.experts.readers import Load, Readers
from localmoe.formats import F32, Weight
from localmoe.interrupt import Pool, Uninterrupted, pressed_again, start_threads, when_gone
from localmoe.kernels.cpu.build import Kernels
from localmoe.kernels.cpu.isa import host_isa
from localmoe.kernels.cpu.team import KERNELS, Team
from localmoe.loader.locate import bundled
from localmoe.model import Model
from localmoe.prefault import Prefault
from localmoe.prompt_cache.writer import Writer
from localmoe.repl.render import Screen

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
kept: list[object] = []  # CPython 3.11.7 may call a tracer once more that has raised, without holding it
PATIENCE = 60  # seconds until a test takes what it waits for as lost


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def too_long(number: int, frame: FrameType | None) -> None:
        raise AssertionError("waits for ever")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Pressed:
    """Presses Ctrl+C at one event of Python's tracer: a call, a line or a return, also inside the standard library."""

    def __init__(self, event: int) -> None:
        self._left = event

    @property
    def happened(self) -> bool:
        return self._left <= 0

    def __enter__(self) -> Self:
        kept.append(self._trace)
        sys.settrace(kept[-1])
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if frame.f_code is Pressed.__exit__.__code__:
            return None
        self._left -= 1
        if self._left == 0:
            signal.raise_signal(signal.SIGINT)
        return None if self.happened else self._trace


def interrupted(work: Callable[[], object]) -> Iterator[bool]:
    """Does `work` anew for each item, cut at one event after another until none is left; whether it was cut. Python
    drops what is raised in a callback of a weak reference."""
    for event in count(1):
        cut, pressed = False, Pressed(event)
        try:
            with pressed:
                work()
        except KeyboardInterrupt:
            cut = True
        yield cut
        if not pressed.happened:
            assert event > 10
            return


def test_an_event_of_pythons_own_is_left_locked() -> None:
    """That this finds what it looks for."""
    left = []

    def work() -> None:
        left.append(Event())
        left[-1].set()

    for _ in interrupted(work):
        pass
    assert any(not each._cond.acquire(blocking=False) for each in left)


def test_a_block_is_whole_and_the_press_is_heard_behind_it() -> None:
    done: list[int] = []

    def work() -> None:
        done.clear()
        with Uninterrupted():
            done.append(1)
            done.append(2)

    heard = [(cut, list(done)) for cut in interrupted(work)]
    assert {tuple(steps) for _, steps in heard} == {(), (1, 2)}
    assert (True, [1, 2]) in heard


def test_threads_start_all_or_none() -> None:
    threads: list[Thread] = []

    def work() -> None:
        threads[:] = [Thread(target=lambda: None, daemon=True) for _ in range(2)]
        start_threads(threads)

    for _ in interrupted(work):
        assert len({thread.ident is None for thread in threads}) <= 1
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def test_a_pool_ends() -> None:
    pool, results = Pool(1), []

    def work() -> None:
        results.append(pool.result(pool.submit(pow, 3, 2)))

    for _ in interrupted(work):
        assert pool.result(pool.submit(pow, 2, 5)) == 32
    assert set(results) == {9}
    pool.close()


def test_a_pool_is_closed() -> None:
    held: list[Pool] = []

    def work() -> None:
        held.append(Pool(1))
        held[-1].submit(int)
        held[-1].close()

    for _ in interrupted(work):
        while held:
            held.pop().close()


def test_a_pool_gives_the_errors_of_its_functions() -> None:
    def late() -> None:
        raise TimeoutError("the disk's own")

    pool = Pool(1)
    with pytest.raises(TimeoutError, match="the disk's own"):
        pool.result(pool.submit(late))
    pool.close()


def test_kept_files_are_written_once() -> None:
    writer, done = Writer(), []
    number = 0

    def work() -> None:
        nonlocal number
        number += 1
        writer.put(lambda given=number: done.append(given))
        writer.drain()

    for _ in interrupted(work):
        assert writer.put(lambda: done.append(0))
        writer.drain()
        assert done[-1] == 0
    assert done.count(number) == 1
    assert len([each for each in done if each]) == len({each for each in done if each})
    writer.close()


def test_what_keeps_files_is_closed() -> None:
    held: list[Writer] = []

    def work() -> None:
        held.append(Writer())
        held[-1].put(list)
        held[-1].close()

    for _ in interrupted(work):
        while held:
            held.pop().close()


def test_a_bar_goes_away() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    screen = Screen(console, console)

    def work() -> None:
        with screen.progress("reading") as bar:
            bar("reading", 1, 2)
            bar.beside(screen.line)
            bar.close()

    for _ in interrupted(work):
        screen.settle()
        assert not screen.progress("other").closed


def test_a_line_is_printed_whole_or_not_at_all() -> None:
    written = io.StringIO()
    screen = Screen(Console(file=written, force_terminal=True, width=60, color_system=None))
    for _ in interrupted(lambda: screen.line("words")):
        pass
    lines = written.getvalue().splitlines()
    assert len(lines) > 1
    assert set(lines) == {"words"}


def test_weights_stop_being_read_ahead() -> None:
    weight = Weight.whole("w", (4, 4096), F32, np.zeros(4 * 4096 * 4, np.uint8))
    held: list[Prefault] = []

    def work() -> None:
        held[:] = [Prefault([weight])]
        held[0].stop()

    for _ in interrupted(work):
        for each in held:
            each.stop()
            each.wait()


def test_experts_come_after_asking_was_cut() -> None:
    class Ready:
        nbytes = 0

        def fill(self, spare: object) -> None:
            pass

    held: list[Readers] = []

    def work() -> None:
        held[:] = [Readers(1)]
        load: Load = Load(deque([Ready()]), 1, 0, 0)  # type: ignore[list-item]
        held[0].ask(load)
        while not load.complete:
            held[0].wait()
        held[0].close()

    for _ in interrupted(work):
        for each in held:
            each.close()


def test_readers_that_nobody_holds_end() -> None:
    readers = Readers(2)
    threads = list(readers._threads)
    load: Load = Load(deque(), 0, 0, 0)
    readers.ask(load)
    del readers
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


class Held:
    """Something that can be gone."""


def pressed_in_a_collection(make: Callable[[], object]) -> bool:
    """Ctrl+C while the collector is at work, which then finds what `make` made; whether it was heard."""

    def press(number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGVTALRM, press)
    gc.collect()
    gc.freeze()  # what other tests left is not looked at, nor are its callbacks called
    callbacks, gc.callbacks[:] = list(gc.callbacks), []  # Hypothesis has one, which could be what hears it
    much = [[i] for i in range(1 << 20)]  # for the collector to be at work long enough
    garbage = [make()]
    garbage.append(garbage)
    try:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.02)  # of some 90 ms
            del garbage
            gc.collect()
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
            gc.unfreeze()
            gc.callbacks[:] = callbacks
            assert much
    except KeyboardInterrupt:
        return True
    return False


def test_python_loses_a_press_in_a_collection_and_what_was_to_be_done_there() -> None:
    """That this finds what it looks for."""
    ended: list[int] = []

    def make() -> Held:
        held = Held()
        weakref.finalize(held, ended.append, 1)
        return held

    assert any(not pressed_in_a_collection(make) for _ in range(5))
    assert len(ended) < 5


def test_a_press_that_is_lost_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    def make() -> Held:
        held = Held()
        weakref.finalize(held, list)
        return held

    def heard() -> bool:
        try:
            return pressed_in_a_collection(make) or Event().wait(PATIENCE)
        except KeyboardInterrupt:  # later
            return True

    with pressed_again():
        for _ in range(5):
            assert heard()
        assert not dropped
        held = Held()
        weakref.finalize(held, os.close, -1)
        del held
    assert len(dropped) == 1
    assert sys.unraisablehook == dropped.append


def test_a_press_in_a_collection_is_heard_and_what_has_gone_is_ended() -> None:
    ended, kept_too = SimpleQueue[int](), weakref.WeakSet[Held]()

    def make() -> Held:
        held, beside = Held(), Held()
        kept_too.add(beside)
        when_gone(held, ended.put, 1, keep=beside)
        return held

    for _ in range(5):
        assert pressed_in_a_collection(make)
        assert ended.get(timeout=PATIENCE) == 1
    while kept_too:
        pass


def test_what_is_ended_by_hand_is_ended_once() -> None:
    held, ended = Held(), SimpleQueue[str]()
    end = when_gone(held, ended.put, "by hand")
    other = Held()
    when_gone(other, ended.put, "after it")
    end()
    end()
    del held, other
    assert [ended.get(timeout=PATIENCE), ended.get(timeout=PATIENCE)] == ["by hand", "after it"]
    assert ended.empty()


def test_an_end_that_fails_is_told_and_the_next_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    told, ended = SimpleQueue[type](), SimpleQueue[int]()
    monkeypatch.setattr(threading, "excepthook", lambda hooked: told.put(hooked.exc_type))
    when_gone(Held(), os.close, -1)
    assert told.get(timeout=PATIENCE) is OSError
    when_gone(Held(), ended.put, 1)
    assert ended.get(timeout=PATIENCE) == 1


def test_threads_of_what_is_collected_under_a_press_end() -> None:
    weight = Weight.whole("w", (4, 4096), F32, np.zeros(4 * 4096 * 4, np.uint8))
    threads: list[Thread] = []

    def readers() -> object:
        made = Readers(2)
        threads.extend(made._threads)
        return made

    def model() -> object:
        made = Model(bundled(), threads=3, context=64)
        before = set(threading.enumerate())
        made.forward([1, 2, 3], 0)
        threads.extend(set(threading.enumerate()) - before)
        return made

    for make in (readers, model, lambda: Prefault([weight])):
        pressed_in_a_collection(make)  # Python has callbacks of its own on every thread, which may be what hears it
    assert len(threads) == 2 + 2
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_kernels_are_loaded_or_not() -> None:
    """Objects of llvmlite's that are left in the middle are freed twice, which ends the process."""
    names = ("run_tape", "serve_tapes")
    Kernels(host_isa()).prepare(names)
    held: list[Kernels] = []

    def work() -> None:
        held[:] = [Kernels(host_isa())]
        held[0].prepare(names)

    for _ in interrupted(work):
        for each in held:
            assert each.address(names[0]) and each.address(names[1])
        held.clear()


def test_a_team_is_there_or_not() -> None:
    kernels = Kernels(host_isa())
    kernels.prepare(KERNELS)
    held: list[Team] = []
    for _ in interrupted(lambda: held.append(Team(3, *map(kernels.address, KERNELS)))):
        while held:
            held.pop().close()
