"""Quantised folders run as if their matrices had been written out in full: 8-bit floats with scales, 4-bit integers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import logits, relative_error
from gguf_writing import safetensors_bytes
from test_scaled import e4m3

from localmoe.errors import FileFormatError, LocalMoeError
from localmoe.loader.huggingface import open_folder
from localmoe.network import Network

Array = np.ndarray
Stored = dict[str, tuple[str, tuple[int, ...], bytes]]
# Takes a random generator and a shape -> (parts by what the name ends in, the matrix that they mean).
Scheme = Callable[[np.random.Generator, tuple[int, int]], tuple[dict[str, tuple[str, Array]], Array]]

LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 160, "intermediate_size": 224, "vocab_size": 70,
    "max_position_embeddings": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3", "num_hidden_layers": 3, "hidden_size": 160, "intermediate_size": 200, "vocab_size": 70,
    "max_position_embeddings": 64, "num_attention_heads": 3, "rms_norm_eps": 1e-6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 136, "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 130, "q_lora_rank": 72,
    "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 40, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
}  # fmt: skip
FLOAT = {"F32": np.float32, "F16": np.float16}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, prediction layer included, by Hugging Face's names."""
    c, D = config, config["hidden_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
    found["lm_head.weight"] = (c["vocab_size"], D)

    def feed(place: str, width: int) -> None:
        found.update({f"{place}.{part}_proj.weight": (width, D) for part in ("gate", "up")})
        found[f"{place}.down_proj.weight"] = (D, width)

    for i in range(c["num_hidden_layers"] + c.get("num_nextn_predict_layers", 0)):
        at = f"model.layers.{i}"
        found |= {f"{at}.input_layernorm.weight": (D,), f"{at}.post_attention_layernorm.weight": (D,)}
        H = c["num_attention_heads"]
        if "kv_lora_rank" not in c:
            d, K = c["head_dim"], c["num_key_value_heads"]
            found |= {f"{at}.self_attn.{n}_proj.weight": (h * d, D) for n, h in (("q", H), ("k", K), ("v", K))}
            found[f"{at}.self_attn.o_proj.weight"] = (D, H * d)
            feed(f"{at}.mlp", c["intermediate_size"])
            continue
        nope, turned, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        R, L = c["q_lora_rank"], c["kv_lora_rank"]
        attention = {
            "q_a_proj": (R, D), "q_a_layernorm": (R,), "q_b_proj": (H * (nope + turned), R), "kv_a_layernorm": (L,),
            "kv_a_proj_with_mqa": (L + turned, D), "kv_b_proj": (H * (nope + value), L), "o_proj": (D, H * value),
        }  # fmt: skip
        found |= {f"{at}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        if i < c["first_k_dense_replace"]:
            feed(f"{at}.mlp", c["intermediate_size"])
            continue
        found[f"{at}.mlp.gate.weight"] = (c["n_routed_experts"], D)
        found[f"{at}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
        for e in range(c["n_routed_experts"]):
            feed(f"{at}.mlp.experts.{e}", c["moe_intermediate_size"])
        feed(f"{at}.mlp.shared_experts", c["moe_intermediate_size"])
    return found


def plain(array: Array, dtype: str = "F32") -> tuple[str, tuple[int, ...], bytes]:
    if dtype == "BF16":
        return dtype, array.shape, (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return dtype, array.shape, np.ascontiguousarray(array.astype(FLOAT.get(dtype, array.dtype))).tobytes()


def two_folders(
    path: Path, config: dict[str, Any], scheme: Scheme, quantization: dict[str, Any]
) -> tuple[Network, Network, Stored]:
    """The same model quantised and in float32; matrices of layers are quantised, routers and embeddings are not."""
    random = np.random.default_rng(11)
    small: Stored = {}
    large: Stored = {}
    for name, shape in shapes(config).items():
        head = name.removesuffix(".weight")
        if "proj" in name and len(shape) == 2:
            parts, values = scheme(random, shape)  # type: ignore[arg-type]
            small |= {f"{head}.{last}": plain(array, dtype) for last, (dtype, array) in parts.items()}
        else:
            noise = random.standard_normal(shape).astype(np.float32)
            values = 1 + 0.3 * noise if "norm" in name else noise / shape[-1] ** 0.5 if "gate" in name else noise
            small[name] = plain(values)
        large[name] = plain(values)
    networks = []
    for folder, tensors, more in (("small", small, {"quantization_config": quantization}), ("large", large, {})):
        write(path / folder, tensors, config | more)
        networks.append(Network(open_folder(path / folder)))
    return networks[0], networks[1], small


def write(folder: Path, tensors: Stored, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


# 8-bit floats

VALUES = np.array([e4m3(b) for b in range(256)])
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCKS = {**FP8, "weight_block_size": [128, 128]}


def compressed(weights: dict[str, Any], form: str = "float-quantized") -> dict[str, Any]:
    group = {"weights": {"num_bits": 8, "type": "float", "symmetric": True, **weights}, "targets": ["Linear"]}
    group["input_activations"] = None
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed", "sparsity_config": {},
    }  # fmt: skip


def float8(tile: tuple[int, int] | None, name: str, dtype: str, shape_of: Callable[[int], tuple[int, ...]]) -> Scheme:
    """Random bytes with one scale for each tile; None: one a matrix. `shape_of` (rows) where there is no grid."""

    def scheme(random: np.random.Generator, shape: tuple[int, int]) -> tuple[dict[str, tuple[str, Array]], Array]:
        height, width = tile or shape
        grid = (-(-shape[0] // height), -(-shape[1] // width))
        stored = random.integers(0, 256, shape, np.uint8)
        stored[(stored & 127) > 110] ^= 64
        scales = (random.uniform(0.3, 1, grid) / shape[1] ** 0.5 / 16).astype(np.float32)
        if dtype == "BF16":
            scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
        exact = (
            VALUES[stored]
            * np.kron(scales.astype(np.float64), np.ones((min(height, shape[0]), min(width, shape[1]))))[
                : shape[0], : shape[1]
            ]
        )
        beside = scales if tile and width == 128 else scales.reshape(shape_of(shape[0]))
        return {"weight": ("F8_E4M3", stored), name: (dtype, beside)}, exact.astype(np.float32)

    return scheme


FLOAT8 = {
    "DeepSeek's blocks": (DEEPSEEK, float8((128, 128), "weight_scale_inv", "F32", lambda n: ()), BLOCKS),
    "one a matrix": (DEEPSEEK, float8(None, "weight_scale", "BF16", lambda n: ()), FP8),
    "one a matrix, an axis": (LLAMA, float8(None, "weight_scale", "F32", lambda n: (1,)), FP8),
    "Mistral's spelling": (LLAMA, float8(None, "qscale_weight", "BF16", lambda n: ()), FP8),
    "Meta's rows": (
        LLAMA, float8((1, 1 << 20), "weight_scale", "F32", lambda n: (n, 1)), {"quant_method": "fbgemm_fp8"},
    ),
    "compressed-tensors, rows": (
        LLAMA, float8((1, 1 << 20), "weight_scale", "BF16", lambda n: (n, 1)), compressed({"strategy": "channel"}),
    ),
    "compressed-tensors, blocks": (
        DEEPSEEK, float8((128, 128), "weight_scale", "BF16", lambda n: ()),
        compressed({"strategy": "block", "block_structure": [128, 128]}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOAT8)
def test_8_bit_floats_count_as_their_values_times_their_scales(name: str, tmp_path: Path) -> None:
    config, scheme, quantization = FLOAT8[name]
    small, large, _ = two_folders(tmp_path, config, scheme, quantization)
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 70, 21)]
    right = logits(large, ids)
    assert relative_error(logits(small, ids), right) <= 5e-6  # sums in another order, where alignment differs
    for chunk in (0, 1, 5):
        assert relative_error(logits(small, ids, "cpu", chunk), right) <= 1e-5


def test_8_bit_floats_are_not_copied(tmp_path: Path) -> None:
    """Their bytes and float32 scales are views of the file, an expert's too."""
    small, _, _ = two_folders(tmp_path, DEEPSEEK, *FLOAT8["DeepSeek's blocks"][1:])
    for name in ("blk.0.ffn_up.weight", "blk.1.ffn_up_exps.weight", "blk.1.attn_kv_b.weight"):
        weight = small.source.tensors[name]
        assert all(not slab.flags.owndata and not slab.flags.writeable for slab in weight.slabs)
        assert all(not scale.values.flags.owndata and not scale.values.flags.writeable for scale in weight.scales)
        assert len(weight.scales) == len(weight.slabs)


def test_how_activations_were_to_be_rounded_is_left_out_of_account(tmp_path: Path) -> None:
    config, scheme, quantization = FLOAT8["one a matrix"]
    small, _, stored = two_folders(tmp_path, config, scheme, quantization | {"activation_scheme": "static"})
    before = logits(small, [1, 2, 3])
    one = plain(np.ones((), np.float32))
    more = {
        f"model.layers.0.self_attn.{n}": one for n in ("o_proj.input_scale", "k_scale", "q_a_proj.activation_scale")
    }
    write(tmp_path / "small", stored | more, config | {"quantization_config": quantization})
    assert relative_error(logits(Network(open_folder(tmp_path / "small")), [1, 2, 3]), before) <= 5e-6


def refused(folder: Path, tensors: Stored, config: dict[str, Any], quantization: dict[str, Any]) -> str:
    with pytest.raises(LocalMoeError) as caught:
        Network(open_folder(write(folder, tensors, config | {"quantization_config": quantization})))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_scales_that_are_missing_or_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    config, scheme, quantization = FLOAT8["DeepSeek's blocks"]
    _, _, stored = two_folders(tmp_path, config, scheme, quantization)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    left = {n: t for n, t in stored.items() if n != name}
    assert name in refused(tmp_path / "small", left, config, quantization)
    message = refused(tmp_path / "small", {**left, name: plain(np.ones((2, 3), np.float32))}, config, quantization)
    assert name in message and "(2, 2) for 128 × 128 weights" in message
    message = refused(tmp_path / "small", {**left, name: ("F32", (2, 2), bytes(12))}, config, quantization)
    assert name in message and "12 bytes, expected 16" in message
    message = refused(tmp_path / "small", {**left, name: ("I32", (2, 2), bytes(16))}, config, quantization)
    assert name in message and "I32" in message
    assert "F8_E4M3" in refused(tmp_path / "small", stored, config, None)  # type: ignore[arg-type]
    vector = {**stored, "model.layers.0.mlp.up_proj.weight": ("F8_E4M3", (200 * 160,), bytes(200 * 160))}
    assert "two axes" in refused(tmp_path / "small", vector, config, quantization)


# 4-bit integers


def integers(random: np.random.Generator, shape: tuple[int, int], group: int, asymmetric: bool) -> tuple[Array, ...]:
    """Numbers (R, C), scales (R, groups) that float16 and bfloat16 hold, zeros (R, groups), and the matrix."""
    width = shape[1] if group < 0 else group
    grid = (shape[0], -(-shape[1] // width))
    numbers = random.integers(0, 16, shape)
    scales = (random.integers(1, 100, grid) / 128 / 64).astype(np.float32)
    zeros = random.integers(1, 16, grid) if asymmetric else np.full(grid, 8)
    wide, zero = (np.repeat(x, width, axis=1)[:, : shape[1]] for x in (scales.astype(np.float64), zeros))
    return numbers, scales, zeros, (wide * (numbers - zero)).astype(np.float32)


def words(numbers: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """Eight numbers of the last axis in one word of 32 bits, number order[i] in nibble i."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8).astype(np.uint32)
    return np.sum([eights[..., order[i]] << np.uint32(4 * i) for i in range(8)], axis=0, dtype=np.uint32).view(np.int32)


def packed(group: int, asymmetric: bool = False) -> Scheme:
    def scheme(random: np.random.Generator, shape: tuple[int, int]) -> tuple[dict[str, tuple[str, Array]], Array]:
        numbers, scales, zeros, values = integers(random, shape, group, asymmetric)
        parts = {
            "weight_packed": ("I32", words(numbers)), "weight_scale": ("BF16", scales),
            "weight_shape": ("I64", np.array(shape)),
        }  # fmt: skip
        padded = np.pad(zeros, ((0, -len(zeros) % 8), (0, 0)))
        return parts | ({"weight_zero_point": ("I32", words(padded.T).T)} if asymmetric else {}), values

    return scheme


def gptq(group: int, asymmetric: bool = False, lacking: int = 1, order: bool = True) -> Scheme:
    def scheme(random: np.random.Generator, shape: tuple[int, int]) -> tuple[dict[str, tuple[str, Array]], Array]:
        numbers, scales, zeros, values = integers(random, shape, group, asymmetric)
        parts = {
            "qweight": ("I32", words(numbers).T), "scales": ("F16", scales.T),
            "qzeros": ("I32", words(zeros.T - lacking)),
        }  # fmt: skip
        groups = np.arange(shape[1], dtype=np.int32) // (shape[1] if group < 0 else group)
        return parts | ({"g_idx": ("I32", groups)} if order else {}), values

    return scheme


def awq(group: int) -> Scheme:
    def scheme(random: np.random.Generator, shape: tuple[int, int]) -> tuple[dict[str, tuple[str, Array]], Array]:
        numbers, scales, zeros, values = integers(random, shape, group, True)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": ("I32", words(numbers.T, order)), "scales": ("F16", scales.T),
            "qzeros": ("I32", words(zeros.T, order)),
        }, values  # fmt: skip

    return scheme


INT4 = {"num_bits": 4, "type": "int", "strategy": "group"}
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": True, "damp_percent": 0.01}
AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
SYMMETRIC: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "packed, 32": (packed(32), compressed({**INT4, "group_size": 32}, "pack-quantized")),
    "packed, rows": (packed(-1), compressed({**INT4, "strategy": "channel"}, "pack-quantized")),
    "gptq, 32": (gptq(32), {**GPTQ, "group_size": 32}),
    "gptq, rows": (gptq(-1, order=False), {**GPTQ, "group_size": -1}),
    "gptq_v2, 32": (gptq(32, lacking=0), {**GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2"}),
}
ASYMMETRIC: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "packed, 32": (packed(32, True), compressed({**INT4, "group_size": 32, "symmetric": False}, "pack-quantized")),
    "gptq, 32": (gptq(32, True), {**GPTQ, "group_size": 32, "sym": False}),
    "awq, 32": (awq(32), {**AWQ, "group_size": 32}),
}
IDS = [int(i) for i in np.random.default_rng(2).integers(0, 70, 21)]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_4_bit_integers_around_8_are_q4_0_exactly(name: str, tmp_path: Path) -> None:
    small, large, _ = two_folders(tmp_path, LLAMA, *SYMMETRIC[name])
    weight = small.source.tensors["blk.1.ffn_up.weight"]
    assert weight.format.name == "Q4_0"
    assert relative_error(logits(small, IDS), logits(large, IDS)) <= 5e-6
    assert relative_error(logits(small, IDS, "cpu"), logits(large, IDS)) <= 2e-2  # activations have 8 bits there


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_4_bit_integers_with_zeros_are_q4_1_but_for_the_rounding_of_a_minimum(name: str, tmp_path: Path) -> None:
    small, large, _ = two_folders(tmp_path, LLAMA, *ASYMMETRIC[name])
    weight, exact = (n.source.tensors["blk.1.ffn_up.weight"] for n in (small, large))
    assert weight.format.name == "Q4_1"
    from localmoe.kernels.reference_weights import values

    step = np.repeat(weight.slabs[0].reshape(-1, 20)[:, :2].copy().view(np.float16), 32).reshape(exact.shape)
    assert (np.abs(values(weight) - values(exact)) <= step.astype(np.float64) / 250).all()
    assert relative_error(logits(small, IDS), logits(large, IDS)) <= 2e-3


def test_what_4_bit_integers_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    scheme, quantization = SYMMETRIC["gptq, 32"]
    _, _, stored = two_folders(tmp_path, LLAMA, scheme, quantization)
    place = "model.layers.0.mlp.up_proj"

    def gptq_with(tensors: Stored, **settings: Any) -> str:
        return refused(tmp_path / "small", tensors, LLAMA, quantization | settings)

    assert "bits is '8'; possible is 4" in gptq_with(stored, bits=8)
    assert "bits is 'None'; possible is 4" in gptq_with(stored, bits=None)
    assert "group_size is 16" in gptq_with(stored, group_size=16)
    assert "checkpoint_format is 'marlin'" in gptq_with(stored, checkpoint_format="marlin")
    permuted = np.random.default_rng(0).permutation(160).astype(np.int32) // 32
    message = gptq_with({**stored, f"{place}.g_idx": plain(permuted)[:0] or ("I32", (160,), permuted.tobytes())})
    assert f"{place}.g_idx" in message and "desc_act" in message
    assert f"{place}.qzeros" in gptq_with({n: t for n, t in stored.items() if n != f"{place}.qzeros"})
    short = np.zeros((4, 224), np.float16)
    message = gptq_with({**stored, f"{place}.scales": plain(short, "F16")})
    assert f"{place}.scales" in message and "(5, 224)" in message
    huge = np.full((5, 224), np.inf, np.float16)
    folder = write(
        tmp_path / "small",
        {**stored, f"{place}.scales": plain(huge, "F16")},
        LLAMA | {"quantization_config": quantization},
    )
    with pytest.raises(FileFormatError, match="beyond float16"):  # values are looked at when the matrix is made
        list(open_folder(folder).tensors["blk.0.ffn_up.weight"].slabs)
    other = compressed({**INT4, "group_size": 32, "actorder": "group"}, "pack-quantized")
    assert "actorder" in refused(tmp_path / "small", stored, LLAMA, other)
    assert "num_bits" in refused(tmp_path / "small", stored, LLAMA, compressed({"num_bits": 4}))
    assert "'bitsandbytes'" in refused(tmp_path / "small", stored, LLAMA, {"quant_method": "bitsandbytes"})
