"""Kernels compiled by other processes: the same objects, nothing of the compiler here, and no process left over however
it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localmoe.kernels.cpu import build, compilers, isa, limits, team
from localmoe.kernels.cpu.build import Kernels, kernel

SMALL = ["limit_fma", "limit_read", "limit_read_plain", "pauses"]
assert limits
assert team


@kernel("test_of_this_file", arguments=1)
def of_this_file(v: Any) -> Callable[..., None]:
    def run(place):  # type: ignore[no-untyped-def]
        v.store(place, v.load(v.int64, place) + 1)

    return run


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[compilers.Process]:
    """The processes, two at a time."""
    found: list[compilers.Process] = []
    start = compilers._start

    def kept() -> compilers.Process:
        found.append(start())
        return found[-1]

    monkeypatch.setattr(compilers, "_start", kept)
    monkeypatch.setattr(compilers, "processes_for", lambda kernels: 2)
    return found


def counted(kernels: Kernels) -> int:
    number = ctypes.c_int64(41)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(kernels.address("test_of_this_file"))(ctypes.addressof(number))
    return number.value


def test_several_are_compiled_without_numba_in_this_process_and_told_as_they_come(tmp_path: Path) -> None:
    script = f"""
import ctypes, pathlib, sys
from localmoe.kernels.cpu import build, compilers, isa, limits, team
compilers.processes_for = lambda kernels: 2
told, kernels = [], build.Kernels(isa.host_isa(), pathlib.Path({str(tmp_path)!r}))
kernels.prepare({SMALL!r}, lambda *step: told.append(step))
assert [step[:2] for step in told] == [(n, 4) for n in range(5)], told
assert sorted(step[2] for step in told[1:]) == {SMALL!r}
assert "numba" not in sys.modules
ctypes.CFUNCTYPE(None, ctypes.c_int64)(kernels.address("pauses"))(10)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
    assert sorted(path.stem for path in tmp_path.rglob("*.o")) == SMALL


def test_an_object_from_elsewhere_is_that_which_is_made_here(started: list[compilers.Process]) -> None:
    host = isa.host_isa()
    found = dict(compilers.compiled([compilers.Wanted(name, host) for name in SMALL[:2]], 2))
    assert found == {name: build.emitted(name, host) for name in SMALL[:2]}


HANGS = "import time; time.sleep(600)"


@pytest.mark.parametrize("serve", ["", "print('no object')", "import os; os.kill(os.getpid(), 9)", HANGS, None])
def test_what_no_process_compiles_is_compiled_here(
    serve: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[compilers.Process]
) -> None:
    def refused() -> None:
        raise OSError(11, "Resource temporarily unavailable")

    if serve == HANGS:
        monkeypatch.setattr(compilers, "PATIENCE", 0.5)
    if serve is None:
        monkeypatch.setattr(compilers, "_start", refused)
    else:
        monkeypatch.setattr(compilers, "SERVE", serve)
    kernels, told = Kernels(isa.host_isa(), tmp_path), []
    kernels.prepare([*SMALL, "test_of_this_file"], lambda *step: told.append(step[:2]))
    assert told == [(n, 5) for n in range(6)]
    assert counted(kernels) == 42
    assert len(started) == (0 if serve is None else 2)
    assert all(process.returncode is not None for process in started)


def test_a_kernel_of_another_package_is_compiled_here_beside_them(
    tmp_path: Path, started: list[compilers.Process]
) -> None:
    kernels = Kernels(isa.host_isa(), tmp_path)
    kernels.prepare(["test_of_this_file", *SMALL])
    assert counted(kernels) == 42
    assert len(started) == 2


def test_few_are_worth_no_process(tmp_path: Path, started: list[compilers.Process]) -> None:
    Kernels(isa.host_isa(), tmp_path).prepare(SMALL[: build.SEVERAL - 1])
    assert started == []


@pytest.mark.skipif(os.name == "nt", reason="sends the signal of a terminal's Ctrl+C")
def test_ctrl_c_is_heard_while_they_compile_and_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[compilers.Process]
) -> None:
    monkeypatch.setattr(compilers, "SERVE", "import time; time.sleep(60)")
    threads = set(threading.enumerate())
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Kernels(isa.host_isa(), tmp_path).prepare(SMALL)
    timer.join()
    assert time.monotonic() - begun < 30, "not when they had slept"
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert not set(threading.enumerate()) - threads


def test_what_was_compiled_before_ctrl_c_is_kept(tmp_path: Path, started: list[compilers.Process]) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Kernels(isa.host_isa(), tmp_path).prepare(SMALL, interrupt)
    assert len(list(tmp_path.rglob("*.o"))) == 2
    assert all(process.returncode is not None for process in started)


def test_they_end_with_this_process(tmp_path: Path) -> None:
    """Killed, it cannot end them: the end of their input does."""
    script = "from localmoe.kernels.cpu import compilers; p = compilers._start(); print(p.pid, flush=True); input()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", script], stdin=pipe, stdout=pipe, env=environment) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        assert alive(child)
        process.kill()
    end = time.monotonic() + 60
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for counts as ended."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize(
    ("kernels", "threads", "free", "processes"),
    [(20, 2, 64 << 30, 2), (20, 64, 64 << 30, 8), (3, 8, 64 << 30, 3), (20, 8, 1 << 30, 2), (20, 8, 1 << 20, 0)],
)
def test_there_are_as_many_as_cores_memory_and_kernels_allow(
    kernels: int, threads: int, free: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "default_threads", lambda: threads)
    monkeypatch.setattr(compilers, "available_nbytes", lambda: free)
    assert compilers.processes_for(kernels) == processes
    monkeypatch.setattr(sys, "executable", "")
    assert compilers.processes_for(kernels) == 0
