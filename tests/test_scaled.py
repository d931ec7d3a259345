"""Weights whose scales lie beside them, and block types that no package here decodes, against plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_writing import Tensor, write_gguf
from kernel_calls import dequantise, function, poisoned
from programs import CONTEXT, Random, cpu_runs, distance, given, reference_runs, rows

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.formats import F8_E4M3, FORMATS, Scales, Weight
from localmoe.kernels import reference_weights as reference
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.isa import runnable
from localmoe.kernels.cpu.scaled import record
from localmoe.kernels.ops import Ops
from localmoe.kernels.program import Router
from localmoe.kernels.program import Tensor as Buffer
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.gguf import open_gguf
from localmoe.loader.source import Source

STEPS = ((1, 1, 0), (33, 33, 1), (33, 5, 34))


def e4m3(byte: int) -> float:
    """OCP 8-bit floating point 1.0, table 1: 1 sign, 4 exponent (bias 7), 3 mantissa bits."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    return (-1) ** sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def scaled(random: Random, shape: tuple[int, ...], tile: tuple[int, int], format: str = "F8_E4M3") -> Weight:
    """Random bytes (of NVFP4: sane scales) with a scale for each tile of every matrix."""
    kind = F8_E4M3 if format == "F8_E4M3" else FORMATS[format]
    height, columns = shape[-2:]
    matrices = shape[0] if len(shape) > 2 else 1
    grid = (-(-height // tile[0]), -(-columns // tile[1]))
    blocks = random.integers(0, 256, (int(np.prod(shape)) // kind.elements, kind.nbytes), np.uint8)
    if format == "NVFP4":
        blocks[:, :4] = random.integers(20, 60, (len(blocks), 4))
    else:
        blocks[(blocks & 127) > 100] ^= 64  # no giants, so that sums are not of one number alone
    scales = [Scales(random.uniform(1e-3, 9e-3, grid).astype(np.float32), *tile) for _ in range(matrices)]
    whole = Weight.whole("w", shape, kind, blocks.reshape(-1))
    return Weight(whole.name, shape, kind, whole.slabs, tuple(scales))


def test_every_byte_is_the_number_of_the_specification() -> None:
    every = np.arange(256, dtype=np.uint8)
    expected = np.array([e4m3(int(b)) for b in every], np.float32)
    assert reference.dequantise(every, F8_E4M3).tolist() == expected.tolist()
    assert (expected[1], expected[8], expected[0x7E], expected[0x81]) == (2**-9, 2**-6, 448, -(2**-9))


def test_a_scale_counts_for_its_tile_and_parts_and_heads_keep_theirs() -> None:
    random = np.random.default_rng(0)
    weight = scaled(random, (300, 200), (128, 128))
    plain = np.array([e4m3(int(b)) for b in weight.slabs[0]]).reshape(300, 200)
    tall = np.kron(weight.scales[0].values, np.ones((128, 128)))[:300, :200]
    np.testing.assert_allclose(reference.matrix(weight), plain * tall, rtol=1e-6)
    np.testing.assert_allclose(reference.matrix(weight.part(100, 270)), (plain * tall)[100:270], rtol=1e-6)
    heads = weight.matrices(3).part(20, 90)
    assert heads.shape == (3, 70, 200)
    np.testing.assert_allclose(reference.values(heads), (plain * tall).reshape(3, 100, 200)[:, 20:90], rtol=1e-6)
    assert weight.nbytes == 300 * 200 + 3 * 2 * 4


TILES = {"block": (128, 128), "tensor": (1 << 20, 1 << 20), "channel": (1, 1 << 20), "group": (1, 32), "odd": (7, 33)}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("isa", runnable())
def test_the_cpu_multiplies_by_them_in_every_op(isa: str, tile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes: rows are no multiple of a tile's, nor columns of a vector's."""

    def linear(ops: Ops, random: Random) -> Buffer:
        return ops.linear(rows(ops, random, 299), scaled(random, (150, 299), TILES[tile]))

    def heads(ops: Ops, random: Random) -> Buffer:
        weight = scaled(random, (3 * 50, 41), TILES[tile]).matrices(3)
        there = ops.head_linear(rows(ops, random, 3 * 41).heads(3), weight.part(3, 20))
        back = ops.head_linear(rows(ops, random, 3 * 30).heads(3), weight.part(20, 50), transposed=True)
        return ops.concat(there, back).flat()

    def embed(ops: Ops, random: Random) -> Buffer:
        return ops.embed(scaled(random, (64, 70), TILES[tile]), ops.input)

    def experts(ops: Ops, random: Random) -> Buffer:
        x = rows(ops, random, 130)
        ids, shares = ops.route(given(ops, random.standard_normal((64, 4))), Router("softmax", 2, True))
        gate, up, down = (scaled(random, shape, TILES[tile]) for shape in ((4, 40, 130), (4, 40, 130), (4, 130, 40)))
        return ops.experts(x, ids, shares, gate, up, down)

    monkeypatch.setenv("LOCALMOE_ISA", isa)
    device = CpuDevice(CONTEXT, "f32", 2)
    for forward in (linear, heads, embed, experts):
        expected = reference_runs(forward, [(count, position) for _, count, position in STEPS])
        found = cpu_runs(device, forward, STEPS)
        assert max(map(distance, found, expected)) <= 1e-5, forward.__name__
    device.close()


@pytest.mark.parametrize("with_scales", [False, True])
@pytest.mark.parametrize("isa", runnable())
def test_nvfp4_runs_with_a_scale_a_matrix_or_none(isa: str, with_scales: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As llama.cpp stores them: one for a tensor, one for each expert."""

    def weight(random: Random, shape: tuple[int, ...]) -> Weight:
        made = scaled(random, shape, (1 << 20, 1 << 20), "NVFP4")
        return made if with_scales else Weight(made.name, made.shape, made.format, made.slabs)

    def linear(ops: Ops, random: Random) -> Buffer:
        return ops.linear(rows(ops, random, 192), weight(random, (31, 192)))

    def experts(ops: Ops, random: Random) -> Buffer:
        ids, shares = ops.route(given(ops, random.standard_normal((64, 4))), Router("softmax", 2, True))
        matrices = [weight(random, shape) for shape in ((4, 64, 128), (4, 64, 128), (4, 128, 64))]
        return ops.experts(rows(ops, random, 128), ids, shares, *matrices)

    monkeypatch.setenv("LOCALMOE_ISA", isa)
    device = CpuDevice(CONTEXT, "f32", 2)
    for forward in (linear, experts):
        expected = reference_runs(forward, [(count, position) for _, count, position in STEPS])
        assert max(map(distance, cpu_runs(device, forward, STEPS), expected)) <= 1e-5, forward.__name__
    device.close()


def nvfp4_device_values(blocks: np.ndarray) -> np.ndarray:
    """What the kernel makes of blocks without scales beside them."""
    weight = Weight.whole("w", (len(blocks), 64), FORMATS["NVFP4"], blocks.reshape(-1))
    numbers, _kept = record(weight, 0)
    place, out = np.array(numbers, np.int64), poisoned(len(blocks), 64)
    for row in range(len(blocks)):
        at = out.ctypes.data + row * 256
        function(runnable()[0], "dequantise_nvfp4", 6)(place.ctypes.data, 36, row, 0, at, 64)
    return out


def test_nvfp4_blocks_give_the_gguf_packages_values_for_every_scale_and_nibble() -> None:
    blocks = np.random.default_rng(1).integers(0, 256, (300, 36), np.uint8)
    blocks[:256, 0] = np.arange(256)
    blocks[:8, 4:] = np.arange(256, dtype=np.uint8).reshape(8, 32)
    expected = reference.dequantise(blocks.reshape(-1), FORMATS["NVFP4"]).reshape(-1, 64)
    np.testing.assert_array_equal(nvfp4_device_values(blocks), expected)


def test_q2_0_and_q8_k_are_decoded_as_ggml_does() -> None:
    """ggml-quants.c: dequantize_row_q2_0 is (two bits - 1) · d, dequantize_row_q8_K d · int8; by hand."""
    half = np.array([0.5, -2.0], np.float16).view(np.uint8).reshape(2, 2)
    codes = np.concatenate([half, np.full((2, 16), 0b11_10_01_00, np.uint8)], axis=1)
    expected = np.concatenate([np.tile([-0.5, 0, 0.5, 1], 16), np.tile([2, 0, -2, -4], 16)]).astype(np.float32)
    whole = np.zeros(292, np.uint8)
    whole[:4], whole[4:260] = np.array([0.25], np.float32).view(np.uint8), np.arange(256)
    signed = 0.25 * np.arange(256).astype(np.int8).astype(np.float32)
    for name, blocks, right in (("Q2_0", codes, expected), ("Q8_K", whole, signed)):
        out = poisoned(right.size)
        dequantise(runnable()[0], name, np.ascontiguousarray(blocks.reshape(-1)), out)
        assert out.tolist() == right.tolist()
        assert reference.dequantise(blocks.reshape(-1), FORMATS[name]).tolist() == right.tolist()


def scaled_file(path: Path, **parts: Tensor) -> Source:
    tensors = {
        "weight": Tensor("blk.0.ffn_up_exps.weight", (3, 2, 64), "NVFP4", bytes([40] * 216)),
        "scale": Tensor("blk.0.ffn_up_exps.scale", (3,), "F32", np.array([0.5, 1, 4], np.float32).tobytes()),
        "input": Tensor("blk.0.ffn_up_exps.input_scale", (3,), "F32"),
    } | parts  # fmt: skip
    return open_gguf(write_gguf(path / "m.gguf", {"general.architecture": "llama"}, list(tensors.values())))


def test_a_scale_beside_nvfp4_belongs_to_it(tmp_path: Path) -> None:
    """llama.cpp: <tensor>.scale, one float32 a matrix; .input_scale is of activations."""
    source = scaled_file(tmp_path)
    assert list(source.tensors) == ["blk.0.ffn_up_exps.weight"]
    weight = source.tensors["blk.0.ffn_up_exps.weight"]
    alone = reference.values(Weight(weight.name, weight.shape, weight.format, weight.slabs))
    assert alone.any()
    expected = alone * np.array([0.5, 1, 4])[:, None, None]
    assert reference.values(weight).tolist() == expected.tolist()
    assert reference.values(Checkpoint(source).experts("blk.0.ffn_up_exps", (3, 2, 64))).tolist() == expected.tolist()
    whole = scaled_file(tmp_path, scale=Tensor("blk.0.ffn_up_exps.scale", (1,), "F32", np.float32(2).tobytes()))
    assert reference.values(whole.tensors["blk.0.ffn_up_exps.weight"]).tolist() == (2 * alone).tolist()


def test_a_scale_of_another_kind_is_refused_and_other_formats_have_none(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"'blk.0.ffn_up_exps.scale' is F32 \(2,\), expected F32 of 3"):
        dict(scaled_file(tmp_path, scale=Tensor("blk.0.ffn_up_exps.scale", (2,))).tensors)
    plain = scaled_file(tmp_path, weight=Tensor("blk.0.ffn_up_exps.weight", (3, 2, 64), "Q8_0"))
    with pytest.raises(UnsupportedError, match=r"no place for: .*input_scale', .*scale'"):
        Checkpoint(plain).finish()
