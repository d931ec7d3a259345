"""Random settings of transformers' config classes, one case for each family; knows neither torch nor localmoe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

VOCABULARY = 197

Rope = dict[str, Any]
ROPES: dict[str, Callable[[Random], Rope]] = {
    "plain": lambda r: {"rope_type": "default"},
    "linear": lambda r: {"rope_type": "linear", "factor": r.choice((2.0, 3.5))},
    "llama3": lambda r: {
        "rope_type": "llama3", "factor": r.choice((4.0, 8.0)), "original_max_position_embeddings": r.choice((16, 32)),
        "low_freq_factor": r.choice((1.0, 1.5)), "high_freq_factor": r.choice((4.0, 6.0)),
    },
    "yarn": lambda r: yarn(r),
    "yarn, other betas": lambda r: yarn(r, beta_fast=8.0, beta_slow=2.0),
    "yarn, attention factor": lambda r: yarn(r, attention_factor=r.choice((1.0, 1.3))),
    "yarn, equal mscales": lambda r: yarn(r, mscale=0.707, mscale_all_dim=0.707),
    "yarn, two mscales": lambda r: yarn(r, mscale=r.choice((0.5, 1.2)), mscale_all_dim=1.0),
    "yarn, mscale of all": lambda r: yarn(r, mscale_all_dim=0.8),
    "yarn, not truncated": lambda r: yarn(r, truncate=False),
}  # fmt: skip


def yarn(r: Random, **more: Any) -> Rope:
    original = r.choice((16, 32))
    return {"rope_type": "yarn", "factor": r.choice((4.0, 36.0)), "original_max_position_embeddings": original, **more}


def common(r: Random, rope: str) -> dict[str, Any]:
    kv_heads, group = r.choice((1, 2, 3)), r.choice((1, 2, 4))
    heads = kv_heads * group
    theta = {"rope_theta": r.choice((10000.0, 500.0, 1e6))}
    return {
        "vocab_size": VOCABULARY, "hidden_size": heads * r.choice((16, 20, 24)),
        "intermediate_size": r.choice((40, 96)), "num_hidden_layers": r.choice((2, 3)),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096, "rms_norm_eps": r.choice((1e-6, 1e-5, 1e-3)), "hidden_act": "silu",
        "tie_word_embeddings": r.random() < 0.3, "rope_parameters": ROPES[rope](r) | theta,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    }  # fmt: skip


def experts(r: Random, most: int = 12) -> tuple[int, int]:
    """How many experts there are and how many are used."""
    count = r.randrange(4, most)
    return count, r.randrange(1, min(count, 5))


def softmax_experts(r: Random) -> dict[str, Any]:
    count, used = experts(r)
    normalised = r.random() < 0.5
    return {"num_experts": count, "num_experts_per_tok": used, "norm_topk_prob": normalised}


def latent(r: Random, rope: str, lora: bool) -> dict[str, Any]:
    heads = r.choice((2, 3, 4))
    return common(r, rope) | {
        "hidden_size": heads * 16, "num_attention_heads": heads, "num_key_value_heads": heads,
        "q_lora_rank": r.choice((12, 24)) if lora else None, "kv_lora_rank": r.choice((16, 20)),
        "qk_nope_head_dim": r.choice((8, 16)), "qk_rope_head_dim": r.choice((4, 8)), "v_head_dim": r.choice((8, 12)),
        "first_k_dense_replace": r.choice((0, 1)), "n_shared_experts": r.choice((1, 2)), "moe_intermediate_size": 24,
        "routed_scaling_factor": r.choice((1.0, 2.5)),
    }  # fmt: skip


def grouped(r: Random) -> dict[str, Any]:
    groups = r.choice((2, 4))
    kept = r.choice((1, 2))
    return {
        "n_routed_experts": groups * 4,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": r.choice((2, 4)),
    }


@dataclass(frozen=True)
class Case:
    """A transformers config class and its random settings. The issue asks for a tolerance of 1e-4; float32 in another
    order gives about 1e-6."""

    kind: str
    settings: Callable[[Random, str], dict[str, Any]]
    ropes: tuple[str, ...] = ("plain", "yarn")
    tolerance: float = 2e-5


CASES = {
    "llama": Case("Llama", lambda r, rope: common(r, rope) | {"head_dim": r.choice((8, 16, 24))}, tuple(ROPES)),
    "mistral": Case("Mistral", lambda r, rope: common(r, rope) | {"sliding_window": r.choice((3, 8, 20, None))}),
    "mixtral": Case(
        "Mixtral",
        lambda r, rope: (
            common(r, rope) | dict(zip(("num_local_experts", "num_experts_per_tok"), experts(r), strict=True))
        ),
        ("plain", "linear"),
    ),
    "qwen2": Case("Qwen2", common, ("plain", "yarn")),
    "qwen2moe": Case(
        "Qwen2Moe",
        lambda r, rope: (
            common(r, rope)
            | softmax_experts(r)
            | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": r.choice((16, 40))}
        ),
    ),
    "qwen3": Case("Qwen3", lambda r, rope: common(r, rope) | {"head_dim": r.choice((8, 20, 32))}),
    "qwen3moe": Case(
        "Qwen3Moe",
        lambda r, rope: (
            common(r, rope)
            | softmax_experts(r)
            | {"head_dim": r.choice((8, 20, 32)), "moe_intermediate_size": 24, "mlp_only_layers": []}
        ),
    ),
    "olmoe": Case("Olmoe", lambda r, rope: common(r, rope) | softmax_experts(r), ("plain", "linear")),
    "deepseek-v2-lite": Case(
        "DeepseekV2",
        lambda r, rope: (
            latent(r, rope, False) | dict(zip(("n_routed_experts", "num_experts_per_tok"), experts(r), strict=True))
        ),
        ("plain", "yarn, equal mscales"),
    ),
    "deepseek-v2": Case(
        "DeepseekV2",
        lambda r, rope: latent(r, rope, True) | grouped(r) | {"topk_method": "group_limited_greedy"},
        ("plain", "yarn, equal mscales", "yarn, two mscales", "yarn, mscale of all"),
    ),
    "deepseek-v3": Case(
        "DeepseekV3",
        lambda r, rope: latent(r, rope, r.random() < 0.7) | grouped(r) | {"norm_topk_prob": r.random() < 0.7},
        ("plain", "yarn", "yarn, equal mscales", "yarn, two mscales", "yarn, mscale of all", "yarn, other betas"),
    ),
}
