"""Rows of every block format become the float32 values that ggml makes of them, bit for bit, on every processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kernel_calls import dequantise, dequantised, golden, poisoned, random_rows

from localmoe.formats import FORMATS
from localmoe.kernels.cpu import isa, matmul
from localmoe.kernels.cpu.dequantise import BLOCKS

ALL = ["F32", "F16", "BF16", *BLOCKS]
BY_HAND = ("Q2_0", "Q8_K")  # no golden file and no package has them: see test_scaled.py
REMAINING = [i for i in isa.runnable() if i != isa.runnable()[0]]


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return bool((left.view(np.uint32) == right.view(np.uint32)).all())


@pytest.mark.parametrize("name", sorted(set(ALL) - {"F32", "F16", *BY_HAND}))
def test_blocks_of_libggml_and_gguf_give_their_values(name: str, conformance: Path) -> None:
    cases = list(golden(conformance, name))
    assert cases, f"no golden file holds {name}"
    for blocks, expected in cases:
        out = poisoned(*expected.shape)
        dequantise(isa.runnable()[0], name, blocks, out)
        assert same_bits(out, expected)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"Q1_0", *BY_HAND}))  # the gguf package does not know Q1_0
@pytest.mark.parametrize("which", [isa.runnable()[0], *REMAINING])
def test_random_blocks_give_the_gguf_packages_values(name: str, which: str) -> None:
    rows = random_rows(name, 3, 512, np.random.default_rng(1))
    expected, out = dequantised(name, rows), poisoned(3, 512)
    dequantise(which, name, rows, out)
    assert same_bits(out, expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("elements", [1, 15, 16, 33])
def test_plain_floats_may_be_of_any_number_and_nothing_is_written_behind_them(name: str, elements: int) -> None:
    rows = random_rows(name, 1, elements, np.random.default_rng(2))
    out = poisoned(elements + 16)
    dequantise(isa.runnable()[0], name, rows, out[:elements])
    assert same_bits(out[:elements], dequantised(name, rows)[0])
    assert np.isnan(out[elements:]).all()


@pytest.mark.parametrize("which", isa.runnable())
def test_every_float16_is_widened_exactly(which: str) -> None:
    every = np.arange(65536, dtype=np.uint16)
    out = poisoned(65536)
    dequantise(which, "F16", every.view(np.uint8), out)
    expected = every.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(expected)
    assert same_bits(out[numbers], expected[numbers])
    assert np.isnan(out[~numbers]).all()


def test_every_format_that_is_dequantised_can_also_be_multiplied_and_others_are_refused_by_name() -> None:
    for name in ALL:
        assert matmul.dequantise_kernel(FORMATS[name]) == f"dequantise_{name.lower()}"
        assert matmul.gemv_kernel(FORMATS[name])[0] == f"gemv_{name.lower()}"
    with pytest.raises(matmul.UnsupportedError, match="I32"):
        matmul.gemv_kernel(FORMATS["I32"])
