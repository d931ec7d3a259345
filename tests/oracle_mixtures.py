"""Cases of Mixture-of-Experts families; see `oracle_cases`."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from oracle_cases import ROPES, Case, common, experts, grouped, latent


def chosen(r: Random, count: str = "num_local_experts") -> dict[str, Any]:
    return dict(zip((count, "num_experts_per_tok"), experts(r), strict=True))


def gpt_oss(r: Random, rope: str) -> dict[str, Any]:
    window = {"sliding_window": r.choice((3, 8, 20)), "head_dim": r.choice((8, 16, 24))}
    layers = [r.choice(("sliding_attention", "full_attention")) for _ in range(3)]
    types = {"num_hidden_layers": 3, "layer_types": r.choice((None, layers))}
    return common(r, rope) | chosen(r) | window | types


def llama4(r: Random, rope: str) -> dict[str, Any]:
    return common(r, rope) | {
        "num_local_experts": r.randrange(2, 9), "num_experts_per_tok": 1, "intermediate_size_mlp": r.choice((40, 72)),
        "head_dim": r.choice((8, 16, 24)), "num_hidden_layers": 5, "attention_chunk_size": r.choice((3, 8, 20)),
        "interleave_moe_layer_step": r.choice((1, 2)), "use_qk_norm": r.random() < 0.7, "attn_scale": 0.4,
        "floor_scale": r.choice((4, 16)), "attn_temperature_tuning": r.random() < 0.8,
        "no_rope_layers": r.choice(([], [1, 0, 1, 1, 0])),
    }  # fmt: skip


def glm4_moe(r: Random, rope: str) -> dict[str, Any]:
    theta = {"rope_theta": 500.0, "partial_rotary_factor": r.choice((0.5, 0.25, 1.0))}
    return common(r, rope) | r.choice((grouped, ungrouped))(r) | {
        "head_dim": r.choice((8, 16, 32)), "moe_intermediate_size": 24, "n_shared_experts": r.choice((1, 2)),
        "first_k_dense_replace": r.choice((0, 1)), "routed_scaling_factor": r.choice((1.0, 2.5)),
        "norm_topk_prob": r.random() < 0.7, "use_qk_norm": r.random() < 0.5, "attention_bias": r.random() < 0.5,
        "rope_parameters": ROPES[rope](r) | theta,
    }  # fmt: skip


def ungrouped(r: Random) -> dict[str, Any]:
    return chosen(r, "n_routed_experts") | {"n_group": 1, "topk_group": 1}


def mistral4(r: Random, rope: str) -> dict[str, Any]:
    settings = latent(r, rope, r.random() < 0.7) | r.choice((grouped, ungrouped))(r)
    settings["norm_topk_prob"] = r.random() < 0.7
    partial = settings["qk_rope_head_dim"] / (settings["qk_nope_head_dim"] + settings["qk_rope_head_dim"])
    warmed = {"llama_4_scaling_beta": r.choice((0.1, 0.4)), "partial_rotary_factor": partial}
    return settings | {"rope_parameters": ROPES[rope](r) | {"rope_theta": 10000.0} | warmed}


def granite(r: Random, rope: str) -> dict[str, Any]:
    return common(r, rope) | chosen(r) | {
        "embedding_multiplier": 3.0, "attention_multiplier": r.choice((0.1, 0.4)), "logits_scaling": 6.0,
        "residual_multiplier": r.choice((0.22, 1.0)),
    }  # fmt: skip


def minimax(r: Random, rope: str) -> dict[str, Any]:
    theta = {"rope_theta": 500.0, "partial_rotary_factor": r.choice((0.5, 1.0))}
    return common(r, rope) | chosen(r) | {"head_dim": r.choice((8, 16, 24)), "rope_parameters": ROPES[rope](r) | theta}


def ernie(r: Random, rope: str) -> dict[str, Any]:
    count, used = experts(r)
    return common(r, rope) | {
        "moe_num_experts": count, "moe_k": used, "moe_num_shared_experts": r.choice((0, 1, 2)), "num_hidden_layers": 4,
        "moe_intermediate_size": 24, "moe_layer_start_index": r.choice((0, 1, 2)),
        "moe_layer_interval": r.choice((1, 2)),
    }  # fmt: skip


def hunyuan(r: Random, rope: str) -> dict[str, Any]:
    count, used = experts(r)
    settings = common(r, rope) | {"num_experts": count, "moe_topk": used, "head_dim": r.choice((8, 16, 24))}
    if rope == "plain" and r.random() < 0.5:
        settings["rope_parameters"] |= {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}
    return settings


def phimoe(r: Random, rope: str) -> dict[str, Any]:
    """Long factors are the formula's matter: transformers 5.23 takes the short ones whatever the length."""
    settings = common(r, "plain")
    settings |= {"hidden_size": settings["num_attention_heads"] * 16, "num_local_experts": r.randrange(4, 17)}
    if rope == "longrope":
        factors = {name: [r.uniform(1, 8) for _ in range(8)] for name in ("short_factor", "long_factor")}
        magnitudes = {"short_mscale": 1.3, "long_mscale": 1.3, "original_max_position_embeddings": 100}
        settings["rope_parameters"] |= {"rope_type": "longrope", **factors, **magnitudes}
    return settings | {
        "num_experts_per_tok": 2, "lm_head_bias": r.random() < 0.5, "attention_bias": r.random() < 0.5,
        "router_jitter_noise": r.choice((0.01, 0.3)), "sliding_window": r.choice((None, 5, 20)),
        "tie_word_embeddings": False,
    }  # fmt: skip


def indexed(r: Random, rope: str) -> dict[str, Any]:
    """So many indexer heads that no key is below zero for all; texts are mostly longer than what is chosen."""
    settings = latent(r, rope, True) | r.choice((grouped, ungrouped))(r)
    return settings | {
        "norm_topk_prob": r.random() < 0.7, "index_topk": r.choice((5, 20, 200)), "index_n_heads": 24,
        "index_head_dim": r.choice((12, 24)), "num_hidden_layers": 4,
    }  # fmt: skip


def glm_dsa(r: Random, rope: str) -> dict[str, Any]:
    shared = [r.choice(("full", "shared")) for _ in range(3)]
    return indexed(r, rope) | r.choice(({"indexer_types": ["full", *shared]}, {"index_topk_freq": 2}, {}))


MIXTURES: dict[str, Case] = {
    "gpt-oss": Case(
        "GptOss", gpt_oss, ("plain", "yarn", "yarn, not truncated", "yarn, other betas", "yarn, attention factor")
    ),
    "llama4": Case("Llama4Text", llama4, ("plain", "llama3", "yarn")),
    "glm4moe": Case("Glm4Moe", glm4_moe, ("plain", "yarn", "linear")),
    "granitemoe": Case("GraniteMoe", granite),
    "granitemoe, shared": Case(
        "GraniteMoeShared", lambda r, rope: granite(r, rope) | {"shared_intermediate_size": r.choice((0, 24, 40))}
    ),
    "phimoe": Case("Phimoe", phimoe, ("plain", "longrope")),
    "minimax-m2": Case("MiniMaxM2", minimax),
    "ernie4_5-moe": Case("Ernie4_5_Moe", ernie),
    "hunyuan-moe": Case("HunYuanMoEV1", hunyuan),
    "deepseek-v3.2": Case("DeepseekV32", indexed, ("plain", "yarn", "yarn, mscale of all")),
    "glm-dsa": Case("GlmMoeDsa", glm_dsa, ("plain",)),
    "mistral4": Case("Mistral4", mistral4, ("yarn, equal mscales", "yarn, two mscales", "yarn, mscale of all")),
}


def save_as_mxfp4(model: Any, generator: Any, folder: Path) -> None:
    """A gpt-oss folder as OpenAI publishes it: random blocks and scales of experts, which the model gets as well."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts, name)
                count, columns, rows = weight.shape
                blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
                scales = torch.randint(121, 125, blocks.shape[:3], generator=generator, dtype=torch.uint8)
                weight.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
                place = f"model.layers.{i}.mlp.experts.{name}"
                del stored[place]
                stored |= {f"{place}_blocks": blocks, f"{place}_scales": scales}
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    packed = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
