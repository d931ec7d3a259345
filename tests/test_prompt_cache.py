"""Claims about the state of conversations on disk, over a model whose every row is known: never a wrong row, always a
word about damage, nothing half-written believed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import stat
import struct
import sys
import time
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import ChainedModel, kept, text

from localmoe.engine import Engine
from localmoe.experts import budget
from localmoe.prompt_cache import cache, space
from localmoe.prompt_cache.entries import entry_of
from localmoe.prompt_cache.segment import HEAD, DamagedError, read_rows
from localmoe.prompt_cache.writer import Writer
from localmoe.sampling import SamplingSettings

SEGMENT, LEAST = 16, 8
ANSWER = SamplingSettings(temperature=0, max_tokens=12)
NO_STOP: frozenset[int] = frozenset()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 16 tokens, none of less than 8."""
    monkeypatch.setattr(cache, "SEGMENT_TOKENS", SEGMENT)
    monkeypatch.setattr(cache, "LEAST", LEAST)
    monkeypatch.setattr(cache, "STATES_APART", 40)


class Process:
    """What one process does with a folder: a model, its cache, an engine."""

    def __init__(self, folder: Path, *, slots: int = 0, limit: int | None = 1 << 30, name: bytes = b"chained") -> None:
        self.model = ChainedModel(slots=slots)
        self.cache = kept(self.model, folder, limit, name)
        self.engine = Engine(self.model, self.cache)

    def answer(self, prompt: list[int]) -> list[int]:
        """The text with its answer; every row is looked at."""
        steps = list(self.engine.generate(prompt, ANSWER, NO_STOP))
        self.model.check()
        return [*prompt, *(step.token for step in steps)]

    def ended(self) -> list[str]:
        self.cache.close()
        return self.cache.take_messages()


def answered(folder: Path, prompt: list[int], **how: int) -> Process:
    """A process that has answered and ended."""
    process = Process(folder, **how)
    process.answer(prompt)
    process.said = process.ended()
    return process


def files(folder: Path, suffix: str = "*") -> list[Path]:
    return sorted(path for path in folder.glob(f"*/{suffix}") if path.is_file())


def test_a_conversation_that_is_opened_again_runs_its_new_tokens_alone(tmp_path: Path) -> None:
    first = Process(tmp_path)
    said = first.answer(text(100))
    assert (first.engine.stats.restored_tokens, first.ended()) == (0, [])
    again = answered(tmp_path, [*said, 5, 6, 7])
    assert again.model.ran[0] == (111, 4)  # the last token of an answer has not run
    assert again.engine.stats.restored_tokens == 111
    assert (again.engine.stats.reused_tokens, again.said) == (0, [])


def test_what_stands_in_memory_is_not_read(tmp_path: Path) -> None:
    process = Process(tmp_path)
    said = process.answer(text(100))
    process.answer([*said, *text(20, 1)])
    assert (process.engine.stats.reused_tokens, process.engine.stats.restored_tokens) == (111, 0)
    process.ended()


def test_conversations_share_what_they_begin_with(tmp_path: Path) -> None:
    answered(tmp_path, [*text(70), *text(30, 1)])
    before = len(files(tmp_path))
    other = answered(tmp_path, [*text(70), *text(40, 2)])
    assert other.model.ran[0][0] == 70  # within a segment of 16
    third = answered(tmp_path, [*text(70), *text(50, 3)])
    assert third.model.ran[0][0] == 70
    assert len(files(tmp_path)) == before + 3 + 4  # 16 tokens each from 70 to 118, and to 131


def test_an_answer_writes_nothing_that_is_on_disk(tmp_path: Path) -> None:
    said = answered(tmp_path, text(200)).model.cached
    before = {path: path.stat().st_ino for path in files(tmp_path)}
    answered(tmp_path, [*said, *text(30, 1)])
    assert before.items() <= {path: path.stat().st_ino for path in files(tmp_path)}.items()


def test_rows_that_were_shifted_are_not_kept(tmp_path: Path) -> None:
    first = Process(tmp_path)
    words = text(100)
    first.model.shifted_from = 40  # what stands behind was computed behind other tokens
    first.answer(words)
    first.ended()
    second = Process(tmp_path)
    second.answer(words)
    assert second.engine.stats.restored_tokens == 40


@pytest.mark.parametrize("slots", [0, 4])
def test_what_is_forgotten_is_gone_and_what_others_said_stays(tmp_path: Path, slots: int) -> None:
    first = Process(tmp_path, slots=slots)
    mine, other = text(100, 1), text(100, 2)
    said, kept_by_others = first.answer(mine), first.answer(other)
    assert first.cache.forget([*said, 3, 4])
    assert not first.cache.forget([*said, 3, 4])
    first.ended()
    second = Process(tmp_path, slots=slots)
    second.answer([*said, 5])
    assert second.engine.stats.restored_tokens == 0
    second.answer([*kept_by_others, 5])
    assert second.engine.stats.restored_tokens > 80


def test_few_tokens_are_worth_no_file(tmp_path: Path) -> None:
    process = Process(tmp_path)
    list(process.engine.generate([1, 2], SamplingSettings(temperature=0, max_tokens=5), NO_STOP))
    assert (process.ended(), list(tmp_path.iterdir())) == ([], [])


def test_files_are_the_users_alone(tmp_path: Path) -> None:
    answered(tmp_path / "kept", text(100), slots=4)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(tmp_path / "kept")} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kept", *(tmp_path / "kept").iterdir())} == {
        0o700
    }


def test_a_prompt_that_was_interrupted_is_read_on(tmp_path: Path) -> None:
    process = Process(tmp_path)
    process.model.interrupt_at = 200
    with pytest.raises(KeyboardInterrupt):
        process.answer(text(300))
    process.ended()
    assert answered(tmp_path, text(300)).model.ran[0][0] == 192


def test_a_killed_process_loses_the_part_of_a_prompt_that_ran_last(tmp_path: Path) -> None:
    process, copy = Process(tmp_path / "alive"), tmp_path / "copy"

    def look(done: int, total: int) -> None:
        process.cache._writer.drain()
        if done == 96:
            shutil.copytree(tmp_path / "alive", copy)  # as a kill in the next step would leave it

    list(process.engine.generate(text(300), ANSWER, NO_STOP, look))
    process.ended()
    assert answered(copy, text(300)).model.ran[0][0] == 96


@pytest.mark.parametrize("slots", [0, 5])
def test_any_walk_through_conversations_gives_the_rows_of_their_tokens(
    tmp_path_factory: pytest.TempPathFactory, slots: int
) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def walk(data: st.DataObject) -> None:
        folder = tmp_path_factory.mktemp("walk")
        limit = data.draw(st.sampled_from([1 << 30, 60_000]))
        process = Process(folder, slots=slots, limit=limit)
        known: list[list[int]] = [[]]
        for number in range(data.draw(st.integers(2, 10))):
            parent = data.draw(st.sampled_from(known))
            begun = parent[: data.draw(st.integers(0, len(parent)))] if data.draw(st.booleans()) else list(parent)
            prompt = [*begun, *text(data.draw(st.integers(1, 70)), data.draw(st.integers(0, 3)))][:500]
            if data.draw(st.booleans()):
                process.cache.close()
                process = Process(folder, slots=slots, limit=limit)
            if data.draw(st.integers(0, 3)) == 0 and (there := files(folder)):
                data.draw(st.sampled_from(there)).unlink()
            fresh = Process(folder / f"fresh{number}", slots=slots)
            answer = process.answer(prompt)
            assert answer == fresh.answer(prompt)
            fresh.ended()
            shutil.rmtree(folder / f"fresh{number}", ignore_errors=True)
            known.append(answer)
            assert not [said for said in process.cache.take_messages() if "outgrows" not in said]
            process.cache._writer.drain()
            assert sum(path.stat().st_size for path in files(folder)) <= limit
        process.cache.close()
        shutil.rmtree(folder)

    walk()


def damaged(random: Random, data: bytes) -> bytes:
    """The bytes of a file as a disk or a crash may leave them; never the same."""
    found, at = bytearray(data), random.randrange(len(data))
    match random.randrange(6):
        case 0:
            found[at] ^= 1 << random.randrange(8)
        case 1:
            found[at : at + 4] = random.randbytes(len(found[at : at + 4]))
        case 2:
            del found[at:]
        case 3:
            found += random.randbytes(random.randrange(1, 5000))
        case 4:
            found[at : at + 512] = bytes(len(found[at : at + 512]))
        case _:
            del found[at : at + random.randrange(1, 200)]
    return bytes(found) if found != data else damaged(random, data)


@pytest.mark.parametrize("slots", [0, 4])
def test_a_thousand_damages_are_noticed_said_and_computed_again(tmp_path: Path, slots: int) -> None:
    prompt, random = text(150), Random(7)
    answered(tmp_path / "whole", prompt, slots=slots)
    whole_files = files(tmp_path / "whole")
    found = {path: entry_of(path.name) for path in whole_files}
    # What is read: the last states before the prompt's last token, and the rows before them.
    goal = max((entry.start for entry in found.values() if not entry.is_rows and entry.start < 150), default=150)
    here = [path for path, entry in found.items() if (entry.start < goal if entry.is_rows else entry.start == goal)]
    here.sort(key=lambda path: path.suffix)
    expected = Process(tmp_path / "expected", slots=slots).answer(prompt)
    for trial in range(500):
        path = random.choice(here) if trial % 3 or not slots else here[-1]
        whole = path.read_bytes()
        path.write_bytes(damaged(random, whole))
        process = Process(tmp_path / "whole", slots=slots)
        assert process.answer(prompt) == expected
        (said,) = process.ended()
        assert entry_of(path.name).place in said and "damaged" in said
        assert len(process.model.ran) < 20
        for other in set(files(tmp_path / "whole")) - set(whole_files):
            other.unlink()
        path.write_bytes(whole)
        assert files(tmp_path / "whole") == whole_files, "a file that was not damaged is gone"


def test_of_a_damaged_segment_its_own_tokens_are_computed_again_alone(tmp_path: Path) -> None:
    answered(tmp_path, text(200))
    (path,) = files(tmp_path, "64-80-*")
    path.write_bytes(path.read_bytes()[:-1])
    process = answered(tmp_path, text(200))
    assert process.model.ran[:2] == [(64, 16), (199, 1)]
    assert process.engine.stats.restored_tokens == 64 + 119
    assert path.exists(), "written anew"
    assert process.said == [
        "the kept state of a conversation is damaged (tokens 64 to 80: 1959 bytes, expected 1960): "
        "what is needed of it is computed again"
    ]


def test_what_stands_behind_a_hole_is_used_once_the_hole_is_computed(tmp_path: Path) -> None:
    answered(tmp_path, text(200))
    for start in (64, 128):
        (path,) = files(tmp_path, f"{start}-{start + 16}-*")
        path.unlink()
    process = answered(tmp_path, text(200))
    assert process.model.ran[:3] == [(64, 16), (128, 16), (199, 1)]
    assert process.said == []


def test_what_was_damaged_is_written_anew_and_good_again_in_the_same_process(tmp_path: Path) -> None:
    process = Process(tmp_path)
    process.answer(text(200))
    process.cache._writer.drain()
    (path,) = files(tmp_path, "64-80-*")
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    process.model.cached.clear()  # somebody else used the model
    process.answer(text(200))
    process.cache._writer.drain()
    assert path.read_bytes() == whole
    process.model.cached.clear()
    process.answer(text(200))
    assert process.engine.stats.restored_tokens == 199
    (said,) = process.ended()
    assert "(tokens 64 to 80: it is no kept state)" in said


def repacked(data: bytes, **changes: int | bytes) -> bytes:
    """A file with other fields in its header, and both checksums right."""
    names = ("magic", "version", "kind", "model", "start", "tokens", "before")
    fields = dict(zip(names, HEAD.unpack_from(data), strict=True)) | changes
    end = HEAD.size + 4 * SEGMENT
    head = HEAD.pack(*fields.values()) + data[HEAD.size : end]
    body = head + struct.pack("<I", zlib.crc32(head)) + data[end + 4 : -4]
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"magic": b"elsewise"}, "it is no kept state"),
        ({"version": 2}, "it has version 2, expected 1"),
        ({"model": bytes(32)}, "it is of another model, or of another layout of its cache"),
        ({"kind": 1}, "it is not what its name says"),
        ({"start": 16}, "it is not what its name says"),
        ({"tokens": 1 << 60}, "it is not what its name says"),
        ({"before": bytes(32)}, "it is not what its name says"),
    ],
)
def test_a_sound_file_of_something_else_is_refused(tmp_path: Path, changes: dict[str, int | bytes], words: str) -> None:
    answered(tmp_path, text(100))
    (path,) = files(tmp_path, "32-48-*")
    path.write_bytes(repacked(path.read_bytes(), **changes))
    process = answered(tmp_path, text(100))
    (said,) = process.said
    assert said.startswith(f"the kept state of a conversation is damaged (tokens 32 to 48: {words}): ")


def test_rows_of_other_tokens_under_a_right_name_are_refused(tmp_path: Path) -> None:
    answered(tmp_path, text(100))
    answered(tmp_path, text(100, 1))
    mine, other = (next(p for p in files(tmp_path, "0-16-*") if holds(p, text(16, n))) for n in (0, 1))
    shutil.copy(other, mine)
    (said,) = answered(tmp_path, text(100)).said
    assert "it is not what its name says" in said


def holds(path: Path, tokens: list[int]) -> bool:
    return np.array(tokens, "<i4").tobytes() in path.read_bytes()


def test_another_model_finds_nothing_and_is_not_told_of_it(tmp_path: Path) -> None:
    answered(tmp_path, text(100))
    process = answered(tmp_path, text(100), name=b"another")
    assert (process.engine.stats.restored_tokens, process.said) == (0, [])
    assert len(list(tmp_path.iterdir())) == 2


def test_files_of_another_model_in_this_ones_folder_are_refused_by_word(tmp_path: Path) -> None:
    answered(tmp_path / "a", text(100))
    answered(tmp_path / "b", text(100), name=b"another")
    (folder,), (other,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    start = {path.name.split("-")[0]: path for path in folder.iterdir()}
    for path in other.iterdir():
        shutil.copy(path, start[path.name.split("-")[0]])
    process = answered(tmp_path / "a", text(100))
    assert all("another model" in said for said in process.said) and len(process.said) == 7
    assert process.engine.stats.restored_tokens == 0


def test_no_size_in_a_name_is_believed(tmp_path: Path) -> None:
    answered(tmp_path, text(100))
    (path,) = files(tmp_path, "0-16-*")
    with pytest.raises(DamagedError, match="more tokens than a file has"):
        read_rows(path, bytes(32), entry_of(path.name)._replace(stop=999_999_999), np.empty(5000, np.uint8), 112)
    for name in ("0-999999999-", "99999999999-5-", "5-5-", "7-3-"):
        shutil.copy(path, path.with_name(path.name.replace("0-16-", name, 1)))
    assert (answered(tmp_path, text(100)).said, entry_of("7-3-" + path.name[5:])) == ([], None)


def test_files_used_longest_ago_go_first_and_a_conversations_own_never(tmp_path: Path) -> None:
    one = 18_000  # bytes of a conversation of 120 tokens, and a little more
    for number in range(3):
        answered(tmp_path, text(120, number), limit=3 * one)
        age(tmp_path, 10 * (9 - number))
    answered(tmp_path, text(120, 0), limit=3 * one)  # used again
    assert answered(tmp_path, text(120, 3), limit=3 * one).said == []
    restored = [
        Process(tmp_path, limit=3 * one).cache.restore(text(120, number)) and kept_tokens(tmp_path, text(120, number))
        for number in range(4)
    ]
    assert restored[0] == restored[3] == 119
    assert restored[1] < 40


def test_conversations_that_a_process_has_left_make_room_for_its_new_ones(tmp_path: Path) -> None:
    process = Process(tmp_path, limit=40_000)
    for number in range(6):
        process.answer(text(120, number))
        process.cache._writer.drain()
    assert process.ended() == []
    assert kept_tokens(tmp_path, text(120, 5)) == 119
    assert kept_tokens(tmp_path, text(120, 0)) < 60


def kept_tokens(folder: Path, prompt: list[int]) -> int:
    process = Process(folder)
    process.cache.restore(prompt)
    process.ended()
    return len(process.model.cached)


def age(folder: Path, seconds: float) -> None:
    for path in files(folder):
        state = path.stat()
        if time.time() - state.st_mtime < 5:
            os.utime(path, (state.st_atime - seconds, state.st_mtime - seconds))


@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_used_is_new_again(tmp_path: Path, restarted: bool) -> None:
    process = Process(tmp_path)
    said = process.answer(text(100))
    process.cache._writer.drain()
    age(tmp_path, 1000)
    if restarted:
        process = Process(tmp_path)
        process.cache.restore(said)
    else:
        process.answer([*said, *text(30, 1)])
    process.ended()
    ages = [time.time() - path.stat().st_mtime for path in files(tmp_path)]
    assert max(ages) < 500


def test_a_recurrent_prompt_that_was_killed_goes_on_from_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = cache.write

    def slowly(*arguments: object) -> None:
        time.sleep(0.01)  # longer than a step
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "write", slowly)
    process, copy = Process(tmp_path / "alive", slots=5), tmp_path / "copy"

    def look(done: int, total: int) -> None:
        if done == 224:
            shutil.copytree(tmp_path / "alive", copy)

    list(process.engine.generate(text(300), ANSWER, NO_STOP, look))
    process.ended()
    assert answered(copy, text(300), slots=5).model.ran[0][0] == 192


def test_of_a_conversation_its_end_goes_before_its_beginning(tmp_path: Path) -> None:
    answered(tmp_path, text(200))
    answered(tmp_path, text(200))
    age(tmp_path, 60)
    total = sum(path.stat().st_size for path in files(tmp_path))
    answered(tmp_path, text(60, 1), limit=total)
    assert 64 <= kept_tokens(tmp_path, text(200)) < 180


def test_a_conversation_that_outgrows_the_limit_is_kept_in_part_and_told_once(tmp_path: Path) -> None:
    process = Process(tmp_path, limit=9_000)
    said = process.answer(text(300))
    process.answer([*said, *text(50, 1)])
    assert process.ended() == [
        "the state of this conversation outgrows the 9 kB that it may take on disk: it is kept in part"
    ]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 9_000
    assert kept_tokens(tmp_path, text(300)) >= 64


def test_without_a_limit_a_tenth_of_the_free_disk_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage._replace(free=50_000))
    answered(tmp_path, text(300), limit=None)
    assert 0 < sum(path.stat().st_size for path in files(tmp_path)) <= 7_000


def test_what_a_killed_process_was_writing_is_removed_later(tmp_path: Path) -> None:
    answered(tmp_path, text(100))
    (folder,) = tmp_path.iterdir()
    old, new = folder / "a.new", folder / "b.new"
    for path in (old, new):
        path.write_bytes(bytes(100))
    os.utime(old, (1, 1))
    answered(tmp_path, text(100, 1))
    assert (old.exists(), new.exists()) == (False, True)


def test_of_a_conversation_few_states_are_kept(tmp_path: Path) -> None:
    process, said = Process(tmp_path, slots=6), text(60)
    for turn in range(8):
        said = process.answer([*said, *text(30, turn)])
    process.ended()
    assert len(files(tmp_path, "*.states")) == cache.STATES_KEPT
    again = answered(tmp_path, [*said, 1, 2], slots=6)
    assert again.model.ran[0][0] == len(said) - 1
    # A thinking model's template drops what was thought: it goes on from the mark before the answer.
    edited = answered(tmp_path, [*said[:-12], 9, 9, 9], slots=6)
    assert len(said) - 12 - 16 <= edited.model.ran[0][0] <= len(said) - 12


def test_states_that_a_step_may_have_changed_while_they_were_written_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, write = Process(tmp_path, slots=4), cache.write

    def disturbed(path: Path, head: bytes, content: list[np.ndarray], *sound: object) -> None:
        if path.suffix == ".states":
            process.model.forward([1], len(process.model.cached))  # by whoever else uses the model
        write(path, head, content, *sound)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "STATES_APART", 1000)
    monkeypatch.setattr(cache, "write", disturbed)
    process.answer(text(100))
    process.ended()
    assert len(files(tmp_path, "*.rows")) > 5
    assert files(tmp_path, "*.states") == files(tmp_path, "*.new") == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of file sizes")
def test_a_write_that_fails_is_told_once_and_the_chat_goes_on(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    process = Process(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        said = process.answer(text(100))
        said = process.answer([*said, *text(40, 1)])
        process.cache._writer.drain()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert process.cache.take_messages() == ["the state of this conversation cannot be kept on disk: File too large"]
    assert files(tmp_path) == []
    process.answer([*said, 1, 2])
    assert process.ended() == []
    assert kept_tokens(tmp_path, said) == len(said) - 1, "kept as soon as the disk takes it"


@pytest.mark.parametrize("error", ["No space left on device", "Input/output error"])
def test_a_full_disk_costs_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(28, error)

    monkeypatch.setattr(cache, "write", fails)
    for slots in (0, 4):
        process = answered(tmp_path, text(100), slots=slots)
        assert process.said == [f"the state of this conversation cannot be kept on disk: {error}"]


def test_a_folder_that_is_none_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    process = Process(tmp_path / "file")
    said = process.answer(text(100))
    process.answer([*said, *text(50, 1)])
    first, second = process.ended()
    assert first.startswith("the kept state of this conversation cannot be read: Not a directory")
    assert second.startswith("the state of this conversation cannot be kept on disk: Not a directory")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_that_cannot_be_read_is_told_and_left(tmp_path: Path) -> None:
    answered(tmp_path, text(100))
    (path,) = files(tmp_path, "32-48-*")
    path.unlink()
    path.mkdir()
    process = answered(tmp_path, text(100))
    assert process.said[0].startswith("the kept state of this conversation cannot be read: Is a directory")
    assert path.is_dir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    answered(tmp_path, text(100))
    (path,) = files(tmp_path, "32-48-*")
    path.unlink()
    os.mkfifo(path)
    (said,) = answered(tmp_path, text(100)).said
    assert "tokens 32 to 48: 0 bytes, expected 1960" in said


def test_a_file_that_another_process_has_removed_is_nothing_to_tell(tmp_path: Path) -> None:
    answered(tmp_path, text(100))
    process = Process(tmp_path)
    process.cache._folder.entries()
    process.cache._folder._changed = (tmp_path / next(tmp_path.iterdir())).stat().st_mtime_ns
    for path in files(tmp_path, "32-48-*"):
        before = path.parent.stat().st_mtime_ns
        path.unlink()
        os.utime(path.parent, ns=(before, before))
    process.answer(text(100))
    assert process.ended() == []


@pytest.mark.parametrize("slots", [0, 4])
def test_an_interrupt_while_rows_come_back_leaves_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    answered(tmp_path, text(200), slots=slots)
    for at in range(12):
        process, left = Process(tmp_path, slots=slots), [at]
        state = process.model.cache_state
        put = type(state).put_rows

        def interrupted(self: object, *arguments: object, put: object = put, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            put(self, *arguments)  # type: ignore[operator]

        with monkeypatch.context() as patched:
            patched.setattr(type(state), "put_rows", interrupted)
            with pytest.raises(KeyboardInterrupt):
                process.answer(text(200))
        process.model.check()
        assert len(process.model.cached) == SEGMENT * at
        process.answer(text(200))
        process.ended()


def test_an_interrupt_while_an_answer_is_kept_ends_the_keeping_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    process = Process(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("localmoe.kernels.cache_state.CacheState.copy_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.answer(text(100))  # while the prompt is read it stops that
        assert len(process.model.cached) == 32
        patched.setattr(process.cache, "_keep", lambda ids, done: done and interrupted())
        said = process.answer(text(100))
    process.answer([*said, 1])
    process.ended()
    assert kept_tokens(tmp_path, said) == len(said) - 1


def chat_for_long(folder: Path, seed: int, turns: int) -> None:
    """In a process of its own, which patches its own module."""
    cache.SEGMENT_TOKENS, cache.LEAST = SEGMENT, LEAST
    random = Random(seed)
    while turns:
        process = Process(folder, limit=300_000)
        said = text(random.randrange(20, 80), random.randrange(3))
        for _ in range(4):
            said = process.answer([*said, *text(random.randrange(1, 40), random.randrange(3))])
        assert process.ended() == [], "two processes disturb each other"
        turns -= 1


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    begin = multiprocessing.get_context("fork")
    processes = [begin.Process(target=chat_for_long, args=(tmp_path, seed, 12)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    check_all(tmp_path)


def check_all(folder: Path) -> int:
    """Every file under a right name is whole."""
    model = kept(ChainedModel(), folder)._folder.model
    for path in files(folder, "*.rows"):
        read_rows(path, model, entry_of(path.name), np.empty(1 << 16, np.uint8), 112)
    return len(files(folder, "*.rows"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_kill_at_any_moment_leaves_whole_files_alone(tmp_path: Path) -> None:
    begin, random, whole = multiprocessing.get_context("fork"), Random(3), 0
    for trial in range(25):
        process = begin.Process(target=chat_for_long, args=(tmp_path, trial, 1000))
        process.start()
        time.sleep(random.uniform(0.01, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        whole += check_all(tmp_path)
        chat_for_long(tmp_path, trial, 1)
    assert whole


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_in_the_writer_leaves_nobody_waiting() -> None:
    writer, done = Writer(), []

    def mistaken() -> None:
        time.sleep(0.01)
        raise AssertionError

    for _ in range(3):
        assert writer.put(mistaken)
        assert writer.put(lambda: done.append(1))
        writer.drain()
    writer.put(mistaken)
    writer.close()
    assert len(done) == 3


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of a disk that takes nothing for a while: what waits for it."""
    written: list[int] = []
    write = cache.write

    def slowly(*arguments: object) -> None:
        time.sleep(0.1)
        write(*arguments)  # type: ignore[arg-type]
        written.append(1)

    monkeypatch.setattr(cache, "write", slowly)
    monkeypatch.setattr("localmoe.prompt_cache.writer.PATIENCE", 0.01)
    return written


def test_a_disk_too_slow_loses_nothing_that_it_took_and_is_offered_the_rest_later(
    tmp_path: Path, slow_disk: list[int]
) -> None:
    process = Process(tmp_path)
    said = process.answer(text(200))
    process.cache._writer.drain()
    assert 0 < len(slow_disk) < 13
    for _ in range(8):
        said = process.answer([*said, 1])
        process.cache._writer.drain()
    assert process.ended() == []
    assert kept_tokens(tmp_path, text(200)) == 199


def test_what_is_in_hand_of_kept_rows_is_what_a_budget_counts() -> None:
    assert cache.AHEAD * cache.SEGMENT_NBYTES == budget.PASSING_NBYTES  # and one less when they are written
