"""Matrix kernels of the cpu against float64 products of the same numbers, by every instruction set of this host."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from kernel_calls import (
    Bytes,
    Floats,
    activation_row,
    dequantise,
    dequantised,
    emulated,
    function,
    kernels,
    poisoned,
    random_rows,
)

from localmoe.formats import FORMATS
from localmoe.kernels.cpu import activations, gemm, isa, matmul
from localmoe.kernels.cpu.dequantise import BLOCKS

ISAS = isa.runnable()
WIDE = 2 * matmul.FLOAT_COLUMNS + 512
COLUMNS = {
    "f32": (1, 3, 24, 64, 96, 320, 1408, WIDE + 67),
    "q8_32": (32, 96, 288, 1408, 10944),
    "q8_256": (256, 512, 2304),
}
GENERIC = sorted(set(BLOCKS) - set(matmul.FAST))


def multiplied(which: str, name: str, rows: Bytes, x: Floats, cuts: tuple[int, ...] = ()) -> Floats:
    """rows · x through the format's kernel, the rows cut into calls at `cuts`; out is poisoned, behind its end too."""
    kernel, form = matmul.gemv_kernel(FORMATS[name])
    row, out = activation_row(which, form, x), poisoned(len(rows) + 1)
    bounds = (0, *cuts, len(rows))
    for start, stop in pairwise(bounds):
        place = (rows.ctypes.data, rows.shape[1], row.ctypes.data, out.ctypes.data)
        function(which, kernel, 7)(*place, x.size, start, stop)
    assert np.isnan(out[-1]), "the kernel wrote behind its rows"
    return out[:-1]


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(got).all()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize("name", matmul.FAST)
def test_a_fast_product_equals_the_exact_one_of_the_quantised_activations(name: str, which: str) -> None:
    rng = np.random.default_rng(3)
    form = matmul.FAST[name][1]
    for columns in COLUMNS[form]:
        rows = random_rows(name, 7, columns, rng)
        x = rng.standard_normal(columns, np.float32) + np.float32(0.5)
        expected = dequantised(name, rows).astype(np.float64) @ emulated(form, x)
        scale = np.abs(dequantised(name, rows)).astype(np.float64) @ np.abs(emulated(form, x))
        error = np.abs(multiplied(which, name, rows, x) - expected).max() / max(
            np.abs(expected).max(), scale.max() / 64
        )
        assert error <= 1e-5, (columns, error)


@pytest.mark.parametrize("name", GENERIC)
def test_a_generic_product_equals_the_exact_one(name: str) -> None:
    rng = np.random.default_rng(4)
    for columns in (256, 768):
        rows = random_rows(name, 5, columns, rng)
        x = rng.standard_normal(columns, np.float32)
        if name in ("Q1_0", "Q2_0", "Q8_K"):  # unknown to the gguf package; their dequantisation is checked by itself
            weights = poisoned(5, columns)
            dequantise(ISAS[0], name, rows, weights)
        else:
            weights = dequantised(name, rows)
        assert relative_error(multiplied(ISAS[0], name, rows, x), weights.astype(np.float64) @ x) <= 1e-5


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize("name", sorted(set(matmul.FAST) - {"F32", "BF16"}))
def test_a_rows_result_has_the_same_bits_however_the_rows_are_shared_out(name: str, which: str) -> None:
    rng = np.random.default_rng(5)
    rows, x = random_rows(name, 11, WIDE, rng), rng.standard_normal(WIDE, np.float32)
    whole = multiplied(which, name, rows, x)
    for cuts in ((1,), (5,), (2, 3, 10)):
        assert (multiplied(which, name, rows, x, cuts).view(np.uint32) == whole.view(np.uint32)).all()


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize("form", ["q8_32", "q8_256"])
def test_activations_are_quantised_as_their_definition_says(form: str, which: str) -> None:
    columns, block = 1536, int(form.split("_")[1])
    x = np.random.default_rng(6).standard_normal(columns, np.float32)
    row = activation_row(which, form, x)
    values = row[:columns].view(np.int8)
    peak = np.abs(x.reshape(-1, block)).max(1, keepdims=True)
    assert (values == np.rint(x.reshape(-1, block) * (np.float32(127) / peak)).reshape(-1)).all()
    assert np.abs(values).max() == 127
    behind = row[columns : activations.activation_nbytes(form, columns)]
    if form == "q8_256":
        sums = behind.view(np.int16)[: columns // 32 + columns // 16]
        assert (sums[: columns // 32] == values.reshape(-1, 32).sum(1)).all()
        assert (sums[columns // 32 :] == values.reshape(-1, 16).sum(1)).all()
        behind = behind[columns // 16 + columns // 8 :]
    assert (behind.view(np.float32)[: columns // block] == (peak / np.float32(127)).reshape(-1)).all()


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize(("value", "result"), [(0.0, 0.0), (1e-38, 0.0), (np.nan, np.nan), (np.inf, np.nan)])
def test_zero_and_tiny_activations_give_zero_and_broken_ones_stay_visible(
    value: float, result: float, which: str
) -> None:
    for name in ("Q8_0", "Q6_K"):
        rows = random_rows(name, 2, 256, np.random.default_rng(7))
        x = np.zeros(256, np.float32)
        x[7] = value
        np.testing.assert_array_equal(multiplied(which, name, rows, x), np.full(2, result, np.float32))


def products(which: str, name: str, rows: Bytes, x: Floats, cuts: tuple[int, ...] = ()) -> Floats:
    """(T, rows) through pack_panel and gemm, rows cut into calls; panels, scratch and out poisoned before."""
    chosen, (tokens, columns) = isa.named(which), x.shape
    width = gemm.panel_tokens(chosen)
    panels = poisoned(-(-tokens // width), gemm.panels_nbytes(chosen, 1, columns) // 4)
    function(which, "pack_panel", 5)(x.ctypes.data, x.strides[0], tokens, columns, panels.ctypes.data)
    out, scratch = poisoned(tokens + 1, len(rows)), poisoned(gemm.scratch_nbytes(tokens, columns, chosen) // 4 + 1)
    bounds = (0, *cuts, len(rows))
    dequantise = kernels(which).address(matmul.dequantise_kernel(FORMATS[name]))
    for start, stop in pairwise(bounds):
        place = (dequantise, rows.ctypes.data, rows.shape[1], panels.ctypes.data, out.ctypes.data, out.strides[0])
        arguments = np.array([*place, tokens, columns, start, stop, scratch.ctypes.data], np.int64)
        assert arguments.size == gemm.ARGUMENTS
        function(which, "gemm", 1)(arguments.ctypes.data)
    assert np.isnan(out[-1]).all(), "gemm wrote behind its tokens"
    assert np.isnan(scratch[-1]), "gemm wrote behind its scratch"
    return out[:-1]


@pytest.mark.parametrize("which", ISAS)
@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
def test_many_tokens_give_the_exact_products_at_odd_sizes(name: str, which: str) -> None:
    rng = np.random.default_rng(8)
    sizes = {"F32": (1, 3, 96, 520), "Q8_0": (32, 288, 1408), "Q4_K": (256, 768)}[name]
    for tokens in (1, 5, 17, 33):
        for columns in sizes:
            for count in (1, 7, 29):
                rows, x = random_rows(name, count, columns, rng), rng.standard_normal((tokens, columns), np.float32)
                weights = dequantised(name, rows).astype(np.float64)
                expected = x @ weights.T
                scale = (np.abs(x) @ np.abs(weights.T)).max() / 64
                error = np.abs(products(which, name, rows, x) - expected).max() / max(np.abs(expected).max(), scale)
                assert error <= 1e-5, (tokens, columns, count, error)


@pytest.mark.parametrize("which", ISAS)
def test_long_strips_give_the_bits_of_short_ones(which: str) -> None:
    """Strips are longer where panels take more than 10 MiB: 320 tokens and 8,448 columns, and not those of few."""
    rng = np.random.default_rng(10)
    rows, x = random_rows("F16", 211, 8448, rng), rng.standard_normal((320, 8448), np.float32)
    whole = products(which, "F16", rows, x, (24,))
    expected = x[:9] @ dequantised("F16", rows).astype(np.float64).T
    assert np.abs(whole[:9] - expected).max() <= 1e-5 * np.abs(expected).max()
    for first, last in ((0, 9), (150, 191), (300, 320)):
        assert (products(which, "F16", rows, x[first:last]) == whole[first:last]).all()


@pytest.mark.parametrize("which", ISAS)
def test_a_tokens_result_depends_on_no_other_token_and_on_no_split(which: str) -> None:
    rng = np.random.default_rng(9)
    rows, x = random_rows("Q8_0", 61, 1408, rng), rng.standard_normal((300, 1408), np.float32)
    whole = products(which, "Q8_0", rows, x)
    assert (products(which, "Q8_0", rows, x, (1, 24, 50)) == whole).all()
    for first, last in ((0, 1), (3, 12), (150, 191), (280, 300)):
        assert (products(which, "Q8_0", rows, x[first:last]) == whole[first:last]).all()
