"""The probe of a disk: how much it reads, what it leaves behind, and what it says."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import localmoe.experts.pieces
import localmoe.experts.probe
from localmoe.experts.pieces import Piece, cached_share
from localmoe.experts.probe import ALIGNMENT, MOST_NBYTES, DiskSpeed, Rate, Reader, probe
from localmoe.formats import FORMATS, Weight
from localmoe.loader.files import MappedFile

NBYTES = 48 * 1024 + 100  # of a matrix; neither it nor the place where the first begins is a multiple of a page
EXPERTS, BEGIN = 64, 1000
RANDOM = getattr(os, "POSIX_FADV_RANDOM", None)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and the page cache")


def experts(path: Path) -> Model:
    """A file of EXPERTS matrices on disk, none of it in the page cache, as a loader gives it."""
    with open(path, "wb") as file:
        file.write(np.random.default_rng(1).bytes(BEGIN + EXPERTS * NBYTES))
        file.flush()
        os.fsync(file.fileno())
    drop(path)
    mapped = MappedFile.of(path)
    whole = np.frombuffer(mapped.data, np.uint8)[BEGIN:]
    slabs = tuple(whole[i * NBYTES : (i + 1) * NBYTES] for i in range(EXPERTS))
    return Model(Weight("blk.0.ffn_gate_exps.weight", (EXPERTS, 1, NBYTES), FORMATS["I8"], slabs), mapped)


class Model(NamedTuple):
    weight: Weight
    file: MappedFile


def pieces(model: Model) -> list[Piece]:
    return localmoe.experts.pieces.pieces([model.weight], [model.file])


def drop(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def without_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localmoe.experts.probe, "_reads_directly", lambda path: False)


def test_matrices_are_found_where_they_lie_in_the_file(tmp_path: Path) -> None:
    model = experts(tmp_path / "a file")
    found = pieces(model)
    assert sorted(piece.start for piece in found) == [BEGIN + i * NBYTES for i in range(EXPERTS)]
    assert {(piece.path, piece.nbytes) for piece in found} == {(tmp_path / "a file", NBYTES)}
    content = (tmp_path / "a file").read_bytes()
    by_address = {slab.ctypes.data: slab.tobytes() for slab in model.weight.slabs}
    assert all(by_address[p.address] == content[p.start : p.start + NBYTES] for p in found)


def test_memory_that_is_no_file_has_no_place(tmp_path: Path) -> None:
    slab = np.zeros(100_000, np.uint8)
    planned = np.broadcast_to(np.zeros(1, np.uint8), 100_000)  # of a model that is planned
    weights = [Weight("x", (1, 100_000), FORMATS["I8"], (data,)) for data in (slab, planned)]
    model = experts(tmp_path / "file")
    assert localmoe.experts.pieces.pieces(weights, [model.file]) == []
    assert localmoe.experts.pieces.pieces([model.weight], []) == []


def test_the_share_in_the_page_cache_is_that_of_the_pages_read(tmp_path: Path) -> None:
    model = experts(tmp_path / "file")
    found = pieces(model)
    assert cached_share(found) == 0
    for part, least, most in ((0.5, 0.45, 0.6), (1.0, 1.0, 1.0)):
        for _ in range(10):  # the system takes pages back when it likes
            with open(tmp_path / "file", "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                os.pread(file.fileno(), int(part * EXPERTS) * NBYTES, BEGIN)
            share = cached_share(found)
            assert share is not None
            assert share <= most
            if share >= least:
                break
        assert share >= least
    assert cached_share([]) is None


def test_of_a_file_that_belongs_to_another_the_system_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = experts(tmp_path / "file")
    found = pieces(model)
    monkeypatch.setattr(os, "geteuid", lambda: -1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert cached_share(found) is None


@pytest.mark.parametrize("direct", [True, False])
def test_a_probe_leaves_nothing_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    if not direct:
        without_direct_reads(monkeypatch)
    model = experts(tmp_path / "file")
    found = pieces(model)
    speed = probe(found, seconds=0.05)
    assert speed is not None
    assert cached_share(found) == 0
    assert speed.read_nbytes >= NBYTES
    assert all(rate.nbytes_per_second > 0 for rate in speed.rates)


def test_what_is_cached_stays_so_and_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said of every piece here, as a system may take pages back at any moment."""
    without_direct_reads(monkeypatch)
    model = experts(tmp_path / "file")
    found = pieces(model)
    touched = []
    monkeypatch.setattr(os, "preadv", lambda *place: touched.append(place) or 0)
    advise = os.posix_fadvise
    monkeypatch.setattr(
        os, "posix_fadvise", lambda *place: advise(*place) if place[-1] == RANDOM else touched.append(place)
    )
    monkeypatch.setattr(Piece, "cached", 1.0)
    assert probe(found, seconds=0.05) is None
    assert touched == []
    monkeypatch.setattr(Piece, "cached", 0.0)
    probe(found, seconds=0.05)
    assert touched, "or nothing was looked at above"


@pytest.mark.parametrize("way", ["direct", "buffered"])
def test_a_reader_reads_whole_pages_around_a_piece(tmp_path: Path, way: localmoe.experts.probe.Way) -> None:
    model = experts(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    drop(tmp_path / "file")
    if way == "direct" and not localmoe.experts.probe._reads_directly(tmp_path / "file"):
        pytest.skip("this file system reads through the page cache only")
    with Reader(way, MOST_NBYTES) as reader:
        for piece in pieces(model):
            nbytes, start = reader.read(piece), piece.start & -ALIGNMENT
            assert start + nbytes >= piece.start + piece.nbytes
            assert reader._buffer[:nbytes] == content[start : start + nbytes]


def test_a_reader_reads_no_more_than_its_limit(tmp_path: Path) -> None:
    model = experts(tmp_path / "file")
    found = pieces(model)
    with Reader("buffered", ALIGNMENT) as reader:
        assert reader.read(found[0]) == ALIGNMENT


def test_a_slow_disk_is_not_read_for_longer_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_direct_reads(monkeypatch)
    model = experts(tmp_path / "file")
    found = pieces(model)
    reads = []

    def slow(file: int, buffers: list[memoryview], start: int) -> int:
        time.sleep(0.05)
        reads.append(len(buffers[0]))
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", slow)
    assert probe(found, seconds=0.3) is not None
    # One read to begin with; then 0.25 s, of which each thread of the three phases takes a third in turns of 0.05.
    assert len(reads) <= 1 + (1 + 2 + 4) * 2


def test_a_disk_on_which_the_first_read_takes_all_the_time_has_a_speed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_direct_reads(monkeypatch)
    model = experts(tmp_path / "file")
    found = pieces(model)

    def slow(file: int, buffers: list[memoryview], start: int) -> int:
        time.sleep(0.1)
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", slow)
    speed = probe(found, seconds=0.05)
    assert speed is not None
    assert [(rate.way, rate.depth) for rate in speed.rates] == [("buffered", 1)]
    assert speed.best.nbytes_per_second < NBYTES * 2 / 0.1


def test_holes_of_a_sparse_file_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(10 << 20)
    mapped = MappedFile.of(tmp_path / "sparse")
    data = np.frombuffer(mapped.data, np.uint8)
    model = Model(Weight("x", (1, data.size), FORMATS["I8"], (data,)), mapped)
    tries = []
    monkeypatch.setattr(localmoe.experts.probe, "_is_hole", lambda *place: tries.append(place) or True)
    assert probe(pieces(model), seconds=60) is None  # it does not go on for a minute
    assert len(tries) == localmoe.experts.probe.SKIPPED
    monkeypatch.undo()
    assert probe(pieces(model), seconds=0.02) is None


def test_nothing_is_said_of_no_pieces_and_of_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert probe([]) is None
    assert probe([Piece(tmp_path / "gone", 0, NBYTES, 0)], seconds=0.02) is None


def test_a_read_that_fails_ends_the_probe_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_direct_reads(monkeypatch)
    model = experts(tmp_path / "file")
    found = pieces(model)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    assert probe(found, seconds=0.02) is None


def test_the_page_cache_is_passed_by_unless_it_is_clearly_quicker_at_the_same_depth() -> None:
    buffered = DiskSpeed(NBYTES, (Rate("direct", 1, 1e9), Rate("direct", 2, 1.4e9), Rate("buffered", 2, 1.6e9)))
    direct = DiskSpeed(NBYTES, (Rate("direct", 2, 1.5e9), Rate("buffered", 2, 1.6e9), Rate("direct", 4, 2e9)))
    alone = DiskSpeed(NBYTES, (Rate("direct", 1, 1e9), Rate("direct", 2, 0.9e9)))
    assert [speed.way for speed in (buffered, direct, alone)] == ["buffered", "direct", "direct"]
    assert [speed.best.depth for speed in (buffered, direct, alone)] == [2, 4, 1]


def test_a_system_without_posix_fadvise_is_probed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS."""
    model = experts(tmp_path / "a file")
    monkeypatch.delattr(os, "posix_fadvise")
    with Reader("buffered", MOST_NBYTES) as reader:
        assert reader.read(pieces(model)[0]) > 0
