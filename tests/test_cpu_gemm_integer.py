"""The integer GEMM: every format against the product of what the blocks and the rounded activations stand for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from kernel_calls import Floats, function, kernels, random_rows
from kernel_calls import dequantise as blocks_to_floats

from localmoe.formats import FORMATS
from localmoe.kernels.cpu import dequantise, gemm, gemm_integer, isa  # noqa: F401  (they register kernels)
from localmoe.kernels.cpu.unpack import INTEGER

BLOCKS = {"q8_32": 32, "q8_256": 256}


def rounded(x: Floats, block: int) -> Floats:
    """What is left of activations after their rounding to 8 bits, as the kernels do it, in float64."""
    parts = x.reshape(len(x), -1, block)
    peak = np.abs(parts).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.where(peak > 0, np.rint(parts * np.where(peak > 0, np.float32(127) / peak, 0)), 0)
    return (whole.astype(np.float64) * (peak / np.float32(127))).reshape(x.shape)


def dequantised(which: str, name: str, rows: np.ndarray, columns: int) -> Floats:
    out = np.full((len(rows), columns), np.nan, np.float32)
    blocks_to_floats(which, name, rows, out)
    return out


def aligned(nbytes: int) -> np.ndarray:
    """`nbytes` poisoned bytes at a multiple of 64, with 64 more behind that must stay as they are."""
    room = np.full(nbytes + 128, 0xFF, np.uint8)
    return room[-room.ctypes.data % 64 :][: nbytes + 64]


def product(which: str, name: str, x: Floats, rows: np.ndarray, cuts: tuple[int, ...] = ()) -> Floats:
    """(T, rows) by the packing and the GEMM kernel, rows cut into several calls; all memory poisoned before."""
    chosen, (tokens, columns) = isa.named(which), x.shape
    form, name_of_gemm, name_of_unpack = gemm_integer.integer_kernels(name, chosen)
    panels = aligned(gemm_integer.panels_nbytes(form, tokens, columns))
    function(which, f"pack_{form}", 5)(x.ctypes.data, x.strides[0], tokens, columns, panels.ctypes.data)
    assert (panels[-64:] == 0xFF).all(), "packing wrote behind its panels"
    out, scratch = (
        np.full((tokens + 1, len(rows)), np.nan, np.float32),
        aligned(gemm_integer.scratch_nbytes(tokens, chosen)),
    )
    edges = (0, *cuts, len(rows))
    for start, stop in pairwise(edges):
        place = (kernels(which).address(name_of_unpack), rows.ctypes.data, rows.shape[1], panels.ctypes.data)
        sizes = (out.ctypes.data, out.strides[0], tokens, columns, start, stop, scratch.ctypes.data)
        arguments = np.array([*place, *sizes], np.int64)
        assert arguments.size == gemm.ARGUMENTS
        function(which, name_of_gemm, 1)(arguments.ctypes.data)
    assert np.isnan(out[-1]).all(), "the GEMM wrote behind its tokens"
    assert (scratch[-64:] == 0xFF).all(), "the GEMM wrote behind its scratch"
    return out[:-1]


def shapes(name: str) -> Iterator[tuple[int, int, int]]:
    """(tokens, columns, rows): one and few, edges of panels, strips and chunks, more tokens than sums are kept for."""
    block = FORMATS[name].elements
    yield from ((1, block, 1), (2, 3 * block, 5), (7, 512 + block, 33), (13, 1024, 70), (6, 5 * block, 32))


@pytest.mark.parametrize("which", isa.runnable())
@pytest.mark.parametrize("name", INTEGER)
def test_product_is_that_of_the_blocks_and_the_rounded_rows(name: str, which: str) -> None:
    rng = np.random.default_rng(1)
    for tokens, columns, height in shapes(name):
        rows = random_rows(name, height, columns, rng)
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        values, weights = rounded(x, BLOCKS[INTEGER[name].form]), dequantised(which, name, rows, columns)
        size = np.linalg.norm(values, axis=1)[:, None] * np.linalg.norm(weights, axis=1)
        error = np.abs(product(which, name, x, rows) - values @ weights.T.astype(np.float64)) / size
        assert error.max() < 1e-6, f"{tokens} x {columns} x {height}"


@pytest.mark.parametrize("which", isa.runnable())
@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q4_K", "Q6_K", "Q2_K"])
def test_a_token_keeps_its_bits_whatever_stands_beside_it_and_however_rows_are_cut(name: str, which: str) -> None:
    rng = np.random.default_rng(2)
    rows = random_rows(name, 75, 768, rng)
    x = rng.standard_normal((530, 768)).astype(np.float32)
    whole = product(which, name, x, rows)
    assert np.array_equal(product(which, name, x[:9], rows, (32, 64)), whole[:9])
    assert np.array_equal(product(which, name, np.ascontiguousarray(x[523:525]), rows, (64,)), whole[523:525])


@pytest.mark.parametrize("which", isa.runnable())
def test_zero_rows_and_not_a_number(which: str) -> None:
    rng = np.random.default_rng(3)
    rows = random_rows("Q4_K", 4, 256, rng)
    x = np.zeros((3, 256), np.float32)
    x[1, 7] = np.nan
    found = product(which, "Q4_K", x, rows)
    assert not found[0].any() and np.isnan(found[1]).all() and not found[2].any()
