"""Families that transformers 5.23 does not have, under GGUF's names, against its models that compute the same.

DeepSeek's first model is Qwen2-MoE without biases, when the shared expert's gate stands at a half (its weights are
zero) and the shared down matrix is doubled; Ling 2.0 is GLM-4.5 with head norms, q, k and v in one matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from families import in_memory, logits, relative_error
from oracle_cases import ROPES, VOCABULARY, common
from oracle_dense import DENSE, gemma4
from oracle_mixtures import chosen, glm4_moe, gpt_oss, llama4, save_as_mxfp4
from test_oracle import SEEDS, TOKENS, TOLERANCE, WITNESS, compare, random_model, right_answer, transformers
from verified import NAME as VERIFIED
from verified import claim

from localmoe.loader.locate import open_source
from localmoe.network import Network

pytestmark = pytest.mark.oracle
__all__ = ["transformers"]  # the fixture


def gguf_tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """The model's tensors by GGUF name: experts separated, the rest as it is."""
    import gguf

    known = next(id for id, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, model.config.num_hidden_layers)
    tensors: dict[str, np.ndarray] = {}
    for name, weight in model.state_dict().items():
        array, block = weight.numpy().copy(), f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if name.endswith("experts.gate_up_proj"):
            tensors[f"{block}ffn_gate_exps.weight"], tensors[f"{block}ffn_up_exps.weight"] = np.split(array, 2, axis=1)
        elif name.endswith("experts.down_proj"):
            tensors[f"{block}ffn_down_exps.weight"] = array
        elif name.endswith("e_score_correction_bias"):
            tensors[f"{block}exp_probs_b.bias"] = array
        else:
            plain = name.replace("shared_expert.", "shared_experts.")
            tensors[names.get_name(plain, (".weight", ".bias")) or name] = array
    return tensors


def gguf_keys(config: Any, **more: Any) -> dict[str, Any]:
    return {
        "block_count": config.num_hidden_layers, "context_length": 4096, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "rope.freq_base": config.rope_parameters["rope_theta"], **more,
    }  # fmt: skip


def network(architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Network:
    metadata = {"general.architecture": architecture} | {f"{architecture}.{name}": v for name, v in keys.items()}
    return Network(in_memory(metadata, {n: np.ascontiguousarray(a, np.float32) for n, a in tensors.items()}))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter: a head's rows i and i + d/2 become neighbours."""
    rows = weight.reshape(heads, 2, -1, weight.shape[1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("seed", SEEDS)
def test_deepseek_moe_is_qwen2_moe_with_its_gate_at_a_half(
    seed: int, transformers: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    import torch
    from safetensors.torch import save_file

    r = Random(seed)
    settings = common(r, "plain") | chosen(r, "num_experts") | {
        "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48, "norm_topk_prob": r.random() < 0.3,
        "qkv_bias": False, "mlp_only_layers": [0], "tie_word_embeddings": False,
    }  # fmt: skip
    model = random_model(transformers, transformers.Qwen2MoeConfig(**settings), 3 * seed)
    c = model.config
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.shared_expert_gate.weight.zero_()
    tensors = {n: a for n, a in gguf_tensors(model, "deepseek").items() if "shared_expert_gate" not in n}
    for i in range(c.num_hidden_layers):
        for part, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
            tensors[f"blk.{i}.attn_{part}.weight"] = permuted(tensors[f"blk.{i}.attn_{part}.weight"], heads)
    folder = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.shared_expert.down_proj.weight.mul_(2)
    keys = gguf_keys(
        c, expert_count=c.num_experts, expert_shared_count=2, leading_dense_block_count=1, expert_weights_scale=1.0,
        expert_weights_norm=c.norm_topk_prob, **{"rope.dimension_count": c.hidden_size // c.num_attention_heads},
    )  # fmt: skip
    ids = [r.randrange(VOCABULARY) for _ in range(TOKENS)]
    compare(network("deepseek", keys, tensors), model, ids, record_property)
    named = {n.replace("shared_expert.", "shared_experts."): w for n, w in folder.items() if "expert_gate" not in n}
    save_file(named, tmp_path / "model.safetensors")
    config = {key: getattr(c, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    config |= {key: getattr(c, key) for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")}
    config |= {key: getattr(c, key) for key in ("intermediate_size", "moe_intermediate_size", "norm_topk_prob")}
    config |= {"model_type": "deepseek", "n_routed_experts": c.num_experts, "n_shared_experts": 2, "moe_layer_freq": 1}
    config |= {"num_experts_per_tok": c.num_experts_per_tok, "first_k_dense_replace": 1, "rope_scaling": None}
    config |= {"rope_theta": c.rope_parameters["rope_theta"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    compare(Network(open_source(tmp_path)), model, ids, record_property)


@pytest.mark.parametrize("rope", ["plain", "yarn"])
@pytest.mark.parametrize("seed", SEEDS)
def test_ling_2_is_glm_4_5_with_head_norms_and_one_matrix(
    seed: int, rope: str, transformers: Any, record_property: Callable[[str, object], None]
) -> None:
    r = Random(seed)
    settings = glm4_moe(r, rope) | {"use_qk_norm": True, "attention_bias": False, "tie_word_embeddings": False}
    settings["rope_parameters"] = ROPES[rope](r) | {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    model = random_model(transformers, transformers.Glm4MoeConfig(**settings), 3 * seed)
    c, scaling = model.config, model.config.rope_parameters
    tensors = gguf_tensors(model, "bailingmoe2")
    for i in range(c.num_hidden_layers):
        q, k, v = (tensors.pop(f"model.layers.{i}.self_attn.{part}_proj.weight") for part in "qkv")
        tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate([q, k, v])
    keys = gguf_keys(
        c, expert_count=c.n_routed_experts, expert_shared_count=c.n_shared_experts, expert_gating_func=2,
        leading_dense_block_count=c.first_k_dense_replace, expert_weights_scale=c.routed_scaling_factor,
        expert_weights_norm=c.norm_topk_prob, expert_group_count=c.n_group, expert_group_used_count=c.topk_group,
    )  # fmt: skip
    keys |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    keys["rope.dimension_count"] = c.head_dim // 2
    if rope == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling["factor"]}
        keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    ids = [r.randrange(VOCABULARY) for _ in range(TOKENS)]
    compare(network("bailingmoe2", keys, tensors), model, ids, record_property)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_folder_of_gpt_oss_in_mxfp4_is_what_transformers_unpacks(
    seed: int, transformers: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """As OpenAI publishes it: blocks and scales beside float biases; on the reference device, which rounds nothing."""
    import torch

    r, generator = Random(seed), torch.Generator().manual_seed(seed)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    model = random_model(transformers, transformers.GptOssConfig(**gpt_oss(r, "yarn, not truncated") | sizes), 3 * seed)
    save_as_mxfp4(model, generator, tmp_path)
    ids = [r.randrange(VOCABULARY) for _ in range(TOKENS)]
    right = right_answer(model, ids)
    network = Network(open_source(tmp_path))
    error = relative_error(logits(network, ids), right.logits)
    assert error <= TOLERANCE
    record_property(VERIFIED, claim(network, WITNESS, "GptOss", error))


@pytest.mark.parametrize("seed", SEEDS)
def test_llama_4_is_read_from_a_folder_that_has_its_vision_model_too(
    seed: int, transformers: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """As Scout and Maverick are published: text_config, longer names, and tensors that are skipped and said to be."""
    r = Random(seed)
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    }  # fmt: skip
    text = llama4(r, "plain") | {"tie_word_embeddings": False}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    both = transformers.Llama4ForConditionalGeneration(config).eval().float()
    model = random_model(transformers, config.text_config, 3 * seed)
    both.language_model.load_state_dict(model.state_dict())
    both.save_pretrained(tmp_path)
    network = Network(open_source(tmp_path))
    compare(network, model, [r.randrange(VOCABULARY) for _ in range(TOKENS)], record_property)
    assert any(name.startswith("v.") for name in network.source.tensors)


GEMMA = {
    "hidden_act": "gelu_pytorch_tanh", "head_dim": 16, "query_pre_attn_scalar": 24, "num_hidden_layers": 7,
    "sliding_window": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


@pytest.mark.parametrize("kind", ["Gemma3", "Mistral3", "Ministral3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_text_model_is_read_from_a_folder_that_has_its_vision_model_too(
    kind: str, seed: int, transformers: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """As Gemma 3, Mistral Small 3.1 and Ministral 3 are published: text_config beside a vision tower."""
    r = Random(seed)
    case = next((case for case in DENSE.values() if case.kind == kind), None)
    settings = (case.settings(r, case.ropes[0]) if case else common(r, "plain")) | {
        "tie_word_embeddings": kind == "Gemma3"
    }
    if kind == "Gemma3":
        settings |= GEMMA
        del settings["rope_parameters"]
        text = transformers.Gemma3TextConfig(**settings)
        tower = VISION | {"patch_size": 14, "model_type": "siglip_vision_model"}
        config = transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)

    else:
        settings["head_dim"] = 16
        text = getattr(transformers, f"{kind if kind == 'Ministral3' else 'Mistral'}Config")(**settings)
        tower = VISION | {"patch_size": 14, "model_type": "pixtral", "head_dim": 8}
        config = transformers.Mistral3Config(text_config=text, vision_config=tower)
    config.tie_word_embeddings = text.tie_word_embeddings
    both = (
        getattr(transformers, f"{kind.replace('Ministral3', 'Mistral3')}ForConditionalGeneration")(config)
        .eval()
        .float()
    )
    model = random_model(transformers, text, 3 * seed)
    both.model.language_model.load_state_dict(model.model.state_dict())
    both.lm_head.load_state_dict(model.lm_head.state_dict())
    both.save_pretrained(tmp_path)
    network = Network(open_source(tmp_path))
    compare(network, model, [r.randrange(VOCABULARY) for _ in range(TOKENS)], record_property)
    assert "of vision or audio parts" in network.left_out


@pytest.mark.parametrize("seed", SEEDS)
def test_gemma_4_is_read_from_a_folder_that_has_its_vision_and_audio_models_too(
    seed: int, transformers: Any, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """As every Gemma 4 is published: text_config, longer names, and tensors that are skipped and said to be."""
    r = Random(seed)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}
    audio = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    text = gemma4(r, "proportional") | {"tie_word_embeddings": True}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=audio)
    both = transformers.Gemma4ForConditionalGeneration(config).eval().float()
    model = random_model(transformers, config.text_config, 3 * seed)
    both.model.language_model.load_state_dict(model.model.state_dict())
    both.save_pretrained(tmp_path)
    network = Network(open_source(tmp_path))
    compare(network, model, [r.randrange(VOCABULARY) for _ in range(TOKENS)], record_property)
    assert any(name.startswith("v.") for name in network.source.tensors)
