"""The thread team: all threads run every entry of a tape, none before all have done the last; nothing is timed."""

from __future__ import annotations

import _thread
import ctypes
import faulthandler
import gc
import itertools
import operator
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from localmoe.kernels.cpu.arguments import slots
from localmoe.kernels.cpu.build import Kernels, kernel
from localmoe.kernels.cpu.cores import default_threads
from localmoe.kernels.cpu.isa import host_isa
from localmoe.kernels.cpu.team import KERNELS, SPIN_SECONDS, Patience, Team, spins_within


@kernel("test_turns", 3)
def turns(v: Any) -> Any:
    """Arguments: address of the counter, of the mistakes, the number of the first entry since a barrier, how many
    entries there are between two barriers. While these run the counter stands between threads · number and threads ·
    (number + many), unless a thread went ahead or stayed behind."""
    slot = slots(v)

    def run(a, thread, threads):  # type: ignore[no-untyped-def]
        first = threads * slot(a, 2)
        before = v.atomic_add(slot(a, 0), 1)
        if before < first or before >= first + threads * slot(a, 3):
            v.atomic_add(slot(a, 1), 1)

    return run


class Tape:
    """`entries` calls of `test_turns`, a barrier behind each `many` of them."""

    def __init__(self, kernels: Kernels, entries: int, many: int = 1) -> None:
        self.counts = np.zeros(2, np.int64)  # counter, mistakes
        counter = self.counts.ctypes.data
        self.blocks = np.array([[counter, counter + 8, i // many * many, many] for i in range(entries)], np.int64)
        places = self.blocks.ctypes.data + 32 * np.arange(entries)
        barriers = np.arange(1, entries + 1) % many == 0
        columns = (np.full(entries, kernels.address("test_turns")), places, barriers)
        self.entries = np.stack(columns, axis=1).astype(np.int64)

    def run(self, team: Team) -> int:
        """Calls that were made; a call out of turn fails."""
        self.counts[0] = 0
        team.run(self.entries.ctypes.data, len(self.entries))
        assert self.counts[1] == 0
        return int(self.counts[0])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Compiled here: the cache's fingerprint does not know this file."""
    made = Kernels(host_isa(), tmp_path_factory.mktemp("kernels"))
    made.prepare((*KERNELS, "test_turns"))
    return made


@pytest.fixture(autouse=True)
def _a_hang_ends_the_run() -> Iterator[None]:
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=["futex", "gates"])
def waking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second way is that of systems without the call."""
    if request.param == "gates":
        monkeypatch.setattr("localmoe.kernels.cpu.team._futex_call", lambda: (0, 0))


def team_of(kernels: Kernels, threads: int) -> Team:
    return Team(threads, *map(kernels.address, KERNELS))


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_no_thread_begins_an_entry_before_all_have_ended_the_last(kernels: Kernels, threads: int, waking: None) -> None:
    team, tape = team_of(kernels, threads), Tape(kernels, 3000)
    assert tape.run(team) == 3000 * threads
    team.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_threads_wait_where_a_barrier_is_and_at_the_end(kernels: Kernels, threads: int, waking: None) -> None:
    team, tape = team_of(kernels, threads), Tape(kernels, 1000, many=3)  # the last entry has no barrier of its own
    assert [tape.run(team) for _ in range(20)] == [1000 * threads] * 20
    team.close()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_run_follows_run_without_a_pause(kernels: Kernels, threads: int, waking: None) -> None:
    team, tapes = team_of(kernels, threads), [Tape(kernels, n) for n in (1, 2, 7)]
    for i in range(1500):
        tape = tapes[i % 3]
        assert tape.run(team) == len(tape.entries) * threads
    team.close()


def test_more_threads_than_cores_do_not_hang(kernels: Kernels, waking: None) -> None:
    threads = 4 * default_threads() + 1
    team, tape = team_of(kernels, threads), Tape(kernels, 200)
    assert [tape.run(team) for _ in range(3)] == [200 * threads] * 3
    team.close()


def test_two_teams_work_beside_each_other(kernels: Kernels) -> None:
    def work(found: list[int]) -> None:
        team, tape = team_of(kernels, 2), Tape(kernels, 500)
        found.extend(tape.run(team) for _ in range(10))
        team.close()

    counts: list[int] = []
    callers = [threading.Thread(target=work, args=(counts,)) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert counts == [1000] * 20


def test_close_ends_every_thread(kernels: Kernels, waking: None) -> None:
    before = set(threading.enumerate())
    used, unused = team_of(kernels, 4), team_of(kernels, 3)
    assert len(set(threading.enumerate()) - before) == 5
    Tape(kernels, 10).run(used)
    used.close()
    unused.close()
    assert not set(threading.enumerate()) - before


def test_an_interrupt_between_two_threads_of_a_run_waits_for_its_end(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmoe.kernels.cpu.team._futex_call", lambda: (0, 0))
    team, tape = team_of(kernels, 3), Tape(kernels, 20)
    tape.run(team)
    gate = team._gates[0]
    release = partial(deque, map(operator.call, (gate.release, _thread.interrupt_main)), 0)
    team._gates[0] = SimpleNamespace(acquire=gate.acquire, release=release)  # type: ignore[call-overload]
    with pytest.raises(KeyboardInterrupt):
        tape.run(team)
    assert tape.counts.tolist() == [60, 0]
    team._gates[0] = gate
    assert tape.run(team) == 60
    team.close()


def run_until_alarm(tape: Tape, team: Team, seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    while True:
        tape.run(team)


@pytest.mark.skipif(sys.platform == "win32", reason="needs timer signals")
def test_an_interrupt_at_any_time_leaves_the_team_in_step(kernels: Kernels, waking: None) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    team, tape = team_of(kernels, 3), Tape(kernels, 20)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(100):
            tape.counts[0] = 0
            with pytest.raises(KeyboardInterrupt):
                run_until_alarm(tape, team, 1e-4 + 1e-6 * i)
            assert tape.counts.tolist() in ([0, 0], [60, 0])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tape.run(team) == 60
    team.close()


def test_a_model_that_is_dropped_without_close_takes_its_threads_along() -> None:
    """A worker may still be on its way out of the machine code that goes away with the device. What reads weights ahead
    ends behind the piece that it is reading."""
    from localmoe.loader.locate import bundled
    from localmoe.model import Model

    before = set(threading.enumerate())
    for _ in range(6):
        Model(bundled(), threads=2, context=64).forward([1, 2, 3], 0)
    gc.collect()
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(60)
    assert not [thread.name for thread in left if thread.is_alive()]


def test_a_team_that_sleeps_at_most_barriers_stops_spinning_and_tries_again_ever_more_rarely() -> None:
    now, tried = 0.0, []
    patience = Patience(5000, lambda: now)
    for _ in range(1000):  # steps of 10 ms, of which one that spins loses 27 ms
        spinning = patience.spins() == 5000
        now += 0.01 + 90 * SPIN_SECONDS * spinning
        tried += [round(now, 3)] if spinning else []
        patience.learn(barriers=100, sleeps=90)
    assert np.diff(tried[:6]).round(1).tolist() == [0.3, 0.5, 0.9, 1.8, 1.8], "8, 16, 32 and 64 times 27 ms"
    assert len(tried) * 90 * SPIN_SECONDS < 0.03 * now
    while patience.spins() != 5000:
        now += 0.01
    patience.learn(barriers=100, sleeps=3)
    assert patience.spins() == 5000
    patience.learn(barriers=100, sleeps=100)
    assert patience.spins() < 5000
    now += 0.25
    assert patience.spins() == 5000, "it was an accident, then"


@pytest.mark.parametrize(("nanoseconds", "pauses"), [(15, 20_000), (45, 6_666), (0, 200_000), (10_000, 2_000)])
def test_pauses_are_as_many_as_fit_into_the_time(
    monkeypatch: pytest.MonkeyPatch, nanoseconds: int, pauses: int
) -> None:
    """By a clock that stands still but for pauses, of which the first thousand were held up."""
    ticks = itertools.chain([0.0, 1.0], *([t, t + nanoseconds * 1e-6] for t in (1.0, 2.0)))
    monkeypatch.setattr("localmoe.kernels.cpu.team.time", SimpleNamespace(perf_counter=partial(next, ticks)))
    asked: list[int] = []
    call = ctypes.CFUNCTYPE(None, ctypes.c_int64)(asked.append)
    assert spins_within(300e-6, ctypes.cast(call, ctypes.c_void_p).value or 0) == pytest.approx(pauses, abs=1)
    assert asked == [1000] * 3
