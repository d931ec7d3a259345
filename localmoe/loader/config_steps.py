"""What the config.json files of many families have in common: heads, windows, routers and rope, under GGUF's keys.

What transformers 5.23 computes decides (its models/*/modeling_*.py); older spellings are read beside the new.
"""

from __future__ import annotations

import math
from typing import Any

from localmoe.errors import UnsupportedError
from localmoe.loader.config_json import INT_LIMIT, Keys, Settings
from localmoe.loader.source import shown

# Whole numbers that only change their name.
COMMON = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings", "vocab_size": "vocab_size",
}  # fmt: skip
# rope_theta where config.json is silent, for those whose default is not 10,000 (transformers' configuration files).
BASES = {
    "mixtral": 1e6, "gpt_oss": 150000.0, "llama4_text": 500000.0, "minimax_m2": 5e6, "gemma3_text": 1e6,
    "cohere": 500000.0, "smollm3": 2e6, "olmo3": 500000.0,
}  # fmt: skip
# Architectures of which a part of each head may turn, and partial_rotary_factor where config.json is silent.
PARTIAL = {
    "glm4moe": 0.5, "minimax-m2": 1.0, "glm4": 0.5, "qwen3next": 0.25, "qwen35": 0.25, "qwen35moe": 0.25,
}  # fmt: skip
# Width of a head where config.json is silent, for those whose default is no quotient.
HEAD_WIDTHS = {
    "qwen3": 128, "gemma2": 256, "gemma3": 256, "glm4": 128, "mistral3": 128, "qwen3next": 256, "qwen35": 256,
    "qwen35moe": 256,
}  # fmt: skip


def heads(settings: Settings, keys: Keys, architecture: str) -> None:
    """Grouped-query attention without biases (but Qwen's), every element of a head turned."""
    head_sizes(settings, keys, architecture)
    settings.expect("attention_bias", False)
    settings.expect("qkv_bias", True)
    settings.expect("mlp_bias", False)
    settings.expect("partial_rotary_factor", 1, 1.0)


def head_sizes(settings: Settings, keys: Keys, architecture: str) -> None:
    """Counts and widths; head_dim may be missing or null, except where it is no quotient (Qwen3: 128)."""
    count = settings.whole("num_attention_heads")
    if count < 1:
        raise settings.wrong("num_attention_heads", count, "at least 1")
    default = HEAD_WIDTHS.get(architecture, keys["embedding_length"] // count)
    length = settings.whole("head_dim", default=default)
    keys["attention.head_count"] = count
    keys["attention.head_count_kv"] = settings.whole("num_key_value_heads", default=count)
    keys["attention.key_length"] = keys["attention.value_length"] = keys["rope.dimension_count"] = length


def latent_heads(settings: Settings, keys: Keys, architecture: str) -> None:
    """Multi-head latent attention: kv_b stays whole, so key_length and value_length are those of a head."""
    count, rope = settings.whole("num_attention_heads"), settings.whole("qk_rope_head_dim")
    key, value = settings.whole("qk_nope_head_dim") + rope, settings.whole("v_head_dim")
    settings.take("head_dim")
    keys["attention.head_count"] = count
    keys["attention.head_count_kv"] = settings.whole("num_key_value_heads", default=count)
    keys["attention.key_length"] = keys["attention.key_length_mla"] = key
    keys["attention.value_length"] = keys["attention.value_length_mla"] = value
    keys["rope.dimension_count"] = rope
    keys["attention.kv_lora_rank"] = settings.whole("kv_lora_rank")
    if settings.take("q_lora_rank") is not None:
        keys["attention.q_lora_rank"] = settings.whole("q_lora_rank")
    # transformers builds q_a_layernorm and kv_a_layernorm without an epsilon, so that RMSNorm's default counts.
    keys["attention.lora_norm_rms_epsilon"] = 1e-6
    settings.expect("attention_bias", False)
    settings.expect("mlp_bias", False)
    settings.expect("rope_interleave", True)


def mistral_window(settings: Settings, keys: Keys, architecture: str) -> None:
    """One window for all layers; MistralConfig's default of 4096 counts where the key itself is missing."""
    window = settings.take("sliding_window") if "sliding_window" in settings.values else 4096
    _window(settings, keys, window)


def mixtral_window(settings: Settings, keys: Keys, architecture: str) -> None:
    _window(settings, keys, settings.take("sliding_window"))


def qwen_window(settings: Settings, keys: Keys, architecture: str) -> None:
    """Qwen's windows are a matter of each layer; only files in which no layer has one are read."""
    settings.take("sliding_window")  # without use_sliding_window it says nothing
    if architecture == "qwen2moe" or settings.whole("max_window_layers", default=0) < keys["block_count"]:
        settings.expect("use_sliding_window", False)
    settings.take("use_sliding_window")
    layers = settings.take("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise UnsupportedError(
            f"{settings.origin}: layer_types is {shown(layers)}; possible is 'full_attention' for all"
        )


def _window(settings: Settings, keys: Keys, window: Any) -> None:
    if window is None:
        return
    if type(window) is not int or not 0 < window < INT_LIMIT:
        raise settings.wrong("sliding_window", window, "a whole number from 1")
    keys["attention.sliding_window"] = window


def granite_scales(settings: Settings, keys: Keys, architecture: str) -> None:
    """Four multipliers, which GGUF calls scales; logits are divided by theirs."""
    names = {
        "embedding_scale": "embedding_multiplier", "attention.scale": "attention_multiplier",
        "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
    }  # fmt: skip
    for name, key in names.items():
        keys[name] = settings.number(key, default=1.0)
        if not keys[name]:
            raise settings.wrong(key, keys[name], "another number than 0")


def softmax_experts(settings: Settings, keys: Keys, architecture: str) -> None:
    """A softmax router whose weights may be renormalised; every layer has experts."""
    keys["expert_weights_norm"] = settings.flag("norm_topk_prob", False)
    settings.expect("decoder_sparse_step", 1)
    settings.expect("mlp_only_layers", [])
    settings.expect("clip_qkv")


def deepseek_experts(settings: Settings, keys: Keys, architecture: str) -> None:
    """DeepSeek's routers: V2 by softmax, greedy or a group's best expert; V3 by sigmoid, bias, a group's best two."""
    third = settings.values["model_type"] == "deepseek_v3"
    keys["leading_dense_block_count"] = settings.whole("first_k_dense_replace")
    keys["expert_weights_scale"] = settings.number("routed_scaling_factor")
    keys["expert_gating_func"] = 2 if third else 1
    settings.expect("moe_layer_freq", 1)
    settings.expect("scoring_func", "sigmoid" if third else "softmax")
    if third:
        settings.expect("topk_method", "noaux_tc")
        keys["expert_weights_norm"] = settings.flag("norm_topk_prob", True)
    else:
        # DeepSeek's own code renormalises when this is true, transformers never does: no released V2 sets it.
        settings.expect("norm_topk_prob", False)
        settings.expect("topk_method", "greedy", "group_limited_greedy")
    groups = settings.take("n_group"), settings.take("topk_group")
    if third or settings.values.get("topk_method") == "group_limited_greedy":
        keys["expert_group_count"] = settings.whole("n_group")
        keys["expert_group_used_count"] = settings.whole("topk_group")
        keys["expert_group_score"] = "top2" if third else "max"
        if groups[0] == 0 or keys["expert_count"] % keys["expert_group_count"]:
            raise settings.wrong("n_group", groups[0], f"a divisor of {keys['expert_count']} experts")


def rope(settings: Settings, keys: Keys, architecture: str) -> None:
    """rope_theta with rope_scaling (old) or rope_parameters (new), per-layer forms refused."""
    found = settings.take("rope_scaling", "rope_parameters") or {}
    if not isinstance(found, dict):
        raise settings.wrong("rope_parameters", found, "an object")
    inner = Settings(found, f"{settings.origin}: rope")
    default = BASES.get(settings.values["model_type"], 1e4)
    keys["rope.freq_base"] = inner.number("rope_theta", default=settings.number("rope_theta", default=default))
    kind = inner.take("rope_type", "type") or "default"
    if kind == "dynamic" and architecture == "hunyuan-moe":  # a fixed stretch of the base, whatever the name says
        kind, width, alpha = "default", keys["attention.key_length"], inner.number("alpha")
        if alpha <= 0 or width < 3:
            raise inner.wrong("alpha", alpha, "a number above 0, for heads wider than 2")
        keys["rope.freq_base"] *= alpha ** (width / (width - 2))
        inner.take("factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedError(
            f"{inner.origin}: rope_type is {shown(kind)}; possible are default, linear, llama3 and yarn"
        )
    _turned_part(settings, inner, keys, architecture)
    original = settings.take("original_max_position_embeddings") or inner.take("original_max_position_embeddings")
    if kind != "default":
        keys["rope.scaling.type"] = kind
    if kind == "linear":
        keys["rope.scaling.factor"] = inner.number("factor")
    if kind in ("llama3", "yarn"):
        length = Settings({"original_max_position_embeddings": original}, inner.origin)
        keys["rope.scaling.original_context_length"] = length.whole(
            "original_max_position_embeddings", default=keys["context_length"]
        )
    if kind == "llama3":
        keys["rope.scaling.factor"] = inner.number("factor")
        keys["rope.scaling.low_freq_factor"] = inner.number("low_freq_factor")
        keys["rope.scaling.high_freq_factor"] = inner.number("high_freq_factor")
    if kind == "yarn":
        _yarn(inner, keys, architecture)
    if beta := inner.number("llama_4_scaling_beta", default=0):
        keys["attention.temperature_scale"] = beta
        keys["attention.temperature_length"] = keys.get("rope.scaling.original_context_length", keys["context_length"])
        inner.take("max_position_embeddings")  # said again
    if architecture in ("qwen35", "qwen35moe"):  # where a picture's rows and columns go; a text's positions are one
        inner.take("mrope_section", "mrope_interleaved")
    inner.finish()


def _turned_part(settings: Settings, inner: Settings, keys: Keys, architecture: str) -> None:
    """How many elements of each head turn; in latent attention they are named by themselves."""
    default = settings.number("partial_rotary_factor", default=PARTIAL.get(architecture, 1.0))
    share = inner.number("partial_rotary_factor", default=default)
    if architecture in PARTIAL:
        keys["rope.dimension_count"] = int(keys["attention.key_length"] * share)
    elif "attention.kv_lora_rank" not in keys:
        inner.expect("partial_rotary_factor", 1, 1.0)


def _yarn(inner: Settings, keys: Keys, architecture: str) -> None:
    """YaRN. The amplitude of cos and sin is written as GGUF has it: a factor upon what the other keys imply."""
    original = keys["rope.scaling.original_context_length"]
    if original < 1:
        raise inner.wrong("original_max_position_embeddings", original, "at least 1")
    factor = inner.number("factor", default=keys["context_length"] / original)
    numerator, denominator = inner.number("mscale", default=0), inner.number("mscale_all_dim", default=0)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    keys["rope.scaling.factor"] = factor
    keys["rope.scaling.yarn_beta_fast"] = inner.number("beta_fast", default=0) or 32.0
    keys["rope.scaling.yarn_beta_slow"] = inner.number("beta_slow", default=0) or 1.0
    implied = magnitude(1.0)
    if denominator:
        # deepseek2 and mistral4 files hold a tenth of mscale_all_dim, others all of it (llama.cpp's conversion).
        keys["rope.scaling.yarn_log_multiplier"] = denominator * (0.1 if "attention.kv_lora_rank" in keys else 1.0)
        keys["rope.scaling.yarn_mscale"] = numerator or 1.0
        implied = magnitude(numerator or 1.0) / magnitude(denominator)
    wanted = implied if numerator and denominator else magnitude(1.0)
    wanted = inner.number("attention_factor", default=wanted)
    if wanted != implied:
        keys["rope.scaling.attn_factor"] = wanted / implied
    if not inner.flag("truncate", True):
        keys["rope.scaling.yarn_truncate"] = False


def layer_pattern(settings: Settings, keys: Keys, kind: str, default: list[bool]) -> list[bool]:
    """Which layers are of `kind` by layer_types, where the others have full attention."""
    found = settings.take("layer_types")
    if found is None:
        return default
    if not isinstance(found, list) or len(found) != keys["block_count"]:
        raise settings.wrong("layer_types", found, f"a name for each of {keys['block_count']} layers")
    if any(name not in (kind, "full_attention") for name in found):
        raise UnsupportedError(
            f"{settings.origin}: layer_types is {shown(found)}; possible are {kind!r} and 'full_attention'"
        )
    return [name == kind for name in found]
