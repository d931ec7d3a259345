"""What earlier sessions used: learned, faded, kept for the user alone, and never in the way."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.experts import usage as module
from localmoe.experts.usage import KEPT_FILES, MEMORY, Usage, fingerprint, usage_folder
from localmoe.loader.source import Source

USES = np.array([[6, 2, 0], [0, 0, 4]])


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    return Source(path, "gguf", {}, {}, 104)


def opened(source: Source, shape: tuple[int, int] = (2, 3)) -> Usage:
    return Usage(source, *shape, source.path.parent / "usage")


def kept(source: Source) -> Path:
    (file,) = (source.path.parent / "usage").iterdir()
    return file


def test_without_a_file_nothing_is_known_and_nothing_is_wrong(source: Source) -> None:
    found = opened(source)
    assert found.problem == ""
    assert not found.prior.any()
    assert not (source.path.parent / "usage").exists()


def test_a_session_is_known_to_the_next_as_shares(source: Source) -> None:
    opened(source).learn(USES)
    assert opened(source).prior.tolist() == [[0.75, 0.25, 0], [0, 0, 1]]


def test_sessions_add_up(source: Source) -> None:
    opened(source).learn(USES)
    opened(source).learn(np.array([[0, 0, 8], [4, 0, 0]]))
    assert opened(source).prior.tolist() == [[0.375, 0.125, 0.5], [0.5, 0, 0.5]]


def test_two_sessions_at_the_same_time_are_both_counted(source: Source) -> None:
    first, second = opened(source), opened(source)
    first.learn(USES)
    second.learn(np.array([[0, 0, 8], [4, 0, 0]]))
    assert opened(source).prior.tolist() == [[0.375, 0.125, 0.5], [0.5, 0, 0.5]]


def test_old_sessions_fade_and_counts_stay_bounded(source: Source) -> None:
    opened(source).learn(np.array([[MEMORY, 0, 0], [MEMORY, 0, 0]]))
    opened(source).learn(np.array([[0, MEMORY // 4, 0]] * 2))
    assert opened(source).prior[0].tolist() == [0.75, 0.25, 0]
    opened(source).learn(np.array([[0, 0, 100 * MEMORY]] * 2))
    assert opened(source).prior[0].tolist() == [0, 0, 1]
    assert np.array(json.loads(kept(source).read_text())["uses"]).sum(axis=1).max() <= MEMORY


def test_a_short_session_takes_little_from_a_long_one(source: Source) -> None:
    opened(source).learn(np.array([[MEMORY // 2, 0, 0]] * 2))
    opened(source).learn(np.array([[0, 8, 0]] * 2))
    assert opened(source).prior[0, 0] > 0.999


def test_a_session_that_used_nothing_writes_nothing(source: Source) -> None:
    opened(source).learn(np.zeros((2, 3), np.int64))
    assert not (source.path.parent / "usage").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_only_the_user_may_read_it(source: Source) -> None:
    opened(source).learn(USES)
    assert stat.S_IMODE(kept(source).stat().st_mode) == 0o600
    assert stat.S_IMODE(kept(source).parent.stat().st_mode) == 0o700


def test_name_size_and_header_tell_models_apart(source: Source, tmp_path: Path) -> None:
    first = fingerprint(source)
    assert first == fingerprint(source)
    assert first != fingerprint(Source(source.path, "gguf", {}, {}, 105))
    other = source.path.rename(tmp_path / "other.gguf")
    assert first != fingerprint(Source(other, "gguf", {}, {}, 104))
    source.path.write_bytes(b"GGUF" + b"\1" * 100)
    assert first != fingerprint(source)


def test_weights_are_not_read_for_a_fingerprint(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) / "model.gguf" for number in range(2)]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(bytes(module.HEADER_NBYTES) + bytes([number]))
    assert len({fingerprint(Source(path, "gguf", {}, {}, 1)) for path in paths}) == 1


def test_a_folder_is_known_by_its_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    folder = Source(tmp_path, "folder", {}, {}, 1)
    first = fingerprint(folder)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert fingerprint(folder) != first


BAD = {
    "cut": b'{"localmoe_usage": 1',
    "binary": bytes(range(256)),
    "empty": b"",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "foreign": b'{"name": "something else"}',
    "another version": b'{"localmoe_usage": 2, "layers": 2, "experts": 3, "uses": [[1,1,1],[1,1,1]]}',
    "another shape": b'{"localmoe_usage": 1, "layers": 3, "experts": 3, "uses": [[1,1,1],[1,1,1],[1,1,1]]}',
    "too few rows": b'{"localmoe_usage": 1, "layers": 2, "experts": 3, "uses": [[1,1,1]]}',
    "too few counts": b'{"localmoe_usage": 1, "layers": 2, "experts": 3, "uses": [[1,1,1],[1,1]]}',
    "floats": b'{"localmoe_usage": 1, "layers": 2, "experts": 3, "uses": [[1,1,1],[1,1,1.5]]}',
    "not numbers": b'{"localmoe_usage": 1, "layers": 2, "experts": 3, "uses": [[1,1,1],[1,1,NaN]]}',
    "negative": b'{"localmoe_usage": 1, "layers": 2, "experts": 3, "uses": [[1,1,1],[1,1,-1]]}',
    "huge": b'{"localmoe_usage": 1, "layers": 2, "experts": 3, "uses": [[1,1,1],[1,1,1' + b"0" * 300 + b"]]}",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_damaged_file_is_noticed_and_written_anew(source: Source, content: bytes) -> None:
    opened(source).learn(USES)
    kept(source).write_bytes(content)
    found = opened(source)
    assert found.problem.startswith(f"what earlier sessions used is not known: {kept(source)}: ")
    assert "\n" not in found.problem
    assert not found.prior.any()
    found.learn(USES)
    again = opened(source)
    assert again.problem == ""
    assert again.prior.tolist() == [[0.75, 0.25, 0], [0, 0, 1]]


@settings(max_examples=150)
@given(st.data())
def test_any_damage_gives_shares_or_a_message(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("m")
    (folder / "m").write_bytes(b"x")
    source = Source(folder / "m", "gguf", {}, {}, 1)
    opened(source).learn(USES)
    content = bytearray(kept(source).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    kept(source).write_bytes(content)
    found = opened(source)
    assert found.problem or np.isfinite(found.prior).all()
    assert found.prior.min() >= 0
    assert (found.prior.sum(axis=1) <= 1 + 1e-9).all()


def test_a_file_that_is_too_long_is_not_read(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(source).learn(USES)
    monkeypatch.setattr(module, "FILE_LIMIT", 10)
    assert "expected at most 10" in opened(source).problem


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_pipe_in_its_place_is_not_opened(source: Source) -> None:
    opened(source).learn(USES)
    place = kept(source)
    place.unlink()
    os.mkfifo(place)
    assert "is a pipe" in opened(source).problem


def test_a_folder_that_cannot_be_written_is_noticed(source: Source) -> None:
    (source.path.parent / "usage").write_text("a file where the folder should be")
    found = opened(source)
    found.learn(USES)
    assert "what this session used cannot be kept" in found.problem
    assert (source.path.parent / "usage").is_file()


def test_a_full_disk_leaves_the_old_file_and_no_other(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(source).learn(USES)
    before = kept(source).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    found = opened(source)
    monkeypatch.setattr(module.json, "dump", full)
    found.learn(USES)
    assert found.problem.endswith("(No space left on device)")
    assert kept(source).read_bytes() == before


def test_a_model_that_is_gone_is_noticed(tmp_path: Path) -> None:
    found = Usage(Source(tmp_path / "nowhere", "gguf", {}, {}, 1), 2, 3, tmp_path / "usage")
    found.learn(USES)
    assert found.problem == "" or "cannot be kept" in found.problem


def test_files_of_many_models_do_not_pile_up(source: Source) -> None:
    folder = source.path.parent / "usage"
    folder.mkdir()
    for number in range(KEPT_FILES + 5):
        (folder / f"{number}.usage.json").touch()
        os.utime(folder / f"{number}.usage.json", (number + 1, number + 1))
    opened(source).learn(USES)
    assert len(list(folder.iterdir())) == KEPT_FILES
    assert not (folder / "5.usage.json").exists()
    assert opened(source).prior.any()


def test_more_experts_than_any_model_has_are_not_kept(source: Source) -> None:
    found = opened(source, (1 << 10, 1 << 10))
    assert "not kept" in found.problem
    found.learn(np.ones((1 << 10, 1 << 10), np.int64))
    assert not (source.path.parent / "usage").exists()


def test_files_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCALMOE_CACHE", str(tmp_path))
    assert usage_folder() == tmp_path / "usage"
