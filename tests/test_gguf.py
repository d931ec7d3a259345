"""GGUF files by hand: what is read, what is refused and in which words; typed metadata, tensors by name."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writing import (
    ARRAY,
    FLOAT64,
    INT8,
    INT16,
    INT64,
    STRING,
    UINT8,
    UINT16,
    UINT64,
    Tensor,
    Typed,
    gguf_bytes,
    write_gguf,
)

from localmoe.errors import FileFormatError, LocalMoeError, UnsupportedError
from localmoe.formats import FORMATS
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.gguf import open_gguf
from localmoe.loader.locate import bundled, open_source
from localmoe.loader.metadata import Metadata
from localmoe.loader.source import LazyWeights, Source

HUGE = 1 << 63
LLAMA = {"general.architecture": "llama", "llama.block_count": 2}


def refusal(path: Path, kind: type[LocalMoeError] = FileFormatError) -> str:
    """The message with which opening is refused: one line that names the file."""
    with pytest.raises(kind) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert path.parent.name in message
    assert "\n" not in message
    return message


# What is read


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type_is_read(tmp_path: Path, version: int) -> None:
    scalars = {
        "a": Typed(UINT8, 255), "b": Typed(INT8, -128), "c": Typed(UINT16, 65535), "d": Typed(INT16, -32768), "e": 7,
        "f": Typed(5, -7), "g": 0.5, "h": True, "i": "é 日本", "j": Typed(UINT64, 2**64 - 1),
        "k": Typed(INT64, -(2**63)), "l": Typed(FLOAT64, 0.1),
    }  # fmt: skip
    found = open_gguf(write_gguf(tmp_path / "m.gguf", scalars, version=version)).metadata
    assert list(found.values()) == [255, -128, 65535, -32768, 7, -7, 0.5, True, "é 日本", 2**64 - 1, -(2**63), 0.1]
    assert type(found["h"]) is bool


@pytest.mark.parametrize("of", [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12])
def test_arrays_of_every_number_type_are_read(tmp_path: Path, of: int) -> None:
    numbers = [True, False, True] if of == 7 else [1, 2, 3]
    found = open_gguf(write_gguf(tmp_path / "m.gguf", {"a": Typed(ARRAY, numbers, of), "b": 1})).metadata
    assert found["a"].tolist() == numbers
    assert found["b"] == 1


def test_arrays_of_strings_keep_tokens_that_are_not_utf8_in_their_place(tmp_path: Path) -> None:
    tokens = Typed(ARRAY, ["a", b"\xff\xfe", "", "ü"], STRING)
    assert open_gguf(write_gguf(tmp_path / "m.gguf", {"t": tokens})).metadata["t"] == ["a", "\ufffd\ufffd", "", "ü"]


def test_strings_that_are_not_wanted_are_counted(tmp_path: Path) -> None:
    keys = {
        "name": "é",
        "t": Typed(ARRAY, ["a", b"\xff\xfe", "", "ü"], STRING),
        "empty": Typed(ARRAY, [], STRING),
        "n": 3,
    }
    path = write_gguf(tmp_path / "m.gguf", keys, [Tensor("a", (32,))])
    whole, counted = open_gguf(path), open_gguf(path, words=False)
    assert counted.metadata == {**whole.metadata, "t": [""] * 4}
    assert counted.tensors["a"].slabs[0].tobytes() == whole.tensors["a"].slabs[0].tobytes()


@pytest.mark.parametrize("length", [HUGE, (1 << 64) - 1, 1 << 20, 40])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_counting_stops_where_the_file_does(tmp_path: Path, place: int, length: int) -> None:
    whole = gguf_bytes({"t": Typed(ARRAY, ["aaaa", "bbbb", "cccc"], STRING)})
    at = whole.index((b"aaaa", b"bbbb", b"cccc")[place]) - 8
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:at] + struct.pack("<Q", length) + whole[at + 8 :])
    with pytest.raises(FileFormatError, match=r"of key 't' ends beyond|in key 't' lies beyond"):
        open_gguf(path, words=False)


def test_empty_arrays_are_read(tmp_path: Path) -> None:
    found = open_gguf(
        write_gguf(tmp_path / "m.gguf", {"s": Typed(ARRAY, [], STRING), "n": Typed(ARRAY, [], 4)})
    ).metadata
    assert (found["s"], found["n"].tolist()) == ([], [])


@pytest.mark.parametrize("name", FORMATS)
def test_a_tensor_of_every_format_is_a_view_in_numpy_order(tmp_path: Path, name: str) -> None:
    kind = FORMATS[name]
    first = Tensor("first", (5,), "F32", bytes(range(20)))
    second = Tensor("second", (3, 2 * kind.elements), name, bytes(i % 251 for i in range(6 * kind.nbytes)))
    tensors = open_gguf(write_gguf(tmp_path / "m.gguf", LLAMA, [first, second])).tensors
    weight = tensors["second"]
    assert (weight.shape, weight.format) == (second.shape, kind)
    assert weight.slabs[0].tobytes() == second.data
    assert tensors["first"].slabs[0].tobytes() == first.data


def test_another_alignment_is_honoured(tmp_path: Path) -> None:
    tensors = [Tensor("a", (1,), data=b"aaaa"), Tensor("b", (1,), data=b"bbbb")]
    path = write_gguf(tmp_path / "m.gguf", {"general.alignment": 256}, tensors, alignment=256)
    assert open_gguf(path).tensors["b"].slabs[0].tobytes() == b"bbbb"


def test_experts_are_one_slab_each(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", LLAMA, [Tensor("e", (4, 2, 32), "Q8_0", bytes(i % 256 for i in range(272)))])
    assert [slab[0] for slab in open_gguf(path).tensors["e"].slabs] == [0, 68, 136, 204]


@pytest.mark.skipif(os.name == "nt", reason="truncate makes no sparse file there")
def test_no_tensor_byte_is_read_at_open(tmp_path: Path) -> None:
    """16 GB of holes: reading them would take minutes; the mapping's resident pages stay a few."""
    path = tmp_path / "m.gguf"
    nbytes = 1 << 34
    header = gguf_bytes({"general.architecture": "llama"}, [Tensor("big", (1 << 16, 1 << 16), data=b"")])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 64 + nbytes)
    weight = open_gguf(path).tensors["big"]
    assert weight.nbytes == nbytes
    status = Path("/proc/self/smaps")
    if status.exists():
        lines = iter(status.read_text().splitlines())
        sizes = [next(s for s in lines if s.startswith("Rss:")) for line in lines if line.endswith(str(path))]
        assert sizes
        assert all(int(size.split()[1]) < 1024 for size in sizes)


# Split files


def split(folder: Path, counts: tuple[Any, Any, Any] = (0, 1, 2), total: int = 3, stem: str = "m") -> list[Path]:
    """Three parts with one tensor each; the first has the metadata."""
    paths = []
    for number in range(3):
        extra = LLAMA if number == 0 else {}
        keys = {**extra, "split.no": Typed(UINT16, counts[number]), "split.count": Typed(UINT16, 3)}
        keys["split.tensors.count"] = Typed(5, total)
        path = folder / f"{stem}-{number + 1:05}-of-00003.gguf"
        paths.append(write_gguf(path, keys, [Tensor(f"t{number}", (1,), data=bytes([number] * 4))]))
    return paths


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_any_part_opens_all_parts(tmp_path: Path, opened: int) -> None:
    source = open_gguf(split(tmp_path)[opened])
    assert {name: int(w.slabs[0][0]) for name, w in source.tensors.items()} == {"t0": 0, "t1": 1, "t2": 2}
    assert source.metadata["llama.block_count"] == 2
    assert source.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    assert "m-00002-of-00003.gguf: no such file: 1 of 3 parts" in refusal(paths[0])


def test_parts_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    assert "split.no and split.count are (2, 3), expected (1, 3)" in refusal(split(tmp_path, (0, 2, 1))[0])


def test_a_wrong_number_of_tensors_is_refused(tmp_path: Path) -> None:
    assert "hold 3 tensors, split.tensors.count says '4'" in refusal(split(tmp_path, total=4)[0])


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    path = split(tmp_path)[0].rename(tmp_path / "other.gguf")
    assert "a name like model-00001-of-00003.gguf" in refusal(path)


# Broken and hostile files


def sample() -> bytes:
    metadata = {**LLAMA, "tokenizer.ggml.tokens": ["a", "b"], "n": [1, 2, 3], "f": 0.5}
    return gguf_bytes(metadata, [Tensor("x", (2, 32), "Q8_0"), Tensor("y", (3,))])


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole, path = sample(), tmp_path / "m.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(path)
        with pytest.raises(LocalMoeError):
            open_gguf(path, words=False)
    path.write_bytes(whole)
    assert len(open_gguf(path).tensors) == 2


def test_huge_numbers_in_any_place_are_refused_or_harmless(tmp_path: Path) -> None:
    whole, path = sample(), tmp_path / "m.gguf"
    for at in range(4, len(whole) - 8):
        for number in (HUGE, HUGE - 1, (1 << 64) - 1, 1 << 40):
            path.write_bytes(whole[:at] + struct.pack("<Q", number) + whole[at + 8 :])
            for words in (True, False):
                try:
                    open_gguf(path, words=words)
                except LocalMoeError as error:
                    assert "\n" not in str(error)  # noqa: PT017


BROKEN = {
    "not a GGUF": (gguf_bytes(magic=b"GGML"), "at byte 0: expected b'GGUF'"),
    "an older file": (gguf_bytes(magic=b"tjgg"), "an older GGJT file"),
    "tensor count": (gguf_bytes(tensor_count=HUGE), "9223372036854775808 tensors announced, expected at most 0"),
    "key count": (gguf_bytes(key_count=HUGE), "metadata keys announced, expected at most 0"),
    "key length": (
        gguf_bytes()[:16] + struct.pack("<QQ", 1, HUGE) + bytes(32),
        "a metadata key of 9223372036854775808 bytes",
    ),
    "key text": (gguf_bytes([(b"\xff", 1)]), "a metadata key b'\\xff' is not UTF-8"),
    "key twice": (gguf_bytes([("a", 1), ("a", 2)]), "key 'a' appears twice"),
    "value type": (gguf_bytes()[:16] + struct.pack("<QQ", 1, 1) + b"a" + struct.pack("<IQ", 13, 0), "value type 13"),
    "array of arrays": (
        gguf_bytes()[:16] + struct.pack("<QQ", 1, 1) + b"a" + struct.pack("<IIQ", ARRAY, ARRAY, 0),
        "key 'a' is an array of arrays",
    ),
    "array length": (
        gguf_bytes()[:16] + struct.pack("<QQ", 1, 1) + b"a" + struct.pack("<IIQ", ARRAY, 4, HUGE) + bytes(64),
        "elements in key 'a' announced, expected at most 16",
    ),
    "string length": (
        gguf_bytes()[:16] + struct.pack("<QQ", 1, 1) + b"a" + struct.pack("<IIQQ", ARRAY, STRING, 1, HUGE) + bytes(64),
        "string 0 of 1 in key 'a' has 9223372036854775808 bytes, 64 are left",
    ),
    "bool": (gguf_bytes()[:16] + struct.pack("<QQ", 1, 1) + b"a" + struct.pack("<IB", 7, 2), "a bool with value 2"),
    "alignment of 0": (gguf_bytes({"general.alignment": 0}), "general.alignment is '0'"),
    "alignment of 4": (gguf_bytes({"general.alignment": 4}), "expected a power of two from 8"),
    "alignment of 48": (gguf_bytes({"general.alignment": 48}), "expected a power of two from 8"),
    "alignment of a word": (gguf_bytes({"general.alignment": "32"}), "expected a power of two from 8"),
    "tensor name": (gguf_bytes(tensors=[Tensor(b"\xc0", (1,))]), "a tensor name b'\\xc0' is not UTF-8"),
    "tensor twice": (gguf_bytes(tensors=[Tensor("a", (1,)), Tensor("a", (1,))]), "tensor 'a' appears twice"),
    "no axes": (gguf_bytes(tensors=[Tensor("a", ())]), "tensor 'a' has 0 axes"),
    "five axes": (gguf_bytes(tensors=[Tensor("a", (1,) * 5)]), "tensor 'a' has 5 axes"),
    "axis of 0": (gguf_bytes(tensors=[Tensor("a", (0, 4), data=b"abcd")]), "tensor 'a' has shape (0, 4)"),
    "axes beyond 2^64": (gguf_bytes(tensors=[Tensor("a", (HUGE, HUGE), data=b"abcd")]), "tensor 'a' ends at byte"),
    "a million matrices": (gguf_bytes(tensors=[Tensor("a", (1 << 20, 1, 1))]), "at most 65536 matrices"),
    "half a block": (
        gguf_bytes(tensors=[Tensor("a", (2, 48), "Q8_0")]),
        "rows of 48, expected a multiple of 32 for Q8_0",
    ),
    "offset": (gguf_bytes(tensors=[Tensor("a", (1,), offset=4)]), "offset 4, expected a multiple of 32"),
    "offset beyond": (gguf_bytes(tensors=[Tensor("a", (1,), offset=HUGE)]), "is the download complete?"),
    "overlap": (
        gguf_bytes(tensors=[Tensor("a", (32,)), Tensor("b", (32,), offset=64)]),
        "tensors 'a' and 'b' overlap at byte",
    ),
    "cut data": (gguf_bytes(tensors=[Tensor("a", (32,))])[:-1], "tensor 'a' ends at byte"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_with_place_and_expectation(tmp_path: Path, name: str) -> None:
    content, expected = BROKEN[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert expected in refusal(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gguf_bytes(version=1), "GGUF version 1; versions 2 and 3"),
        (gguf_bytes(version=4), "GGUF version 4; versions 2 and 3"),
        (gguf_bytes(version=3 << 24), "big-endian GGUF, version 3"),
        (gguf_bytes(tensors=[Tensor("a", (256,), type_id=139)]), "tensor 'a' has type 139 (IQ4_K); possible are F32"),
        (gguf_bytes(tensors=[Tensor("a", (256,), type_id=31)]), "type 31 (Q4_0_4_4)"),
        (gguf_bytes(tensors=[Tensor("a", (256,), type_id=9999)]), "type 9999; possible"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert expected in refusal(path, UnsupportedError)


@pytest.mark.parametrize("open_it", [open_gguf, open_source])
def test_what_is_no_file_is_refused_unopened(tmp_path: Path, open_it: Any) -> None:
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "folder").mkdir()
    expected = {
        "empty.gguf": "the file is empty",
        "none.gguf": "no such file",
        "folder": "folder",
        "x" * 300: "cannot be opened",
    }
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
        expected["pipe"] = "is a pipe"
    for name, message in expected.items():
        with pytest.raises(FileFormatError, match=message):
            open_it(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.chmod(0)
    assert "permission denied" in refusal(path)


# Typed metadata


def metadata(**keys: Any) -> Metadata:
    return Metadata({"general.architecture": "llama", **{f"llama.{k}": v for k, v in keys.items()}}, "m.gguf")


def test_metadata_reads_what_is_there_and_falls_back_on_defaults() -> None:
    meta = metadata(n=3, x=0.5, b=True, s="yarn", whole=10000)
    assert (meta.int("n"), meta.float("x"), meta.bool("b"), meta.str("s")) == (3, 0.5, True, "yarn")
    assert (meta.int("none", 4), meta.float("whole"), meta.has("n"), meta.has("none")) == (4, 10000.0, True, False)
    meta.finish()


def test_a_per_layer_array_is_read_where_all_layers_agree_and_refused_where_they_differ() -> None:
    meta = metadata(same=np.array([4, 4, 4], np.int32), listed=[0.5, 0.5], flags=[True, True], one=[7])
    assert (meta.int("same"), meta.float("listed"), meta.bool("flags"), meta.int("one")) == (4, 0.5, True, 7)
    assert type(meta.int("same")) is int
    meta.expect("same", 4)
    for differing in (np.array([4, 8], np.int32), [4, 8], [], np.array([], np.int32)):
        with pytest.raises(FileFormatError, match=r"'llama.n' is .*, expected a whole number"):
            metadata(n=differing).int("n")
    with pytest.raises(FileFormatError, match=r"expected a finite number"):
        metadata(x=[math.nan, math.nan]).float("x")


@pytest.mark.parametrize(
    ("read", "value"),
    [("int", "4"), ("int", True), ("int", 4.0), ("int", -1), ("int", 1 << 31), ("float", "1"), ("float", float("nan")),
     ("float", float("inf")), ("float", True), ("bool", 1), ("str", 1), ("int", np.array([1, 2]))],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_key(read: str, value: Any) -> None:
    with pytest.raises(FileFormatError, match=r"m.gguf: key 'llama.k' is .* expected"):
        getattr(metadata(k=value), read)("k")


def test_a_missing_key_is_named() -> None:
    with pytest.raises(FileFormatError, match=r"key 'llama.block_count' is missing"):
        metadata().int("block_count")


def test_a_value_that_is_not_implemented_is_refused_with_what_is_possible() -> None:
    meta = metadata(kind="longrope", scale=np.float32(0.1).item())
    meta.expect("absent", 1)
    meta.expect("scale", 0.1)
    with pytest.raises(UnsupportedError, match=r"llama.kind is 'longrope'; possible is 'none' or 'yarn'"):
        meta.expect("kind", "none", "yarn")


def test_keys_that_nobody_read_are_refused_by_key_and_value_save_the_harmless() -> None:
    meta = metadata(read=1, context_length=5, logit_scale=0.25)
    meta.int("read")
    with pytest.raises(UnsupportedError, match=r"not implemented for llama: llama.logit_scale = '0.25'$"):
        meta.finish()


def test_the_vocabulary_is_the_key_or_the_number_of_tokens() -> None:
    assert metadata(vocab_size=9).vocabulary == 9
    tokens = {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    assert Metadata(tokens, "m").vocabulary == 2
    with pytest.raises(FileFormatError, match="neither"):
        _ = metadata().vocabulary


@pytest.mark.parametrize("architecture", [None, 3, ""])
def test_a_file_without_an_architecture_is_refused(architecture: Any) -> None:
    with pytest.raises(FileFormatError, match=r"general\.architecture"):
        Metadata({"general.architecture": architecture}, "m.gguf")


# Tensors asked for by name


def checkpoint(tmp_path: Path, *tensors: Tensor) -> Checkpoint:
    return Checkpoint(open_gguf(write_gguf(tmp_path / "m.gguf", LLAMA, list(tensors))))


def test_a_tensor_is_found_by_name_and_shape(tmp_path: Path) -> None:
    get = checkpoint(tmp_path, Tensor("blk.0.attn_q.weight", (4, 8)), Tensor("blk.0.attn_q.bias", (4,)))
    at = get.scope("blk.0")
    assert at("attn_q", (4, 8)).shape == (4, 8)
    assert at.bias("attn_q", (4,)).shape == (4,)
    assert at.optional("attn_k", (4, 8)) is None
    assert at.has("attn_q")
    assert get.finish() == []


def test_a_wrong_shape_prints_expected_and_actual(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"'output.weight' has shape \(4, 8\), expected \(8, 4\)"):
        checkpoint(tmp_path, Tensor("output.weight", (4, 8)))("output", (8, 4))


def test_a_missing_tensor_names_what_is_close(tmp_path: Path) -> None:
    with pytest.raises(
        FileFormatError, match=r"'blk.0.attn_q.weight' of shape \(4, 8\) is missing; there is 'blk.1.attn_q.weight'"
    ):
        checkpoint(tmp_path, Tensor("blk.1.attn_q.weight", (4, 8)))("blk.0.attn_q", (4, 8))


def test_axes_of_length_one_count_for_nothing(tmp_path: Path) -> None:
    assert checkpoint(tmp_path, Tensor("g.weight", (8,)))("g", (1, 8)).shape == (1, 8)


def test_experts_are_found_stacked_fused_or_one_by_one(tmp_path: Path) -> None:
    data = bytes(range(192))
    stacked = Tensor("ffn_up_exps.weight", (2, 3, 8), data=data)
    fused = Tensor("ffn_gate_up_exps.weight", (2, 6, 4), data=data)
    single = [Tensor(f"ffn_up.{i}.weight", (3, 8), data=data[96 * i : 96 * (i + 1)]) for i in range(2)]
    for tensors in ([stacked], single):
        whole = checkpoint(tmp_path, *tensors).experts("ffn_up_exps", (2, 3, 8))
        assert [s.tobytes() for s in whole.slabs] == [data[:96], data[96:]]
    get = checkpoint(tmp_path, fused)
    gate, up = (get.experts(name, (2, 3, 4)) for name in ("ffn_gate_exps", "ffn_up_exps"))
    assert [s.tobytes() for s in gate.slabs] == [data[:48], data[96:144]]
    assert [s.tobytes() for s in up.slabs] == [data[48:96], data[144:]]
    assert get.finish() == []


def test_experts_of_several_formats_are_refused(tmp_path: Path) -> None:
    get = checkpoint(tmp_path, Tensor("ffn_up.0.weight", (2, 32), "F16"), Tensor("ffn_up.1.weight", (2, 32), "Q8_0"))
    with pytest.raises(UnsupportedError, match=r"'ffn_up.0.weight' \(F16, .*'ffn_up.1.weight' \(Q8_0"):
        get.experts("ffn_up_exps", (2, 2, 32))


def test_tensors_that_nobody_asked_for_are_refused_and_predictors_and_towers_reported(tmp_path: Path) -> None:
    names = ["blk.2.nextn.eh_proj.weight", "blk.2.attn_q.weight", "v.blk.0.ln1.weight", "mm.0.weight"]
    get = checkpoint(tmp_path, *[Tensor(name, (4,)) for name in names])
    assert get.finish() == names
    with pytest.raises(UnsupportedError, match=r"no place for: 'blk.1.attn_sinks.weight'$"):
        checkpoint(tmp_path, Tensor("blk.1.attn_sinks.weight", (4,)), *[Tensor(name, (4,)) for name in names]).finish()


# From what is typed to a source


def test_a_folder_with_one_model_opens_it_and_one_with_several_lists_them(tmp_path: Path) -> None:
    split(tmp_path)
    assert len(open_source(tmp_path).tensors) == 3
    write_gguf(tmp_path / "other.gguf", LLAMA)
    with pytest.raises(FileFormatError, match=r"holds 2 models; name one of m-00001-of-00003.gguf, other.gguf"):
        open_source(str(tmp_path))


def test_an_empty_folder_says_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"holds no model; expected a GGUF file, or a folder with config.json"):
        open_source(tmp_path)


def test_lazy_weights_make_nothing_until_asked() -> None:
    def never() -> Any:
        raise AssertionError

    weights = LazyWeights({"a": never})
    assert ("a" in weights, "b" in weights, len(weights), list(weights)) == (True, False, 1, ["a"])
    assert Source(Path("m"), "gguf", {}, weights, 0).rope_permuted


def test_the_bundled_model_is_a_file_or_refused_in_words() -> None:
    try:
        assert bundled().is_file()
    except FileFormatError as error:
        assert "is not part of this installation" in str(error)  # noqa: PT017


# Real files


def test_real_vocabularies_read_as_the_gguf_package_reads_them(conformance: Path) -> None:
    import gguf

    path = conformance / "tokenizers" / "ggml-vocab" / "ggml-vocab-llama-spm.gguf"
    ours, theirs = open_gguf(path).metadata, gguf.GGUFReader(path).fields
    assert [key for key in theirs if not key.startswith("GGUF.")] == list(ours)
    for key, found in ours.items():
        expected = theirs[key].contents()
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == expected


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0", "q5_1"])
def test_real_tensors_read_as_the_gguf_package_reads_them(conformance: Path, kind: str) -> None:
    import gguf

    path = conformance / "models" / "stories260K" / f"stories260K-{kind}.gguf"
    ours, theirs = open_gguf(path).tensors, gguf.GGUFReader(path).tensors
    assert list(ours) == [tensor.name for tensor in theirs]
    for tensor in theirs:
        weight = ours[tensor.name]
        assert weight.shape == tuple(reversed([int(n) for n in tensor.shape]))
        assert weight.format.name == tensor.tensor_type.name
        assert b"".join(slab.tobytes() for slab in weight.slabs) == tensor.data.tobytes()
