"""The registry of mapped files: every byte that is a view has its place, and a file that changed is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from test_folder_formats import FLOAT8, LLAMA, SYMMETRIC, two_folders
from test_gguf import split
from test_safetensors import write_shards
from tiny_models import qwen3moe

from localmoe.errors import FileFormatError
from localmoe.loader.files import MappedFile, by_address, place
from localmoe.loader.gguf import open_gguf
from localmoe.loader.huggingface import open_folder
from localmoe.loader.source import Source


def check_places(source: Source) -> None:
    """Each slab's bytes stand in a file, at the place that is said."""
    assert source.files
    for weight in source.tensors.values():
        for slab in weight.slabs:
            file, offset = place(source.files, slab.ctypes.data, slab.size) or pytest.fail(weight.name)
            with open(file.path, "rb") as stored:
                stored.seek(offset)
                assert stored.read(slab.size) == slab.tobytes(), weight.name


def test_every_slab_of_a_gguf_file_has_its_place(tmp_path: Path) -> None:
    source = open_gguf(qwen3moe(tmp_path / "m.gguf", format="Q8_0"))
    check_places(source)
    assert [f.nbytes for f in source.files] == [source.nbytes]


def test_every_part_of_a_split_file_and_every_shard_of_a_folder_is_registered_once(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for source, count in ((open_gguf(split(tmp_path)[1]), 3), (open_folder(write_shards(tmp_path / "shards")), 2)):
        check_places(source)
        assert len(source.files) == count
        assert sum(f.nbytes for f in source.files) == source.nbytes


def test_eight_bit_floats_have_a_place_and_words_that_were_turned_have_none(tmp_path: Path) -> None:
    cases = {"fp8": FLOAT8["one a matrix, an axis"], "gptq": (LLAMA, *SYMMETRIC["gptq, 32"])}
    for name, (config, scheme, how) in cases.items():
        (tmp_path / name).mkdir()
        network, _, _ = two_folders(tmp_path / name, config, scheme, how)
        (slab,) = network.tensors["blk.0.attn_q.weight"].slabs
        found = place(network.source.files, slab.ctypes.data, slab.size)
        assert (found is not None) == (name == "fp8")


def test_memory_of_our_own_has_no_place(tmp_path: Path) -> None:
    files = by_address(MappedFile.of(written(tmp_path / name, 5000)) for name in "abc")
    own = np.zeros(10, np.uint8)
    assert place(files, own.ctypes.data, own.size) is None
    assert place((), own.ctypes.data, own.size) is None
    for file in files:
        assert place(files, file.address, file.nbytes) == (file, 0)
        assert place(files, file.address + 4999, 1) == (file, 4999)
        found = place(files, file.address + 4999, 2)
        assert found is None or found[0] is not file
        before = place(files, file.address - 1, 1)
        assert before is None or before[0] is not file


def written(path: Path, nbytes: int) -> Path:
    path.write_bytes(bytes(range(250)) * (nbytes // 250))
    return path


def test_a_file_that_nobody_touched_passes(tmp_path: Path) -> None:
    file = MappedFile.of(written(tmp_path / "m", 1000))
    with open(tmp_path / "m", "rb") as other:
        other.read()
    file.check()


@pytest.mark.parametrize("size", [0, 100, 1001])
def test_a_file_that_was_cut_or_grew_is_refused_with_both_sizes(tmp_path: Path, size: int) -> None:
    file = MappedFile.of(written(tmp_path / "m", 1000))
    os.truncate(tmp_path / "m", size)
    with pytest.raises(FileFormatError) as found:
        file.check()
    expected = f"{tmp_path / 'm'}: changed while it was in use (size 1000, now {size}): open it again"
    assert str(found.value) == expected


def test_a_file_that_was_written_to_is_refused(tmp_path: Path) -> None:
    file = MappedFile.of(written(tmp_path / "m", 1000))
    with open(tmp_path / "m", "r+b") as other:
        other.write(b"\xff")
    os.utime(tmp_path / "m", ns=(0, file.identity.changed + 1))
    with pytest.raises(FileFormatError, match=r"changed while it was in use \(written to\): open it again"):
        file.check()


def test_a_file_that_was_replaced_or_deleted_goes_on(tmp_path: Path) -> None:
    file = MappedFile.of(written(tmp_path / "m", 1000))
    before = file.data[:]
    written(tmp_path / "new", 500).replace(tmp_path / "m")
    file.check()
    (tmp_path / "m").unlink()
    file.check()
    assert file.data[:] == before


def test_a_link_that_points_elsewhere_by_now_changes_nothing_but_its_file_does(tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to(written(tmp_path / "one", 1000))
    file = MappedFile.of(tmp_path / "m")
    (tmp_path / "m").unlink()
    (tmp_path / "m").symlink_to(written(tmp_path / "other", 500))
    file.check()
    os.utime(tmp_path / "one", ns=(0, 0))
    with pytest.raises(FileFormatError, match="written to"):
        file.check()


def test_a_deleted_file_that_is_cut_by_someone_who_holds_it_is_refused(tmp_path: Path) -> None:
    file = MappedFile.of(written(tmp_path / "m", 1000))
    with open(tmp_path / "m", "r+b") as other:
        (tmp_path / "m").unlink()
        other.truncate(10)
        with pytest.raises(FileFormatError, match="size 1000, now 10"):
            file.check()
