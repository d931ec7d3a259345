"""Files that break while they are mapped: the process lives, the step is refused, and no wrong token comes out.

Whatever may end a process runs in one of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import deepseek2, qwen3moe

from localmoe.guard import bus_errors

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(bus_errors() is None, reason="nothing is guarded on this system")
HEAD = """
import ctypes, faulthandler, mmap, os, signal, sys, threading, time
from pathlib import Path
import numpy as np
import localmoe
from localmoe.errors import LocalMoeError
from localmoe.guard import Guard, bus_errors
from localmoe.loader.files import MappedFile
from localmoe.loader.soundness import Soundness
from localmoe.sampling import SamplingSettings

path = Path(sys.argv[1])
GREEDY = SamplingSettings(temperature=0, max_tokens=24)
PROMPT = list(b"the quick brown fox jumps over the lazy dog")

def tokens(model, prompt=PROMPT):
    return [step.token for step in model.generate(prompt, GREEDY)]

def refusal(act):
    try:
        act()
    except LocalMoeError as error:
        return f"{type(error).__name__} {error}"
    raise AssertionError("nothing was refused")

def disposition():
    found = (ctypes.c_size_t * 20)()
    ctypes.CDLL(None).sigaction(signal.SIGBUS, None, found)
    return found[0]
"""


def outcome(script: str, *arguments: object) -> tuple[int, list[str]]:
    """How the script ended (a signal as a negative number), and its lines."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )
    print(done.stderr)
    return done.returncode, done.stdout.splitlines()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pages and a piece of a fifth."""
    path = tmp_path_factory.mktemp("small") / "m"
    path.write_bytes(b"x" * 16500)
    return path


def test_without_a_guard_the_process_ends(small: Path) -> None:
    code, _ = outcome("f = MappedFile.of(path); os.truncate(path, 0); f.data[5000]", copied(small))
    assert code == -signal.SIGBUS


def copied(path: Path) -> Path:
    copy = path.with_name(f"copy-{os.urandom(4).hex()}{path.suffix}")
    copy.write_bytes(path.read_bytes())
    return copy


def test_a_fault_is_counted_and_what_lies_before_it_stays(small: Path) -> None:
    script = """
f = MappedFile.of(path)
guard = Guard([(f.address, f.nbytes)])
assert guard.fault() is None and f.data[9000] == ord("x")
os.truncate(path, 8192)
assert f.data[8191] == ord("x") and f.data[9000] == 0 and f.data[16400] == 0
number, address = guard.fault()
print(number, address - f.address, f.data[:8192] == b"x" * 8192)
"""
    assert outcome(script, copied(small)) == (0, ["0 9000 True"])


def test_the_handler_of_before_comes_back_with_the_last_guard_and_faults_elsewhere_are_its_own(small: Path) -> None:
    script = """
before = disposition()
f = MappedFile.of(path)
one, other = Guard([(f.address, 4096)]), Guard([(f.address + 4096, 4096)])
ours = disposition()
one.close()
assert disposition() == ours != before
other.close()
assert disposition() == before
one = Guard([(f.address, 4096)])
print("guarded", flush=True)
os.truncate(path, 0)
f.data[5000]
"""
    assert outcome(script, copied(small)) == (-signal.SIGBUS, ["guarded"])


def test_a_guard_that_nobody_closed_ends_with_its_owner(small: Path) -> None:
    script = """
before = disposition()
f = MappedFile.of(path)
guard = Guard([(f.address, 4096)])
assert disposition() != before
del guard
end = time.monotonic() + 60
while disposition() != before and time.monotonic() < end:
    time.sleep(0.01)
assert disposition() == before
"""
    assert outcome(script, copied(small)) == (0, [])


def test_pythons_own_handler_still_reports_a_fault_elsewhere_and_nothing_of_ours(small: Path) -> None:
    script = """
faulthandler.enable(sys.stdout)
f = MappedFile.of(path)
guard = Guard([(f.address, 4096)])
os.truncate(path, 0)
f.data[100]
print("survived", guard.fault() is not None, flush=True)
f.data[5000]
"""
    code, lines = outcome(script, copied(small))
    assert (code, lines[:2]) == (-signal.SIGBUS, ["survived True", "Fatal Python error: Bus error"])


def test_a_signal_that_another_process_sends_ends_the_process_as_ever(small: Path) -> None:
    script = "f = MappedFile.of(path); g = Guard([(0, 1 << 62)]); os.kill(os.getpid(), signal.SIGBUS); print('alive')"
    assert outcome(script, copied(small)) == (-signal.SIGBUS, [])


def test_many_threads_may_fault_at_a_time(small: Path) -> None:
    script = """
path.write_bytes(bytes([1]) * (64 << 20))
f = MappedFile.of(path)
guard = Guard([(f.address, f.nbytes)])
data = np.frombuffer(f.data, np.uint8)
threads = [threading.Thread(target=lambda i=i: [data[i::8192].sum() for _ in range(3)]) for i in range(8)]
for thread in threads: thread.start()
os.truncate(path, 4096)
for thread in threads: thread.join()
assert data[4096:].sum() == 0 and data[:4096].all()
print(guard.fault() is not None)
"""
    assert outcome(script, copied(small)) == (0, ["True"])


def test_a_file_that_was_unreadable_for_a_time_is_mapped_again(small: Path) -> None:
    script = """
f = MappedFile.of(path)
sound = Soundness((f,))
before = f.data[:]
os.truncate(path, 0)
f.data[5000], f.data[0]
path.write_bytes(before)
os.utime(path, ns=(0, f.identity.changed))
assert f.data[:] != before
print(refusal(sound.check))
sound.begin()
sound.check()
assert f.data[:] == before
"""
    path = copied(small)
    expected = f"ReadError {path}: at byte 0: cannot be read: does the disk still work?"
    assert outcome(script, path) == (0, [expected])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("model") / "m.gguf", format="Q8_0")


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_file_cut_between_two_steps_is_refused_by_the_next(model: Path, device: str) -> None:
    script = """
model = localmoe.load(path, device=sys.argv[2], lazy="mmap")
size = path.stat().st_size
tokens(model)
kept = list(model.cached)
os.truncate(path, 1000)
for _ in range(2):
    print(refusal(lambda: tokens(model)))
    assert model.cached == kept[: len(model.cached)]
model.close()
"""
    path = copied(model)
    size = path.stat().st_size
    line = f"FileFormatError {path}: changed while it was in use (size {size}, now 1000): open it again"
    assert outcome(script, path, device) == (0, [line, line])


CUT_INSIDE = """
import localmoe.loader.soundness as soundness
whole = path.read_bytes()
model = localmoe.load(path, device=sys.argv[2], lazy="mmap")
fresh = tokens(model)
started = Soundness.begin
file = model.source.files[0]
cut_at = int(sys.argv[3])

def cut(self):
    started(self)
    Soundness.begin = started
    os.truncate(path, cut_at)

model.forward(PROMPT[:20], 0)
Soundness.begin = cut
"""


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("left", [0, 30000])
@pytest.mark.parametrize("family", ["gqa", "mla"])
def test_a_file_cut_inside_a_step_costs_that_step_alone(tmp_path: Path, family: str, device: str, left: int) -> None:
    """What was computed stays, what follows is refused; the same file whole again is read on as if nothing had been."""
    script = """
print(refusal(lambda: model.forward(PROMPT[20:40], 20)))
assert model.cached == PROMPT[:20]
path.write_bytes(whole)
print(refusal(lambda: tokens(model)))
os.utime(path, ns=(0, file.identity.changed))
assert tokens(model) == fresh
model.close()
"""
    path = (qwen3moe if family == "gqa" else deepseek2)(tmp_path / "m.gguf", format="Q8_0")
    size = path.stat().st_size
    code, lines = outcome(CUT_INSIDE + script, path, device, left)
    changed = f"FileFormatError {path}: changed while it was in use"
    expected = [f"{changed} (size {size}, now {left}): open it again", f"{changed} (written to): open it again"]
    assert (code, lines) == (0, expected)


def test_a_read_error_inside_a_step_names_the_place_and_the_next_question_is_answered(model: Path) -> None:
    """As of a disk that fails for a moment: the file is the same afterwards."""
    script = """
checked = Soundness.check

def mended(self):
    path.write_bytes(whole)
    os.utime(path, ns=(0, file.identity.changed))
    Soundness.check = checked
    checked(self)

Soundness.check = mended
found = refusal(lambda: model.forward(PROMPT[20:40], 20))
assert "ReadError" in found and "m" in found and "cannot be read: does the disk still work?" in found, found
assert model.cached == PROMPT[:20]
assert tokens(model) == fresh
model.close()
"""
    assert outcome(CUT_INSIDE + script, copied(model), "cpu", 0) == (0, [])


def test_a_file_that_is_cut_at_any_time_ends_no_process_and_gives_no_wrong_token(model: Path) -> None:
    script = """
whole = path.read_bytes()
model = localmoe.load(path, lazy="mmap")
right = tokens(model)
refused = 0
for turn in range(30):
    model.forward([1], 0)
    os.utime(path, ns=(0, model.source.files[0].identity.changed))
    timer = threading.Timer(0.0005 * turn, lambda: os.truncate(path, 4096 * (turn % 5)))
    timer.start()
    found = []
    try:
        for step in model.generate(PROMPT, GREEDY):
            found.append(step.token)
    except LocalMoeError:
        refused += 1
    assert found == right[: len(found)], (found, right)
    timer.join()
    path.write_bytes(whole)
    os.utime(path, ns=(0, model.source.files[0].identity.changed))
print(refused > 0)
assert tokens(model) == right
model.close()
"""
    assert outcome(script, copied(model)) == (0, ["True"])


def test_a_file_cut_while_it_is_read_ahead_or_read_whole_ends_no_process(model: Path) -> None:
    script = """
import localmoe.model
read_all = localmoe.model.read_all

def cut(source, progress=None):
    os.truncate(path, 4096)
    read_all(source, progress)

localmoe.model.read_all = cut
print(refusal(lambda: localmoe.load(path, lazy="off")))
"""
    path = copied(model)
    size = path.stat().st_size
    line = f"FileFormatError {path}: changed while it was in use (size {size}, now 4096): open it again"
    assert outcome(script, path) == (0, [line])


def test_a_file_replaced_under_its_name_goes_on_being_the_one_that_was_opened(model: Path) -> None:
    script = """
model = localmoe.load(path, lazy="mmap")
right = tokens(model)
Path(f"{path}.new").write_bytes(bytes(100))
os.replace(f"{path}.new", path)
model.forward([1], 0)
assert tokens(model) == right
path.unlink()
model.forward([1], 0)
assert tokens(model) == right
model.close()
"""
    assert outcome(script, copied(model)) == (0, [])


def test_a_folder_is_guarded_shard_by_shard(tmp_path: Path) -> None:
    script = """
from localmoe.loader.huggingface import open_folder
source = open_folder(path)
sound = Soundness(source.files)
os.truncate(path / "b.safetensors", 3)
source.tensors["output_norm.weight"].slabs[0].sum()
print(refusal(sound.check))
"""
    from test_safetensors import write_shards

    folder = write_shards(tmp_path)
    size = (folder / "b.safetensors").stat().st_size
    line = (
        f"FileFormatError {folder / 'b.safetensors'}: changed while it was in use (size {size}, now 3): open it again"
    )
    assert outcome(script, folder) == (0, [line])
