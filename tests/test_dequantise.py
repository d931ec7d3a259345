"""The reference device's values of every block type are those of ggml and of the gguf package, bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localmoe.errors import UnsupportedError
from localmoe.formats import FORMATS
from localmoe.kernels.reference_weights import dequantise

GGML = (
    "IQ1_M IQ1_S IQ2_S IQ2_XS IQ2_XXS IQ3_S IQ3_XXS IQ4_NL IQ4_XS MXFP4 NVFP4 Q1_0 Q2_K Q3_K Q4_0 Q4_1 Q4_K Q5_0 Q5_1 "
    "Q5_K Q6_K Q8_0 TQ1_0 TQ2_0"
).split()
GGUF = [*(name for name in GGML if name != "Q1_0"), "BF16"]


def assert_same_bits(expected: np.ndarray, data: np.ndarray, name: str) -> None:
    found = dequantise(np.ascontiguousarray(data).reshape(-1).view(np.uint8), FORMATS[name])
    expected = np.ascontiguousarray(expected, np.float32).reshape(-1)
    same = (found.view(np.uint32) == expected.view(np.uint32)) | ((found == 0) & (expected == 0))
    assert found.shape == expected.shape and same.all(), (name, int((~same).sum()))


@pytest.mark.parametrize("name", GGML)
def test_ggml_dequantises_to_the_same_bits(conformance: Path, name: str) -> None:
    golden = np.load(conformance / "quants" / "libggml-goldens.npz")
    assert_same_bits(golden[f"{name}_f32"], golden[f"{name}_bytes"], name)


@pytest.mark.parametrize("name", GGUF)
def test_the_gguf_package_dequantises_to_the_same_bits(conformance: Path, name: str) -> None:
    golden = np.load(conformance / "quants" / "gguf-0.19.0-goldens.npz")
    assert_same_bits(golden[f"deq_{name}_f32"], golden[f"deq_{name}_bytes"], name)


def test_the_goldens_hold_no_type_that_is_left_out_here(conformance: Path) -> None:
    folder = conformance / "quants"
    ggml = {k.removesuffix("_bytes") for k in np.load(folder / "libggml-goldens.npz").files if k.endswith("_bytes")}
    gguf = {
        k for k in np.load(folder / "gguf-0.19.0-goldens.npz").files if k.startswith("deq_") and k.endswith("_bytes")
    }
    assert ggml == set(GGML)
    assert {k.removeprefix("deq_").removesuffix("_bytes") for k in gguf} == set(GGUF)


@pytest.mark.parametrize("name", ["Q8_1", "I32"])
def test_a_type_that_nobody_here_can_check_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        dequantise(np.zeros(FORMATS[name].nbytes, np.uint8), FORMATS[name])
