"""Float32 becomes blocks as good as ggml's: the twin by golden blocks and by hand, the kernels by the twin, bit for
bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from kernel_calls import function

from localmoe.errors import FileFormatError, SettingError, UnsupportedError
from localmoe.formats import FORMATS, Weight
from localmoe.kernels.cpu import isa
from localmoe.kernels.cpu.quantise import NAMES
from localmoe.kernels.quantise import LARGEST, QUANTISABLE, SCALED, quantise
from localmoe.kernels.reference_weights import dequantise
from localmoe.quantisation.file_types import FILE_TYPES, Sizes, file_type, formats
from localmoe.quantisation.quantiser import PIECE, Quantiser

EXACT = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
BLOCKS = (*EXACT, *SCALED)


def restored(values: np.ndarray, name: str) -> np.ndarray:
    return dequantise(quantise(values, FORMATS[name]).reshape(-1), FORMATS[name]).reshape(values.shape)


def error(values: np.ndarray, name: str) -> float:
    return float(((restored(values, name) - values) ** 2).mean(dtype=np.float64))


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def outliers(rows: int, columns: int) -> np.ndarray:
    values = normal(rows, columns, 3)
    values[np.random.default_rng(4).random(values.shape) < 0.004] *= 30
    return values


def hard_rows() -> np.ndarray:
    """Zeros, constants of both signs, one value, tiny ones, the largest ones, one sign only, an outlier, all alike but
    one."""
    rows = np.zeros((12, 512), np.float32)
    rows[1], rows[2] = 3, -2
    rows[3, 77] = 5
    rows[4] = 1e-9 * normal(1, 512)[0]
    rows[5] = LARGEST * np.sign(normal(1, 512)[0])
    rows[6], rows[7] = np.abs(normal(1, 512)[0]) + 1, -np.abs(normal(1, 512)[0]) - 1
    rows[8] = normal(1, 512, 8)[0]
    rows[8, 300] = 1000
    rows[9], rows[9, 5] = 0.25, -0.25
    rows[10] = 1e-38 * normal(1, 512, 9)[0]
    rows[11] = outliers(1, 512)[0]
    return rows


# The twin


@pytest.mark.parametrize("name", EXACT)
def test_blocks_of_32_are_those_of_ggml(conformance: Path, name: str) -> None:
    golden = np.load(conformance / "quants" / "libggml-goldens.npz")
    assert (quantise(golden["x"], FORMATS[name]) == golden[f"{name}_bytes"]).all()
    others = np.load(conformance / "quants" / "gguf-0.19.0-goldens.npz")
    assert (quantise(others["q_input"], FORMATS[name]) == others[f"q_{name}_bytes"]).all()


@pytest.mark.parametrize("name", SCALED)
def test_blocks_of_256_are_within_a_hundredth_of_ggmls_error(conformance: Path, name: str) -> None:
    golden = np.load(conformance / "quants" / "libggml-goldens.npz")
    theirs = float(((golden[f"{name}_f32"] - golden["x"]) ** 2).mean(dtype=np.float64))
    assert error(golden["x"], name) <= 1.01 * theirs


# Mean squared errors of llama-quantize --pure (October 2026) on these values, as a part of their mean square.
GGML_ERRORS = {
    "Q2_K": (0.087678, 0.061262), "Q3_K": (0.022947, 0.015906), "Q4_K": (0.005107, 0.008981),
    "Q5_K": (0.001317, 0.002333), "Q6_K": (0.000316, 0.000998),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("which", [0, 1], ids=["normal", "outliers"])
def test_errors_are_within_a_hundredth_of_those_measured_of_ggml(name: str, which: int) -> None:
    values = (normal, outliers)[which](64, 1024)
    assert error(values, name) <= 1.01 * GGML_ERRORS[name][which] * float((values**2).mean(dtype=np.float64))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_halves_are_rounded_to_nearest_even(name: str) -> None:
    values = np.concatenate([normal(8, 64), np.float32([[1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, -1 - 3 * 2**-8] * 16])])
    expected = quants.quantize(values, GGMLQuantizationType[name])
    assert (quantise(values, FORMATS[name]) == np.ascontiguousarray(expected).view(np.uint8)).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_zeros_are_zeros_and_constants_constant(name: str) -> None:
    assert not quantise(np.zeros((1, 256), np.float32), FORMATS["Q4_K"])[0, :16].any()
    found = restored(hard_rows(), name)
    assert not found[0].any()
    tolerance = 0.02 if name in ("Q2_K", "Q3_K", "Q4_0", "Q5_0") else 0.01
    assert np.abs(found[1] - 3).max() <= 3 * tolerance
    assert np.abs(found[2] + 2).max() <= 2 * tolerance
    assert abs(found[3, 77] - 5) <= 5 * tolerance
    assert not np.delete(found[3], 77).any()


@pytest.mark.parametrize("name", BLOCKS)
def test_hard_rows_come_back_finite_and_no_farther_than_a_step_of_their_range(name: str) -> None:
    rows = hard_rows()
    found = restored(rows, name)
    assert np.isfinite(found).all()
    spread = np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0)
    part = {"Q2_K": 0.3, "Q3_K": 0.25, "Q8_0": 0.01, "Q6_K": 0.03}.get(name, 0.13)
    assert (np.abs(found - rows).max(1) <= part * spread + 1e-7).all()


def test_a_format_without_a_quantiser_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"IQ4_XS cannot be written; possible are F32, F16, BF16, Q8_0"):
        quantise(normal(1, 256), FORMATS["IQ4_XS"])
    assert set(QUANTISABLE) == {"F32", "F16", "BF16", *BLOCKS}


# The kernels


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", isa.runnable())
def test_kernels_give_the_twins_bits(name: str, which: str) -> None:
    format = FORMATS[name]
    for values in (normal(3, 768), outliers(8, 512), hard_rows(), np.abs(normal(2, 256))):
        out = np.full(values.size // format.elements * format.nbytes + 64, 0xA5, np.uint8)
        function(which, f"quantise_{name.lower()}", 3)(values.ctypes.data, out.ctypes.data, values.size)
        assert (out[:-64] == quantise(values, format).reshape(-1)).all()
        assert (out[-64:] == 0xA5).all()


# The quantiser


def stored(values: np.ndarray, name: str) -> Weight:
    data = quantise(values.reshape(-1, values.shape[-1]), FORMATS[name]).reshape(-1)
    return Weight.whole("blk.0.ffn_up.weight", values.shape, FORMATS[name], data)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_any_number_of_threads_gives_the_same_bytes(name: str) -> None:
    weight = stored(normal(2 * PIECE // 512 + 3, 512), "BF16")
    made = []
    for threads in (1, 3):
        with Quantiser(threads) as quantiser:
            made.append(quantiser.weight(weight, FORMATS[name]))
    values = dequantise(weight.slabs[0], weight.format).reshape(weight.shape)
    expected = quantise(values, FORMATS[name]).reshape(-1)
    assert all((weight.slabs[0] == expected).all() for weight in made)


def test_stacks_keep_their_matrices_and_pieces_come_in_order() -> None:
    weight = stored(normal(12, 256).reshape(3, 4, 256), "F16")
    with Quantiser(2) as quantiser:
        made = quantiser.weight(weight, FORMATS["Q8_0"])
        pieces = list(quantiser.pieces(weight, FORMATS["Q8_0"]))
    assert (made.shape, len(made.slabs), made.rows) == ((3, 4, 256), 3, 4)
    assert [count for count, _ in pieces] == [1024] * 3
    assert all((slab == piece).all() for slab, (_, piece) in zip(made.slabs, pieces, strict=True))


def test_a_quantised_weight_can_be_quantised_again() -> None:
    weight = stored(normal(4, 256), "Q4_K")
    with Quantiser(1) as quantiser:
        made = quantiser.weight(weight, FORMATS["Q8_0"])
        same = quantiser.weight(weight, FORMATS["Q4_K"])
    values = dequantise(weight.slabs[0], weight.format).reshape(4, 256)
    assert (made.slabs[0] == quantise(values, FORMATS["Q8_0"]).reshape(-1)).all()
    assert same is weight


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "F16"])
def test_values_that_no_block_can_hold_are_refused_by_tensor_and_row(value: float, name: str) -> None:
    values = normal(40, 8192)
    values[33, 100] = value
    with (
        Quantiser(2) as quantiser,
        pytest.raises(FileFormatError, match=rf"'blk.0.ffn_up.weight' holds .* in row 33; {name}"),
    ):
        quantiser.weight(stored(values, "F32"), FORMATS[name])


def test_bfloat_holds_large_values_but_no_nan() -> None:
    values = normal(2, 32)
    values[1, 3] = 1e6
    with Quantiser(1) as quantiser:
        assert quantiser.weight(stored(values, "F32"), FORMATS["BF16"]).nbytes == 128
        values[1, 3] = np.nan
        with pytest.raises(FileFormatError, match="holds nan in row 1; BF16"):
            quantiser.weight(stored(values, "F32"), FORMATS["BF16"])


def test_an_impossible_number_of_threads_is_refused() -> None:
    with pytest.raises(SettingError, match="1000 threads are not possible"):
        Quantiser(1000)


# File types


def shapes(layers: int, width: int = 512, *, experts: int = 0, tied: bool = False) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (100, width), "output_norm.weight": (width,)}
    if not tied:
        found["output.weight"] = (100, width)
    stack = (experts,) if experts else ()
    suffix = "_exps" if experts else ""
    for i in range(layers):
        matrices = {"attn_q": (), "attn_k": (), "attn_v": (), "attn_output": (), f"ffn_up{suffix}": stack}
        matrices |= {f"ffn_down{suffix}": stack, f"ffn_gate{suffix}": stack}
        found |= {f"blk.{i}.{name}.weight": (*first, width, width) for name, first in matrices.items()}
        found |= {f"blk.{i}.attn_norm.weight": (width,), f"blk.{i}.attn_q.bias": (width,)}
        found |= {f"blk.{i}.ffn_gate_inp.weight": (experts, width)} if experts else {}
    return found


def chosen(type: str, tensors: dict[str, tuple[int, ...]], sizes: Sizes) -> dict[str, str]:
    return {name: format.name for name, format in formats(file_type(type), tensors, sizes).items()}


def test_q4_k_m_gives_more_bits_to_output_v_and_down_of_some_layers() -> None:
    """llama-quantize of October 2026 chose these for a file of 24 layers."""
    found = chosen("q4_K_M", shapes(24), Sizes("llama", 24, 0, 4))
    six = [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    for part in ("attn_v", "ffn_down"):
        assert [i for i in range(24) if found[f"blk.{i}.{part}.weight"] == "Q6_K"] == six
    assert found["output.weight"] == "Q6_K"
    assert found["token_embd.weight"] == found["blk.0.attn_q.weight"] == found["blk.0.ffn_up.weight"] == "Q4_K"


def test_norms_biases_and_routers_are_left_alone() -> None:
    for type in FILE_TYPES:
        found = chosen(type, shapes(2, experts=4), Sizes("qwen3moe", 2, 4, 1))
        assert not [name for name in found if "norm" in name or "bias" in name or "gate_inp" in name]
        assert "blk.1.ffn_down_exps.weight" in found


@pytest.mark.parametrize(
    ("type", "changes"),
    [
        ("q2_K", {"blk.5.attn_v": "Q4_K", "blk.5.ffn_down": "Q3_K", "blk.5.attn_output": "Q3_K"}),
        ("q3_K_M", {"blk.1.attn_v": "Q5_K", "blk.2.attn_v": "Q4_K", "blk.0.ffn_down": "Q5_K", "blk.3.ffn_down": "Q4_K",
                    "blk.3.attn_output": "Q4_K"}),
        ("q3_K_L", {"blk.9.attn_v": "Q5_K", "blk.9.ffn_down": "Q5_K", "blk.9.attn_output": "Q5_K"}),
        ("q4_K_S", {"blk.3.attn_v": "Q5_K", "blk.4.attn_v": "Q4_K", "blk.1.ffn_down": "Q5_K"}),
        ("q5_K_M", {"blk.0.attn_v": "Q6_K", "blk.2.attn_v": "Q5_K", "blk.15.ffn_down": "Q6_K"}),
        ("q6_K", {"blk.0.attn_v": "Q6_K", "output": "Q6_K"}),
        ("q8_0", {"blk.0.attn_v": "Q8_0", "output": "Q8_0"}),
        ("q4_0", {"blk.0.attn_v": "Q4_0", "output": "Q6_K"}),
        ("bf16", {"blk.0.attn_v": "BF16", "output": "BF16"}),
    ],
)  # fmt: skip
def test_each_type_has_its_exceptions(type: str, changes: dict[str, str]) -> None:
    found = chosen(type, shapes(16), Sizes("llama", 16, 0, 4))
    assert {name: found[f"{name}.weight"] for name in changes} == changes


def test_eight_experts_80_layers_and_a_tied_embedding_change_the_choice() -> None:
    few = chosen("q4_K_M", shapes(4, experts=8), Sizes("llama", 4, 8, 1))
    assert (few["blk.1.attn_k.weight"], few["blk.1.attn_v.weight"]) == ("Q8_0", "Q8_0")
    assert few["blk.1.attn_output.weight"] == "Q5_K"
    large = chosen("q4_K_S", shapes(80), Sizes("llama", 80, 0, 8))
    assert large["blk.40.attn_v.weight"] == "Q5_K"
    assert chosen("q4_K_M", shapes(2, tied=True), Sizes("llama", 2, 0, 1))["token_embd.weight"] == "Q6_K"


def test_rows_of_no_whole_block_fall_back_to_smaller_blocks_and_then_to_halves() -> None:
    found = chosen("q4_K_M", shapes(24, 96), Sizes("llama", 24, 0, 4))
    assert (found["blk.3.attn_q.weight"], found["blk.0.attn_v.weight"], found["output.weight"]) == (
        "Q5_0",
        "Q8_0",
        "Q8_0",
    )
    odd = chosen("q2_K", shapes(2, 40), Sizes("llama", 2, 0, 1))
    assert odd["blk.0.attn_q.weight"] == "F16"
    assert chosen("q2_K", shapes(2, 96), Sizes("llama", 2, 0, 1))["blk.0.attn_q.weight"] == "Q4_0"
    assert chosen("q5_K_S", shapes(2, 96), Sizes("llama", 2, 0, 1))["blk.0.attn_q.weight"] == "Q5_1"


def test_types_are_found_in_any_case_and_others_refused_with_the_list() -> None:
    assert (file_type("Q4_K_M").name, file_type("q4_k").name, file_type("BF16").name) == ("q4_K_M", "q4_K_M", "bf16")
    with pytest.raises(SettingError, match=r"'q4_K_XL' is not known; possible are f32, f16, bf16, q8_0"):
        file_type("q4_K_XL")
