"""Threads on CPUs that were asked for: which ones, where each is while a tape runs, where the caller is behind it."""

from __future__ import annotations

import _thread
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localmoe.cli import main
from localmoe.errors import SettingError
from localmoe.kernels.cpu import cores, pinning
from localmoe.kernels.cpu.arguments import slots
from localmoe.kernels.cpu.build import Kernels, kernel
from localmoe.kernels.cpu.isa import host_isa
from localmoe.kernels.cpu.pinning import listed, mask, pinned_cpus, written
from localmoe.kernels.cpu.team import KERNELS, Team
from localmoe.kernels.open import open_device
from localmoe.loader.locate import bundled
from localmoe.model import Model

USABLE = sorted(cores.usable_processors())
pins = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system pins no threads")
pins_two = pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(USABLE) < 2, reason="two CPUs are needed")


@kernel("test_stay", 3)
def stay(v: Any) -> Any:
    """Arguments: address of the number of threads that have come, and of the word that lets them go on."""
    slot = slots(v)

    def run(a, thread, threads):  # type: ignore[no-untyped-def]
        v.atomic_add(slot(a, 0), 1)
        while v.atomic_load(slot(a, 1)) == 0:
            v.pause()

    return run


class Tape:
    """One call of `test_stay`."""

    def __init__(self, kernels: Kernels) -> None:
        self.words = np.zeros(2, np.int64)  # threads that have come, and whether they may go on
        self.block = np.array([self.words.ctypes.data, self.words.ctypes.data + 8], np.int64)
        address = kernels.address("test_stay")
        self.entries = np.array([[address, self.block.ctypes.data, 1]], np.int64)

    def run(self, team: Team) -> None:
        team.run(self.entries.ctypes.data, 1)

    def watched(self, team: Team) -> list[set[int]]:
        """Where each thread of the team may be while it runs the tape, the caller first."""
        self.words[:] = 0
        numbers = [threading.get_native_id(), *(worker.native_id for worker in team._workers)]
        found: list[set[int]] = []

        def look() -> None:
            while self.words[0] < team.threads:
                time.sleep(0.001)
            found.extend(os.sched_getaffinity(number or 0) for number in numbers)
            self.words[1] = 1

        watcher = threading.Thread(target=look)
        watcher.start()
        self.run(team)
        watcher.join()
        return found


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    made = Kernels(host_isa(), tmp_path_factory.mktemp("kernels"))
    made.prepare((*KERNELS, "test_stay"))
    return made


@pytest.fixture(params=["futex", "gates"])
def waking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "gates":
        monkeypatch.setattr("localmoe.kernels.cpu.team._futex_call", lambda: (0, 0))


@pytest.fixture(autouse=True)
def _the_caller_is_free_afterwards() -> Iterator[None]:
    """Whatever a test leaves behind, the next one starts free."""
    restore = partial(os.sched_setaffinity, 0, os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else int
    yield
    restore()


def team_of(kernels: Kernels, cpus: Sequence[int]) -> Team:
    return Team(len(cpus), *map(kernels.address, KERNELS), cpus=cpus)


# Which CPUs


@pytest.mark.parametrize(
    ("text", "found"),
    [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), ("8, 3-4,0", (8, 3, 4, 0)), ("2-2", (2,)), ("007", (7,))],
)
def test_a_list_names_cpus_in_its_order(text: str, found: tuple[int, ...]) -> None:
    assert listed(text, range(9)) == found


@pytest.mark.parametrize(
    ("cpus", "text"),
    [((), ""), ((0,), "0"), ((0, 1, 2, 3, 8), "0-3,8"), ((8, 3, 4, 0), "8,3-4,0"), ((1, 0), "1,0"), ((5, 7), "5,7")],
)
def test_cpus_are_written_as_a_list_that_reads_as_the_same(cpus: tuple[int, ...], text: str) -> None:
    assert written(cpus) == text
    assert not cpus or listed(text, range(9)) == cpus


@pytest.mark.parametrize(("text", "found"), [("0-3,8", "0x10f"), ("1", "0x2"), ("", "0x0"), (None, "0x0")])
def test_a_mask_has_a_bit_for_each_cpu(text: str | None, found: str) -> None:
    assert mask(text) == found


@pytest.mark.parametrize(
    "text", ["", " ", ",", "0,", "a", "3-1", "-1", "1-", "0-1-2", "0x1", "1.0", "²", "1 2", "9" * 5000]
)
def test_what_is_no_list_is_told_what_one_is(text: str) -> None:
    with pytest.raises(SettingError) as caught:
        listed(text, range(9))
    assert str(caught.value).startswith("pin takes auto or a list of CPUs such as 0-3,8, not ")
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,4", "pin: this process may not use CPU 4; it may use 0-1,6"),
        ("0-999999999", "pin: this process may not use CPU 2; it may use 0-1,6"),
        ("0-1,1", "pin: CPU 1 is named twice; each thread has one of its own"),
    ],
)
def test_cpus_that_are_not_there_and_those_named_twice_are_named(text: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        listed(text, {6, 0, 1})
    assert str(caught.value) == message


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight logical processors of which each quick core has two; time for three."""
    monkeypatch.setattr("os.sched_setaffinity", lambda thread, cpus: None, raising=False)
    monkeypatch.setattr(pinning, "usable_processors", lambda: set(range(8)))
    monkeypatch.setattr(pinning, "quick_processors", lambda: (0, 2, 4, 6))
    monkeypatch.setattr(pinning, "default_threads", lambda: 3)


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("asked", "threads", "found"),
    [
        ("auto", None, (0, 2, 4)),
        ("auto", 4, (0, 2, 4, 6)),
        ("auto", 1, (0,)),
        ("5-7,0", None, (5, 6, 7, 0)),
        ("5-7,0", 2, (5, 6)),
    ],
)
def test_each_thread_has_a_cpu_and_fewer_threads_take_the_first(
    asked: str, threads: int | None, found: tuple[int, ...]
) -> None:
    assert pinned_cpus(asked, threads) == found


@pytest.mark.usefixtures("four_cores")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("auto", "pin: 5 threads need a CPU each; quick physical cores: 4 (0,2,4,6)"),
        ("1-3", "pin: 5 threads need a CPU each; in the list: 3 (1-3)"),
    ],
)
def test_more_threads_than_cpus_are_refused_with_both_numbers(asked: str, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        pinned_cpus(asked, 5)
    assert str(caught.value) == message


# Where threads are


@pins_two
def test_each_thread_is_on_its_cpu_while_a_tape_runs_and_the_caller_free_before_and_after(
    kernels: Kernels, waking: None
) -> None:
    free = os.sched_getaffinity(0)
    team, tape = team_of(kernels, USABLE[1::-1]), Tape(kernels)
    assert os.sched_getaffinity(0) == free
    for _ in range(3):
        assert tape.watched(team) == [{USABLE[1]}, {USABLE[0]}]
        assert os.sched_getaffinity(0) == free
    team.close()
    assert os.sched_getaffinity(0) == free


@pins_two
def test_threads_are_left_alone_unless_it_is_asked_for(kernels: Kernels, waking: None) -> None:
    team, tape = Team(2, *map(kernels.address, KERNELS)), Tape(kernels)
    assert tape.watched(team) == [set(USABLE)] * 2
    team.close()


@pins_two
def test_the_caller_goes_back_to_where_it_could_be_right_before(kernels: Kernels) -> None:
    """Not to where it could be when the team was made; and it may be another thread of Python's."""
    team, tape = team_of(kernels, USABLE[:1]), Tape(kernels)
    os.sched_setaffinity(0, USABLE[1:2])
    assert tape.watched(team) == [{USABLE[0]}]
    assert os.sched_getaffinity(0) == {USABLE[1]}
    found: list[set[int]] = []
    other = threading.Thread(target=lambda: found.extend([*tape.watched(team), os.sched_getaffinity(0)]))
    os.sched_setaffinity(0, USABLE)
    other.start()
    other.join()
    assert found == [{USABLE[0]}, set(USABLE)]
    team.close()


@pins
@pytest.mark.parametrize("cpu", [0, 63, 64, 70, 8191])
def test_the_mask_of_a_thread_has_one_bit(cpu: int) -> None:
    (_, keep), _ = pinning.around(cpu)
    assert int.from_bytes(bytes(keep.args[2]), "little") == 1 << cpu  # type: ignore[attr-defined]


@pins_two
def test_an_interrupt_in_the_middle_leaves_the_caller_free(kernels: Kernels, waking: None) -> None:
    free = os.sched_getaffinity(0)
    team, tape = team_of(kernels, USABLE[:2]), Tape(kernels)
    tape.words[1] = 1
    team._pin = [*team._pin, _thread.interrupt_main]
    with pytest.raises(KeyboardInterrupt):
        tape.run(team)
    assert os.sched_getaffinity(0) == free
    assert tape.words[0] == 2
    del team._pin[-1]
    team.close()


@pins_two
def test_an_interrupt_at_any_time_leaves_the_caller_free(kernels: Kernels, waking: None) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def run_until_alarm(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while True:
            tape.run(team)

    free = os.sched_getaffinity(0)
    team, tape = team_of(kernels, USABLE[:2]), Tape(kernels)
    tape.words[1] = 1
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(200):
            with pytest.raises(KeyboardInterrupt):
                run_until_alarm(1e-4 + 1e-6 * i)
            assert os.sched_getaffinity(0) == free
    finally:
        signal.signal(signal.SIGALRM, before)
    team.close()


@pins_two
def test_a_cpu_that_is_gone_when_threads_start_is_told_and_none_is_left(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: int, cpus: object) -> None:
        raise OSError(22, "Invalid argument")

    before = set(threading.enumerate())
    monkeypatch.setattr("os.sched_setaffinity", refuse)
    with pytest.raises(SettingError) as caught:
        team_of(kernels, USABLE[:2])
    assert str(caught.value) == f"pin: no thread can be kept on CPU {USABLE[1]}: Invalid argument"
    assert not set(threading.enumerate()) - before
    monkeypatch.undo()


@pins
def test_a_cpu_that_goes_later_leaves_the_caller_free(kernels: Kernels) -> None:
    free = os.sched_getaffinity(0)
    team, tape = team_of(kernels, (8000,)), Tape(kernels)
    assert tape.watched(team) == [free]
    assert os.sched_getaffinity(0) == free
    team.close()


# Models and the command line


@pins_two
def test_pinned_threads_compute_the_same_bits_and_the_model_says_where_they_are() -> None:
    ids = list(range(1, 40))
    found = []
    for pin in (None, "auto", ",".join(map(str, USABLE[1::-1]))):
        model = Model(bundled(), threads=2, context=64, pin=pin)
        found.append((model.device.cpus, model.forward(ids, 0), model.forward([7], len(ids))))
        assert os.sched_getaffinity(0) == set(USABLE)
        model.close()
    assert [cpus for cpus, _, _ in found] == [(), cores.quick_processors()[:2], tuple(USABLE[1::-1])]
    for _, *logits in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(logits, found[0][1:], strict=True))


@pins_two
def test_a_list_decides_how_many_threads_there_are() -> None:
    device = open_device("cpu", context=8, pin=str(USABLE[1]))
    assert (device.threads, device.cpus) == (1, (USABLE[1],))
    assert open_device("cpu", context=8).cpus == open_device("reference", context=8).cpus == ()


def test_a_list_of_more_cpus_than_threads_are_possible_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_setaffinity", lambda thread, cpus: None, raising=False)
    monkeypatch.setattr(pinning, "usable_processors", lambda: set(range(512)))
    with pytest.raises(SettingError, match="300 threads are not possible; 1 to 256 are"):
        open_device("cpu", context=8, pin="0-299")
    assert open_device("cpu", context=8, pin="0-299", threads=4).cpus == (0, 1, 2, 3)


MANY = len(USABLE) + 1


@pins
@pytest.mark.parametrize(
    "command", [("chat",), ("run", "-p", "hello"), ("bench", "-p", "2", "-n", "0")], ids=lambda c: c[0]
)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pin", "3-1"], "pin takes auto or a list of CPUs such as 0-3,8, not '3-1'"),
        (["--pin", ""], "pin takes auto or a list of CPUs such as 0-3,8, not ''"),
        (["--pin", "AUTO"], "pin takes auto or a list of CPUs such as 0-3,8, not 'AUTO'"),
        (["--pin", "99999"], f"pin: this process may not use CPU 99999; it may use {written(USABLE)}"),
        (["--pin", f"{USABLE[0]},{USABLE[0]}"], f"pin: CPU {USABLE[0]} is named twice; each thread has one of its own"),
        (
            ["--pin", str(USABLE[0]), "-t", "2"],
            f"pin: 2 threads need a CPU each; in the list: 1 ({USABLE[0]})",
        ),
        (
            ["--pin", written(USABLE), "-t", str(MANY)],
            f"pin: {MANY} threads need a CPU each; in the list: {len(USABLE)} ({written(USABLE)})",
        ),
        (
            ["--pin", "auto", "--device", "reference"],
            "pin: the reference device has no threads of its own; the cpu device has",
        ),
    ],
)
def test_what_cannot_be_pinned_is_one_line_and_2(
    command: tuple[str, ...],
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit) as caught:
        main([command[0], str(bundled()), *command[1:], *flags])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"localmoe: {message}"


def test_a_system_that_pins_no_threads_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.delattr("os.sched_setaffinity", raising=False)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(SystemExit) as caught:
        main(["run", str(bundled()), "-p", "hello", "--pin", "auto"])
    assert caught.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "localmoe: pin: Darwin has no call that keeps a thread on a CPU, as Linux has; leave it out"


@pins
def test_bench_tells_where_threads_are_pinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(bundled()), "-p", "4", "-n", "0", "-r", "1", "--json", "--save", str(tmp_path / "kept.md")]
    for pin in ([], ["--pin", str(USABLE[0])]):
        with pytest.raises(SystemExit) as caught:
            main([*words, *pin])
        assert not caught.value.code
    told = capsys.readouterr().out
    free, pinned = (json.loads(text) for text in told.replace("]\n[", "]\n\n\n[").split("\n\n\n"))
    assert (free[0]["cpu_mask"], free[0]["cpu_strict"]) == ("0x0", False)
    assert (pinned[0]["cpu_mask"], pinned[0]["cpu_strict"]) == (hex(1 << USABLE[0]), True)
    assert f"1 thread on CPU {USABLE[0]}, KV f16" in (tmp_path / "kept.md").read_text("utf-8")
