"""Reading past the page cache: the file's very bytes, at every alignment; what fails says where and why."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from faulty_files import broken_disk

from localmoe.errors import FileFormatError, ReadError
from localmoe.experts.reading import BLOCK, FileReader
from localmoe.loader.files import MappedFile

SIZE = 5 * BLOCK + 123
CONTENT = np.random.default_rng(3).integers(0, 256, SIZE, np.uint8).tobytes()
POISON = 0xA5


@pytest.fixture
def file(tmp_path: Path) -> MappedFile:
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    return MappedFile.of(tmp_path / "m.gguf")


@pytest.fixture(params=[False, True], ids=["buffered", "direct"])
def reader(file: MappedFile, request: pytest.FixtureRequest) -> Iterator[FileReader]:
    found = FileReader(file, request.param)
    yield found
    found.close()


def aligned(nbytes: int) -> memoryview:
    """Memory that begins on a page, filled with poison."""
    buffer = memoryview(mmap.mmap(-1, nbytes))
    buffer[:] = bytes([POISON]) * nbytes
    return buffer


def test_every_piece_of_a_file_is_read_as_it_is(reader: FileReader) -> None:
    for first in range(0, SIZE, BLOCK):
        for blocks in (1, 2, 6):
            buffer = aligned(blocks * BLOCK)
            reader.read(buffer, first)
            expected = CONTENT[first : first + len(buffer)]
            assert bytes(buffer[: len(expected)]) == expected


def test_without_direct_reading_any_byte_may_be_the_first(file: MappedFile) -> None:
    reader = FileReader(file, False)
    assert reader.alignment == 1
    for first, count in ((0, 1), (1, 4096), (4095, 2), (SIZE - 1, 1), (777, 10000)):
        buffer = aligned(count)
        reader.read(buffer, first)
        assert bytes(buffer) == CONTENT[first : first + count]
    reader.close()


def test_nothing_is_written_behind_the_files_end(file: MappedFile) -> None:
    buffer = aligned(2 * BLOCK)
    FileReader(file, False).read(buffer, 5 * BLOCK)
    assert set(buffer[123:]) == {POISON}


def test_reads_that_come_in_pieces_are_put_together(reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        return whole(descriptor, [buffers[0][: BLOCK + (0 if len(calls) % 2 else BLOCK)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    buffer = aligned(6 * BLOCK)
    reader.read(buffer, 0)
    assert bytes(buffer[:SIZE]) == CONTENT
    assert len(calls) == 4


def test_a_direct_read_cut_inside_a_block_goes_on_from_its_beginning(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, offsets = os.preadv, []

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        offsets.append(offset)
        count = whole(descriptor, buffers, offset)
        return min(count, BLOCK + 7) if len(offsets) == 1 else count

    monkeypatch.setattr(os, "preadv", short)
    buffer = aligned(6 * BLOCK)
    reader.read(buffer, 0)
    assert bytes(buffer[:SIZE]) == CONTENT
    assert offsets == [0, BLOCK if reader.direct else BLOCK + 7]


def test_many_threads_may_read_at_a_time(reader: FileReader) -> None:
    wrong: list[int] = []

    def read(first: int) -> None:
        buffer = aligned(BLOCK)
        for _ in range(50):
            reader.read(buffer, first)
            if bytes(buffer) != CONTENT[first : first + BLOCK]:
                wrong.append(first)

    threads = [threading.Thread(target=read, args=(BLOCK * i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_error_of_the_disk_says_which_file_and_where(
    reader: FileReader, file: MappedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= 2 * BLOCK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return BLOCK

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ReadError) as found:
        reader.read(aligned(4 * BLOCK), 0)
    assert str(found.value) == f"{file.path}: at byte 8192: 8192 bytes cannot be read: Input/output error"


@pytest.mark.parametrize("left", [0, 100, BLOCK, BLOCK + 100])
def test_a_file_that_was_cut_is_named_as_such(reader: FileReader, file: MappedFile, left: int) -> None:
    os.truncate(file.path, left)
    with pytest.raises(FileFormatError, match=rf"changed while it was in use \(size {SIZE}, now {left}\)"):
        reader.read(aligned(3 * BLOCK), BLOCK)


def test_a_read_that_ends_early_for_no_reason_is_an_error_and_no_endless_loop(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: 0)
    with pytest.raises(ReadError, match=r"at byte 4096: 4096 bytes cannot be read: the file seems to end there"):
        reader.read(aligned(BLOCK), BLOCK)


def test_a_file_that_was_replaced_after_the_reader_opened_is_read_as_it_was(reader: FileReader) -> None:
    new = reader.file.path.with_suffix(".new")
    new.write_bytes(bytes(100))
    new.replace(reader.file.path)
    buffer = aligned(BLOCK)
    reader.read(buffer, BLOCK)
    assert bytes(buffer) == CONTENT[BLOCK : 2 * BLOCK]


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_was_replaced_deleted_or_cut_before_is_refused(file: MappedFile, direct: bool) -> None:
    before = open_at(file.path)
    os.truncate(file.path, 9)
    with pytest.raises(FileFormatError, match="now 9"):
        FileReader(file, direct)
    file.path.unlink()
    with pytest.raises(ReadError, match=r"m\.gguf: cannot be opened again for reading \(No such file or directory\)"):
        FileReader(file, direct)
    file.path.write_bytes(CONTENT)
    with pytest.raises(FileFormatError, match="changed while it was in use"):
        FileReader(file, direct)
    assert open_at(file.path) == before


def open_at(path: Path) -> int:
    """How many descriptors of this process are of files that have or had this name; 0 where no one can tell."""
    count = 0
    for descriptor in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with suppress(FileNotFoundError):  # the one that listed them
            count += str(path) in os.readlink(f"/proc/self/fd/{descriptor}")
    return count


def test_where_direct_reading_is_refused_the_page_cache_is_given_back(
    file: MappedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[tuple[int, int]] = []

    def refused(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if not hasattr(os, "posix_fadvise"):
        pytest.skip("Linux alone")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refused)
        reader = FileReader(file, True)
    assert (reader.direct, reader.alignment) == (False, 1)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, first, count, advice: given_back.append((first, count)))
    reader.read(aligned(4000), 5000)
    assert given_back == [(BLOCK, 2 * BLOCK)]
    reader.close()


def test_closing_twice_or_never_leaves_no_descriptor(file: MappedFile) -> None:
    before = open_at(file.path)
    reader = FileReader(file, False)
    reader.close()
    reader.close()
    assert open_at(file.path) == before
    FileReader(file, True)  # dropped: a thread closes what it had
    end = time.monotonic() + 60
    while open_at(file.path) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert open_at(file.path) == before


def test_a_disk_that_brings_everything_in_pieces_gives_the_same_bytes(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = broken_disk(monkeypatch, short=0.8)
    for _ in range(20):
        buffer = aligned(6 * BLOCK)
        reader.read(buffer, 0)
        assert bytes(buffer[:SIZE]) == CONTENT
    assert disk.reads > 40


def test_a_disk_that_fails_at_times_never_gives_wrong_bytes(
    reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = broken_disk(monkeypatch, failing=0.3, short=0.5)
    refused = 0
    for _ in range(60):
        buffer = aligned(6 * BLOCK)
        try:
            reader.read(buffer, 0)
        except ReadError:
            refused += 1
        else:
            assert bytes(buffer[:SIZE]) == CONTENT
    assert 0 < refused < 60
    disk.mend()
    reader.read(buffer, 0)
    assert bytes(buffer[:SIZE]) == CONTENT
