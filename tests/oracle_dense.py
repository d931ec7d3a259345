"""Random settings of transformers' config classes for dense families; see `oracle_cases`."""

from __future__ import annotations

from random import Random
from typing import Any

from oracle_cases import ROPES, VOCABULARY, Case, common

TANH = "gelu_pytorch_tanh"


def layers(r: Random, count: int) -> dict[str, Any]:
    """A window in some layers: the family's own pattern, or any."""
    types = [r.choice(("sliding_attention", "full_attention")) for _ in range(count)]
    return {
        "num_hidden_layers": count, "sliding_window": r.choice((3, 8, 20)), "layer_types": r.choice((None, types)),
    }  # fmt: skip


def gemma2(r: Random, rope: str) -> dict[str, Any]:
    return common(r, rope) | layers(r, 3) | {
        "hidden_act": TANH, "head_dim": r.choice((8, 16, 24)), "query_pre_attn_scalar": r.choice((8, 24, 144)),
        "attn_logit_softcapping": r.choice((None, 2.0, 50.0)), "final_logit_softcapping": r.choice((None, 10.0, 30.0)),
    }  # fmt: skip


def gemma3(r: Random, rope: str) -> dict[str, Any]:
    """Seven layers, so that by the family's own pattern the sixth has no window."""
    whole = ROPES[rope](r) | {"rope_theta": 1e6}
    local = {"rope_type": "default", "rope_theta": r.choice((500.0, 10000.0))}
    ropes = {"rope_parameters": {"full_attention": whole, "sliding_attention": local}}
    own = {"attn_logit_softcapping": None, "final_logit_softcapping": r.choice((None, 10.0))}
    return gemma2(r, "plain") | layers(r, 7) | ropes | own


def olmo3(r: Random, rope: str) -> dict[str, Any]:
    """Five layers, so that by the family's own pattern the fourth has no window."""
    ropes = {"full_attention": ROPES[rope](r) | {"rope_theta": 500.0}}
    ropes["sliding_attention"] = {"rope_type": "default", "rope_theta": 500.0}
    return common(r, "plain") | layers(r, 5) | {"rope_parameters": ropes}


def gemma4(r: Random, rope: str) -> dict[str, Any]:
    """Small models have layer inputs and share keys and values; in large ones keys are values, some have experts."""
    settings = gemma2(r, "plain") | layers(r, 7)
    types = [r.choice(("sliding_attention", "full_attention")) for _ in range(2)] + ["full_attention"]
    fewest = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    settings |= {"layer_types": r.choice((None, fewest + types)), "rope_parameters": {
        "full_attention": {"rope_type": rope, "rope_theta": 1e6} | (
            {"partial_rotary_factor": r.choice((0.25, 0.5)), "factor": r.choice((1.0, 8.0))}
            if rope == "proportional" else {}
        ),
        "sliding_attention": {"rope_type": "default", "rope_theta": r.choice((500.0, 10000.0))},
    }}  # fmt: skip
    settings |= {"global_head_dim": r.choice((16, 32)), "attention_bias": False, "pad_token_id": 0}
    del settings["query_pre_attn_scalar"], settings["attn_logit_softcapping"], settings["hidden_act"]
    settings["hidden_activation"] = TANH
    if r.random() < 0.5:
        shared = {"num_kv_shared_layers": 3 if settings["layer_types"] else 1, "use_double_wide_mlp": r.random() < 0.5}
        return settings | shared | {"hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": VOCABULARY}
    whole = {"attention_k_eq_v": r.random() < 0.7, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
    experts = {"num_experts": 7, "top_k_experts": r.choice((2, 3)), "moe_intermediate_size": 24}
    return settings | whole | (experts | {"enable_moe_block": True} if r.random() < 0.6 else {})


def phi3(r: Random, rope: str) -> dict[str, Any]:
    settings = common(r, "plain")
    width, share = r.choice((16, 24)), r.choice((0.5, 0.75, 1.0))
    settings["hidden_size"] = settings["num_attention_heads"] * width
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    if rope != "plain":
        parameters["rope_type"] = "longrope"
        for name in ("short_factor", "long_factor"):
            parameters[name] = [r.uniform(1, 8) for _ in range(int(width * share) // 2)]
    if rope == "longrope, attention factor":
        parameters["attention_factor"] = 1.3
    original = 100 if rope == "longrope, short" else 32
    return settings | {
        "rope_parameters": parameters, "original_max_position_embeddings": original,
        "sliding_window": r.choice((None, 8)),
    }  # fmt: skip


def granite(r: Random, rope: str) -> dict[str, Any]:
    return common(r, rope) | {
        "embedding_multiplier": 3.0, "attention_multiplier": r.choice((0.1, 0.4)), "logits_scaling": 6.0,
        "residual_multiplier": r.choice((0.22, 1.0)),
    }  # fmt: skip


def glm4(r: Random, rope: str) -> dict[str, Any]:
    theta = {"rope_theta": 500.0, "partial_rotary_factor": r.choice((0.5, 0.25, 1.0))}
    return common(r, rope) | {
        "head_dim": r.choice((8, 16, 32)), "attention_bias": r.random() < 0.6,
        "rope_parameters": ROPES[rope](r) | theta,
    }  # fmt: skip


def smollm3(r: Random, rope: str) -> dict[str, Any]:
    return common(r, rope) | {"num_hidden_layers": 5, "no_rope_layers": r.choice((None, [1, 0, 1, 1, 0]))}


def ministral3(r: Random, rope: str) -> dict[str, Any]:
    settings = common(r, rope) | {"head_dim": r.choice((8, 16, 24)), "sliding_window": r.choice((None, 8, 20))}
    settings["rope_parameters"] |= {"llama_4_scaling_beta": r.choice((0.1, 0.4))}
    return settings


def cohere(r: Random, rope: str) -> dict[str, Any]:
    settings = common(r, rope) | {"logit_scale": r.choice((0.0625, 0.5)), "layer_norm_eps": r.choice((1e-5, 1e-3))}
    del settings["rms_norm_eps"]
    return settings


def starcoder2(r: Random, rope: str) -> dict[str, Any]:
    settings = common(r, rope) | {
        "hidden_act": TANH, "norm_epsilon": r.choice((1e-5, 1e-3)), "use_bias": r.random() < 0.7,
        "sliding_window": r.choice((None, 8, 20)),
    }  # fmt: skip
    del settings["rms_norm_eps"]
    return settings


def gpt2(r: Random, rope: str) -> dict[str, Any]:
    heads = r.choice((2, 3, 4))
    return {
        "vocab_size": VOCABULARY, "n_positions": 80, "n_embd": heads * r.choice((16, 20, 24)), "n_head": heads,
        "n_layer": r.choice((2, 3)), "n_inner": r.choice((None, 40)), "layer_norm_epsilon": r.choice((1e-5, 1e-3)),
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


YARN = ("yarn, equal mscales", "yarn, two mscales", "yarn, mscale of all")

DENSE: dict[str, Case] = {
    "gemma3": Case("Gemma3Text", gemma3, ("plain", "linear", "yarn")),
    "gemma4": Case("Gemma4Text", gemma4, ("proportional", "default")),
    "gemma2": Case("Gemma2", gemma2, ("plain", "linear")),
    "phi3": Case("Phi3", phi3, ("plain", "longrope, short", "longrope, long", "longrope, attention factor")),
    "olmo2": Case("Olmo2", common),
    "olmo3": Case("Olmo3", olmo3, ("plain", "yarn", "linear")),
    "granite": Case("Granite", granite),
    "glm4": Case("Glm4", glm4, ("plain", "yarn")),
    "smollm3": Case("SmolLM3", smollm3, ("plain", "yarn", "llama3")),
    "mistral3": Case("Ministral3", ministral3, ("yarn", *YARN)),
    "cohere2": Case("Cohere2", lambda r, rope: cohere(r, rope) | layers(r, 5), ("plain", "linear")),
    "command-r": Case(
        "Cohere", lambda r, rope: cohere(r, rope) | {"use_qk_norm": r.random() < 0.5}, ("plain", "linear", "yarn")
    ),
    "starcoder2": Case("Starcoder2", starcoder2, ("plain", "linear")),
    "gpt2": Case("GPT2", gpt2, ("none",)),
}
