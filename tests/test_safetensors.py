"""Hugging Face folders by hand and from transformers: names, keys and experts as GGUF has them, and what is refused."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writing import safetensors_bytes

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.loader.checkpoint import Checkpoint
from localmoe.loader.huggingface import open_folder
from localmoe.loader.huggingface_config import FAMILIES, config_keys
from localmoe.loader.locate import open_source
from localmoe.loader.safetensors import read_safetensors
from localmoe.loader.source import Source

LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 4, "vocab_size": 5,
    "max_position_embeddings": 64, "num_attention_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 3}
QWEN3_MOE = {**LLAMA, **MOE, "model_type": "qwen3_moe", "head_dim": 8}
DEEPSEEK = {
    **LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 3, "n_routed_experts": 8, "n_shared_experts": 2,
    "kv_lora_rank": 4, "q_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 3,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
V2 = {**DEEPSEEK, "model_type": "deepseek_v2"}
V3 = {**DEEPSEEK, "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2}


def keys(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The GGUF keys of a configuration, without the architecture's prefix."""
    architecture, found, _ = config_keys({**config, **changes}, "config.json")
    return {name.removeprefix(f"{architecture}."): value for name, value in found.items()}


def matrix(shape: tuple[int, ...], first: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    count = math.prod(shape)
    return "F32", shape, np.arange(first, first + count, dtype=np.float32).tobytes()


def write_folder(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], config: dict[str, Any] = LLAMA, **files: Any
) -> Path:
    """A folder with config.json and model.safetensors; `files` are more JSON files by stem."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    for stem, content in files.items():
        (path / f"{stem}.json").write_text(json.dumps(content))
    return path


def numbers(source: Source, name: str) -> list[list[float]]:
    return [slab.view(np.float32).tolist() for slab in source.tensors[name].slabs]


# Tensors


def test_names_become_ggufs(tmp_path: Path) -> None:
    names = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight", "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.q_proj.bias": "blk.0.attn_q.bias",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }  # fmt: skip
    source = open_folder(write_folder(tmp_path, {name: matrix((4,), i) for i, name in enumerate(names)}))
    assert list(source.tensors) == list(names.values())
    assert [numbers(source, name)[0][0] for name in names.values()] == list(range(6))
    assert (source.kind, source.rope_permuted, source.tokenizer_folder) == ("folder", False, tmp_path)


def test_experts_one_by_one_become_a_stack_in_their_order(tmp_path: Path) -> None:
    """Twelve, in the order of a file sorted by name: 0, 1, 10, 11, 2 …"""
    ordered = sorted(range(12), key=str)
    tensors = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": matrix((3, 8), 100 * i) for i in ordered}
    source = open_folder(write_folder(tmp_path, tensors, QWEN3_MOE))
    stack = source.tensors["blk.0.ffn_up_exps.weight"]
    assert stack.shape == (12, 3, 8)
    assert [slab.view(np.float32)[0] for slab in stack.slabs] == [100 * i for i in range(12)]


def test_mixtrals_w1_w2_and_w3_are_gate_down_and_up(tmp_path: Path) -> None:
    at = "model.layers.0.block_sparse_moe"
    tensors = {f"{at}.experts.0.w{i}.weight": matrix((4, 8) if i != 2 else (8, 4), i) for i in (1, 2, 3)}
    config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 1, "num_experts_per_tok": 1}
    source = open_folder(write_folder(tmp_path, {**tensors, f"{at}.gate.weight": matrix((1, 8), 9)}, config))
    names = ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight", "blk.0.ffn_up_exps.weight"]
    assert [numbers(source, name)[0][0] for name in [*names, "blk.0.ffn_gate_inp.weight"]] == [1, 2, 3, 9]


def test_transformers_fused_experts_give_gate_first_and_up_second(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.experts"
    tensors = {f"{at}.gate_up_proj": matrix((2, 6, 8)), f"{at}.down_proj": matrix((2, 8, 3))}
    get = Checkpoint(open_folder(write_folder(tmp_path, tensors, QWEN3_MOE))).scope("blk.0")
    gate, up = get.experts("ffn_gate_exps", (2, 3, 8)), get.experts("ffn_up_exps", (2, 3, 8))
    assert [slab.view(np.float32)[0] for slab in gate.slabs] == [0, 48]
    assert [slab.view(np.float32)[0] for slab in up.slabs] == [24, 72]
    assert get.experts("ffn_down_exps", (2, 8, 3)).shape == (2, 8, 3)
    assert get.finish() == []


def test_deepseeks_names_bias_and_prediction_layer(tmp_path: Path) -> None:
    at = "model.layers.0"
    tensors = {
        f"{at}.mlp.gate.e_score_correction_bias": matrix((8,)), f"{at}.self_attn.kv_b_proj.weight": matrix((12, 4)),
        f"{at}.self_attn.kv_a_proj_with_mqa.weight": matrix((6, 8)),
        f"{at}.mlp.shared_experts.up_proj.weight": matrix((6, 8)),
        "model.layers.1.eh_proj.weight": matrix((8, 16)), "model.layers.1.mlp.experts.0.up_proj.weight": matrix((3, 8)),
    }  # fmt: skip
    source = open_folder(write_folder(tmp_path, tensors, {**V3, "num_nextn_predict_layers": 1}))
    names = ["exp_probs_b.bias", "attn_kv_b.weight", "attn_kv_a_mqa.weight", "ffn_up_shexp.weight"]
    assert list(source.tensors)[:4] == [f"blk.0.{name}" for name in names]
    get = Checkpoint(source).scope("blk.0")
    get.bias("exp_probs_b", (8,))
    for name, shape in (("attn_kv_b", (12, 4)), ("attn_kv_a_mqa", (6, 8)), ("ffn_up_shexp", (6, 8))):
        get(name, shape)
    assert len(get.finish()) == 2


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": matrix((3, 8)) for i in (0, 1, 3)}
    with pytest.raises(FileFormatError, match=r"'blk.0.ffn_up_exps.weight' has 3 experts, but expert 2 is missing"):
        open_folder(write_folder(tmp_path, tensors, QWEN3_MOE))


def test_two_tensors_for_one_place_are_refused(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": matrix((4,)), "output.weight": matrix((4,))}
    with pytest.raises(FileFormatError, match=r"'output.weight' is a second 'output.weight'"):
        open_folder(write_folder(tmp_path, tensors))


def test_unknown_tensors_stay_for_the_checkpoint_to_refuse(tmp_path: Path) -> None:
    source = open_folder(write_folder(tmp_path, {"model.layers.0.self_attn.sinks": matrix((4,))}))
    with pytest.raises(UnsupportedError, match=r"no place for: 'model.layers.0.self_attn.sinks'"):
        Checkpoint(source).finish()


def test_stored_rope_frequencies_are_left_out(tmp_path: Path) -> None:
    assert not open_folder(
        write_folder(tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": matrix((4,))})
    ).tensors


@pytest.mark.parametrize(("tied", "found"), [(True, False), (False, True), (None, True)])
def test_tied_embeddings_leave_the_head_out(tmp_path: Path, tied: bool | None, found: bool) -> None:
    config = LLAMA if tied is None else {**LLAMA, "tie_word_embeddings": tied}
    source = open_folder(write_folder(tmp_path, {"lm_head.weight": matrix((5, 8))}, config))
    assert ("output.weight" in source.tensors) is found


def test_a_missing_head_is_refused_when_the_embeddings_are_not_tied(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"lm_head.weight is missing"):
        open_folder(
            write_folder(tmp_path, {"model.norm.weight": matrix((8,))}, {**LLAMA, "tie_word_embeddings": False})
        )


@pytest.mark.parametrize(("dtype", "size"), [("F16", 2), ("BF16", 2), ("F32", 4)])
def test_three_dtypes_are_read(tmp_path: Path, dtype: str, size: int) -> None:
    source = open_folder(write_folder(tmp_path, {"lm_head.weight": (dtype, (5, 8), bytes(40 * size))}))
    weight = source.tensors["output.weight"]
    assert (weight.format.name, weight.nbytes) == (dtype, 40 * size)


def test_other_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'lm_head.weight' has dtype 'F8_E4M3'; possible are F32, F16, BF16"):
        open_folder(write_folder(tmp_path, {"lm_head.weight": ("F8_E4M3", (5, 8), bytes(40))}))


# Shards and broken files


def write_shards(path: Path) -> Path:
    write_folder(path, {})
    (path / "model.safetensors").unlink()
    places = {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}
    for i, (name, file) in enumerate(places.items()):
        (path / file).write_bytes(safetensors_bytes({name: matrix((4,), i)}))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    source = open_folder(write_shards(tmp_path))
    assert (numbers(source, "output.weight"), numbers(source, "output_norm.weight")) == ([[0, 1, 2, 3]], [[1, 2, 3, 4]])
    assert source.nbytes == sum((tmp_path / f"{name}.safetensors").stat().st_size for name in "ab")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "b.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"b.safetensors: no such file: 1 of 2 shards are missing"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"lm_head.weight": "b.safetensors"}, "'lm_head.weight' is not in it"),
        ({"other": "a.safetensors"}, "'other' is not in it"),
        ({"lm_head.weight": "../a.safetensors"}, "expected a file name without a folder"),
        ({"lm_head.weight": "/etc/passwd"}, "expected a file name without a folder"),
        ({"lm_head.weight": 3}, "expected a file name without a folder"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_refused(tmp_path: Path, places: Any, expected: str) -> None:
    index = write_shards(tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(FileFormatError, match=expected):
        open_folder(tmp_path)


def broken(text: str | bytes, length: int | None = None, body: bytes = bytes(16)) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


ENTRY = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
BROKEN = {
    "seven bytes": (bytes(7), "7 bytes, expected at least the 8"),
    "a header of 100 GB": (broken("{}", 100 << 30), "a header of 107374182400 bytes, the file has"),
    "a header of 2^63": (broken("{}", 1 << 63), "a header of 9223372036854775808 bytes"),
    "not JSON": (broken("{x"), "not JSON"),
    "not UTF-8": (broken(b'{"\xff": 1}'), "not UTF-8 at byte 2"),
    "a list": (broken("[]"), "expected a JSON object"),
    "nested for ever": (broken("[" * 100_000), "JSON"),
    "a number of a million digits": (broken('{"a": ' + "9" * 1_000_000 + "}"), "beyond all measure"),
    "not a number": (broken('{"a": NaN}'), "NaN is not JSON"),
    "a key twice": (broken(f'{ENTRY}, {ENTRY[1:]}}}'), "key 'a' appears twice"),
    "an entry that is a number": (broken('{"a": 1}'), "expected dtype, shape and data_offsets"),
    "no offsets": (broken('{"a": {"dtype": "F32", "shape": [2]}}'), "expected dtype, shape and data_offsets"),
    "overlapping": (broken(f'{ENTRY}, {ENTRY[1:].replace("a", "b", 1).replace("0, 8", "4, 12")}}}'), "'b' overlap"),
    "out of the file": (broken(ENTRY.replace("0, 8", "16, 24") + "}"), "is the download complete"),
    "offsets of 2^63": (broken(ENTRY.replace("0, 8", f"{1 << 63}, {1 << 64}") + "}"), "is the download complete"),
    "offsets backwards": (broken(ENTRY.replace("0, 8", "8, 0") + "}"), "expected a start and an end"),
    "a negative offset": (broken(ENTRY.replace("0, 8", "-8, 0") + "}"), "expected a start and an end"),
    "a fraction": (broken(ENTRY.replace("[2]", "[2.0]") + "}"), "expected whole numbers from 1"),
    "an axis of true": (broken(ENTRY.replace("[2]", "[true]") + "}"), "expected whole numbers from 1"),
    "an axis of 0": (broken(ENTRY.replace("[2]", "[0]") + "}"), "expected whole numbers from 1"),
    "too few bytes": (broken(ENTRY.replace("[2]", "[3]") + "}"), "has 8 bytes, expected 12 bytes for F32"),
    "axes beyond 2^64": (broken(ENTRY.replace("[2]", f"[{1 << 63}, {1 << 63}]") + "}"), "has 8 bytes, expected"),
    "matrices in two axes": (broken(ENTRY.replace("[2]", "[2, 65536, 1, 1]") + "}"), "at most 65536 matrices"),
    "packed matrices": (
        broken(ENTRY.replace("F32", "U8").replace("[2]", "[65537, 1, 1, 1]") + "}"), "at most 65536 matrices",
    ),
    "a dtype that is a number": (broken(ENTRY.replace('"F32"', "3") + "}"), "expected a name"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, expected = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole = safetensors_bytes({"a": matrix((2, 2)), "b": ("F16", (3,), bytes(6))})
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            read_safetensors(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "llama", "model_type": "qwen2"}'])
def test_a_broken_config_is_refused(tmp_path: Path, content: str) -> None:
    (write_folder(tmp_path, {}) / "config.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"config\.json"):
        open_folder(tmp_path)


def test_a_folder_without_weights_or_config_says_what_is_possible(tmp_path: Path) -> None:
    (write_folder(tmp_path, {}) / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"config.json is there, but no .safetensors file"):
        open_source(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({}))
    with pytest.raises(FileFormatError, match=r"safetensors need config.json beside them"):
        open_source(tmp_path / "model.safetensors")


# config.json


def test_old_and_new_rope_spellings_give_the_same_keys() -> None:
    inner = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    old = keys(LLAMA, rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **inner}, torch_dtype="float16")
    older = keys(LLAMA, rope_theta=500000.0, rope_scaling={"type": "llama3", **inner})
    new = keys(LLAMA, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **inner}, dtype="float16")
    assert old == older == new
    assert {name: value for name, value in new.items() if name.startswith("rope.scaling")} == {
        "rope.scaling.type": "llama3", "rope.scaling.factor": 8.0, "rope.scaling.low_freq_factor": 1.0,
        "rope.scaling.high_freq_factor": 4.0, "rope.scaling.original_context_length": 16,
    }  # fmt: skip
    assert new["rope.freq_base"] == 500000.0


def test_what_a_llama_config_leaves_out_is_derived() -> None:
    found = keys(LLAMA)
    assert (found["attention.head_count_kv"], found["attention.key_length"], found["rope.freq_base"]) == (2, 4, 10000.0)
    assert "rope.scaling.type" not in found


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 8}, 8)],
)
def test_mistrals_window_is_4096_only_where_the_key_is_missing(changes: dict[str, Any], expected: int | None) -> None:
    assert keys({**LLAMA, "model_type": "mistral"}, **changes).get("attention.sliding_window") == expected


def yarn(config: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **parameters}
    return {
        name: value for name, value in keys(config, rope_parameters=rope).items() if name.startswith("rope.scaling")
    }


def amplitude(config: dict[str, Any], **parameters: Any) -> float:
    """cos and sin's factor, worked out from the keys as llama.cpp does (llama-context.cpp)."""
    found = yarn(config, **parameters)
    unit = 0.1 if config["model_type"].startswith("deepseek") else 1.0
    grow = 0.1 * math.log(found["rope.scaling.factor"])
    all_dimensions = found.get("rope.scaling.yarn_log_multiplier", 0) / unit
    ratio = (grow * found["rope.scaling.yarn_mscale"] + 1) / (grow * all_dimensions + 1) if all_dimensions else grow + 1
    return float(ratio * found.get("rope.scaling.attn_factor", 1.0))


@pytest.mark.parametrize("config", [LLAMA, V3], ids=["llama", "deepseek"])
@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 1 + 0.1 * math.log(4)),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (1 + 0.0707 * math.log(4)) / (1 + 0.1 * math.log(4))),
        ({"mscale_all_dim": 0.5}, 1 + 0.1 * math.log(4)),
        ({"mscale": 0.5}, 1 + 0.1 * math.log(4)),
        ({"attention_factor": 0.7}, 0.7),
        ({"attention_factor": 0.7, "mscale": 0.5, "mscale_all_dim": 2.0}, 0.7),
    ],
)
def test_yarns_amplitude_is_what_transformers_makes_it(config: Any, parameters: Any, expected: float) -> None:
    assert amplitude(config, **parameters) == pytest.approx(expected, rel=1e-12)


def test_yarns_other_parameters_are_carried_over() -> None:
    found = yarn(LLAMA, beta_fast=16, beta_slow=2, truncate=False)
    names = ("yarn_beta_fast", "yarn_beta_slow", "yarn_truncate", "original_context_length", "factor")
    assert [found[f"rope.scaling.{name}"] for name in names] == [16.0, 2.0, False, 16, 4.0]
    assert "rope.scaling.yarn_truncate" not in yarn(LLAMA)
    assert yarn(V3, mscale_all_dim=0.5)["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.05)
    assert yarn(LLAMA, factor=None)["rope.scaling.factor"] == 64 / 16


def test_deepseeks_router_and_latent_sizes() -> None:
    second, third = keys(V2), keys(V3, norm_topk_prob=True, topk_method="noaux_tc", scoring_func="sigmoid")
    limited = keys(V2, topk_method="group_limited_greedy", n_group=4, topk_group=2, q_lora_rank=None)
    assert (second["expert_gating_func"], third["expert_gating_func"]) == (1, 2)
    assert "expert_group_count" not in second
    assert [limited[f"expert_group{k}"] for k in ("_count", "_used_count", "_score")] == [4, 2, "max"]
    assert [third[f"expert_group{k}"] for k in ("_count", "_used_count", "_score")] == [4, 2, "top2"]
    assert (third["expert_weights_norm"], third["expert_weights_scale"], third["leading_dense_block_count"]) == (
        True,
        2.5,
        1,
    )
    assert (third["attention.key_length_mla"], third["attention.value_length_mla"], third["rope.dimension_count"]) == (
        5,
        3,
        2,
    )
    assert third["attention.lora_norm_rms_epsilon"] == 1e-6 != third["attention.layer_norm_rms_epsilon"]
    assert ("attention.q_lora_rank" in third, "attention.q_lora_rank" in limited) == (True, False)


def test_both_names_of_the_expert_count_are_read() -> None:
    assert keys(QWEN3_MOE)["expert_count"] == 4
    assert keys({**QWEN3_MOE, "num_experts": None}, num_local_experts=6)["expert_count"] == 6


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {"hidden_act": "gelu"}), (LLAMA, {"attention_bias": True}), (LLAMA, {"mlp_bias": True}),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}), (LLAMA, {"partial_rotary_factor": 0.5}),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        (LLAMA, {"final_logit_softcapping": 30.0}), (LLAMA, {"quantization_config": {"quant_method": "bnb"}}),
        ({**LLAMA, "model_type": "qwen2"}, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ({**LLAMA, "model_type": "qwen3"}, {"layer_types": ["sliding_attention"]}),
        (QWEN3_MOE, {"mlp_only_layers": [0]}), (QWEN3_MOE, {"decoder_sparse_step": 2}),
        ({**QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 4}, {"qkv_bias": False}),
        ({**LLAMA, "model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}, {"clip_qkv": 8.0}),
        (V2, {"norm_topk_prob": True}), (V2, {"topk_method": "noaux_tc"}), (V2, {"moe_layer_freq": 2}),
        (V3, {"scoring_func": "softmax"}), (V3, {"rope_interleave": False}), (V3, {"attention_bias": True}),
        (LLAMA, {"model_type": "mamba"}), (LLAMA, {"model_type": None}), (LLAMA, {"model_type": ["llama"]}),
    ],
)  # fmt: skip
def test_a_value_that_alters_the_computation_is_refused_by_key(config: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        keys(config, **changes)
    assert any(key in str(caught.value) for key in [*changes, "rope", "weights quantised"])
    keys(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", "1"), ("hidden_size", -1), ("vocab_size", None), ("rms_norm_eps", "x"),
     ("hidden_size", 1 << 40), ("num_attention_heads", 0), ("max_position_embeddings", True), ("rope_scaling", 3),
     ("tie_word_embeddings", "no")],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_by_key(name: str, value: Any) -> None:
    with pytest.raises(FileFormatError, match="expected"):
        keys(LLAMA, **{name: value})


def test_values_that_are_off_or_bookkeeping_pass() -> None:
    assert keys(LLAMA, new_switch=False, new_list=[], new_null=None, use_cache=True, eos_token_id=2) == keys(LLAMA)


# Beside the weights


def test_recommended_sampling_is_read_when_sampling_is_meant(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [1]}
    found = open_folder(write_folder(tmp_path, {}, generation_config=generation)).metadata
    names = {name: value for name, value in found.items() if name.startswith("general.sampling")}
    assert names == {"general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.95}
    greedy = open_folder(write_folder(tmp_path, {}, generation_config={**generation, "do_sample": False})).metadata
    assert "general.sampling.temp" not in greedy


def test_chat_templates_are_found_in_each_of_their_places(tmp_path: Path) -> None:
    assert "tokenizer.chat_template" not in open_folder(write_folder(tmp_path, {})).metadata
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    found = open_folder(write_folder(tmp_path, {}, tokenizer_config={"chat_template": several})).metadata
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.tool_use"]) == ("a", "b")
    found = open_folder(write_folder(tmp_path, {}, tokenizer_config={"chat_template": "c"})).metadata
    assert found["tokenizer.chat_template"] == "c"
    (tmp_path / "chat_template.jinja").write_text("d")
    assert open_folder(tmp_path).metadata["tokenizer.chat_template"] == "d"


# Real folders


FOLDERS = ("llama", "llama3-rope", "mistral-swa", "mixtral", "qwen2", "qwen2-moe", "qwen3", "qwen3-moe", "olmoe",
           "deepseek-v2", "deepseek-v2-lite", "deepseek-v3-yarn")  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_every_tensor_of_transformers_folders_has_a_place(conformance: Path, name: str) -> None:
    source = open_source(conformance / "logits" / name)
    assert not [tensor for tensor in source.tensors if tensor.startswith("model.")]
    assert sum(weight.nbytes for weight in source.tensors.values()) < source.nbytes


@pytest.mark.parametrize("name", ["mamba", "gemma"])
def test_other_families_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"model_type is '{name}'; possible are {', '.join(FAMILIES)}"):
        config_keys({**LLAMA, "model_type": name}, "config.json")


def test_the_same_model_as_folder_and_gguf_agrees_in_names_shapes_and_keys(conformance: Path) -> None:
    folder = open_source(conformance / "models" / "stories260K" / "hf")
    file = open_source(conformance / "models" / "stories260K" / "stories260K-f32.gguf")
    shapes = {name: weight.shape for name, weight in file.tensors.items() if name != "output.weight"}  # tied
    assert {name: weight.shape for name, weight in folder.tensors.items()} == shapes
    shared = [key for key in folder.metadata if key in file.metadata and key.startswith("llama.")]
    assert len(shared) > 8
    for key in shared:
        assert folder.metadata[key] == pytest.approx(file.metadata[key], rel=1e-6), key


def test_every_tensor_of_deepseek_r1_has_a_place(conformance: Path) -> None:
    """Names, shapes and layers of the published 671B model, in an empty file's place: only the map is at work."""
    import gzip

    from localmoe.loader.huggingface import EXPERT, _renaming

    with gzip.open(conformance / "configs" / "params" / "deepseek-r1_params_map.json.gz") as file:
        names = [name for name in json.load(file) if not name.endswith("weight_scale_inv")]
    rename = _renaming("deepseek2", 61)
    found = {rename(EXPERT.sub(r"\g<head>.\g<tail>.\g<suffix>", name)) for name in names}
    assert all(name.startswith(("blk.", "token_embd", "output")) for name in found)
    assert {"blk.3.ffn_gate_exps.weight", "blk.60.exp_probs_b.bias", "blk.61.nextn.eh_proj.weight"} <= found
