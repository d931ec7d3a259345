"""config.json of Mixture-of-Experts families under GGUF's keys; see `config_json.Family`.

What transformers 5.23 computes decides (its models/*/modeling_*.py).
"""

from __future__ import annotations

from localmoe.errors import UnsupportedError
from localmoe.loader.config_dense import factor_tensors, long_rope
from localmoe.loader.config_json import Family, Keys, Settings
from localmoe.loader.config_steps import (
    granite_scales,
    head_sizes,
    heads,
    latent_heads,
    layer_pattern,
    mixtral_window,
    rope,
)
from localmoe.loader.experts import gpt_oss_tensors, halved_shared_expert, separated_experts
from localmoe.loader.source import shown

SIZES = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}  # fmt: skip
COMMON = {**SIZES, "expert_used_count": "num_experts_per_tok"}
EXPERT_WIDTH = {"expert_feed_forward_length": "intermediate_size"}
ERNIE = {
    **SIZES, "feed_forward_length": "intermediate_size", "expert_used_count": "moe_k",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "moe_num_shared_experts",
}  # fmt: skip
SHARED = {"expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "n_shared_experts"}


def gpt_oss(settings: Settings, keys: Keys, architecture: str) -> None:
    """Windows by layer_types; biases everywhere; YaRN's ramp is truncated unless the file says otherwise."""
    head_sizes(settings, keys, architecture)
    settings.expect("attention_bias", True)
    settings.expect("swiglu_limit", 7.0, 7)
    settings.expect("swiglu_alpha", 1.702)
    settings.take("initial_context_length", "experts_per_token")  # said again by keys that count
    keys["attention.sliding_window"] = settings.whole("sliding_window", default=128)
    alternating = [i % 2 == 0 for i in range(keys["block_count"])]
    keys["attention.sliding_window_pattern"] = layer_pattern(settings, keys, "sliding_attention", alternating)
    rope(settings, keys, architecture)
    if keys.get("rope.scaling.type") == "yarn":
        keys.setdefault("rope.scaling.yarn_truncate", True)


def glm4_moe(settings: Settings, keys: Keys, architecture: str) -> None:
    """Biases and head norms are told by the tensors that there are."""
    head_sizes(settings, keys, architecture)
    settings.take("attention_bias", "use_qk_norm")
    keys["feed_forward_length"] = settings.whole("intermediate_size")
    keys["leading_dense_block_count"] = settings.whole("first_k_dense_replace", default=1)
    keys["expert_gating_func"] = 2
    weighted_groups(settings, keys)
    rope(settings, keys, architecture)


def deepseek(settings: Settings, keys: Keys, architecture: str) -> None:
    heads(settings, keys, architecture)
    keys["feed_forward_length"] = settings.whole("intermediate_size")
    keys["leading_dense_block_count"] = settings.whole("first_k_dense_replace", default=0)
    keys["expert_weights_norm"] = settings.flag("norm_topk_prob", False)
    keys["expert_weights_scale"] = settings.number("routed_scaling_factor", default=1.0)
    settings.expect("moe_layer_freq", 1)
    settings.expect("scoring_func", "softmax")
    rope(settings, keys, architecture)


def mistral4(settings: Settings, keys: Keys, architecture: str) -> None:
    """DeepSeek's attention and experts with a softmax, queries that warm; temperature stands among rope's settings."""
    latent_heads(settings, keys, architecture)
    keys["leading_dense_block_count"] = settings.whole("first_k_dense_replace", default=0)
    keys["expert_gating_func"] = 1
    weighted_groups(settings, keys)
    rope(settings, keys, architecture)


def minimax_m2(settings: Settings, keys: Keys, architecture: str) -> None:
    """The first files say how much of a head turns by rotary_dim, and name again what their code always does."""
    head_sizes(settings, keys, architecture)
    keys["expert_gating_func"] = 2
    settings.expect("scoring_func", "sigmoid")
    settings.expect("use_qk_norm", True)
    settings.expect("qk_norm_type", "per_layer")
    settings.expect("use_routing_bias", True)
    settings.take("attn_type_list", "mlp_intermediate_size", "shared_moe_mode", "mtp_transformer_layers", "use_mtp")
    rotary = settings.whole("rotary_dim", default=0)
    rope(settings, keys, architecture)
    if rotary and keys["rope.dimension_count"] == keys["attention.key_length"]:
        keys["rope.dimension_count"] = rotary


def granite_moe(settings: Settings, keys: Keys, architecture: str) -> None:
    """Granite's scales, and a shared expert where it has a width."""
    heads(settings, keys, architecture)
    granite_scales(settings, keys, architecture)
    keys["expert_shared_feed_forward_length"] = settings.whole("shared_intermediate_size", default=0)
    rope(settings, keys, architecture)


def ernie_moe(settings: Settings, keys: Keys, architecture: str) -> None:
    """Experts in every n-th layer from a first one on."""
    head_sizes(settings, keys, architecture)
    settings.expect("use_bias", False)
    settings.take("moe_capacity", "moe_gate", "moe_use_aux_free")
    keys["leading_dense_block_count"] = settings.whole("moe_layer_start_index", default=1)
    keys["interleave_moe_layer_step"] = settings.whole("moe_layer_interval", default=1)
    settings.expect("moe_layer_end_index", -1, keys["block_count"] - 1)
    if settings.number("moe_norm_min", default=1e-12) > 1e-9:
        settings.expect("moe_norm_min", 1e-12)  # a larger floor under the sum of shares would count
    rope(settings, keys, architecture)


def hunyuan_moe(settings: Settings, keys: Keys, architecture: str) -> None:
    """Per-layer lists must agree; the shared expert is as wide as the routed ones."""
    head_sizes(settings, keys, architecture)
    width = settings.whole("intermediate_size")
    keys["expert_count"] = uniform(settings, "num_experts")
    keys["expert_used_count"] = uniform(settings, "moe_topk")
    keys["expert_feed_forward_length"] = keys["expert_shared_feed_forward_length"] = width
    for name, expected in (("moe_intermediate_size", width), ("num_shared_expert", 1)):
        if settings.take(name) is not None and uniform(settings, name) != expected:
            settings.expect(name, expected)
    settings.expect("attention_bias", False)
    settings.expect("use_qk_norm", True)
    settings.expect("use_cla", False)
    settings.expect("attention_head_dim", keys["attention.key_length"])
    settings.take("eod_token_id", "sep_token_id")
    rope(settings, keys, architecture)


def phimoe(settings: Settings, keys: Keys, architecture: str) -> None:
    """Biases are told by the tensors that there are. LongRoPE's amplitude is named, and one for both lengths."""
    head_sizes(settings, keys, architecture)
    mixtral_window(settings, keys, architecture)
    settings.take("attention_bias", "lm_head_bias", "input_jitter_noise")
    keys["expert_router_jitter"] = settings.number("router_jitter_noise", default=0.01)
    found = settings.take("rope_scaling", "rope_parameters") or {}
    if not isinstance(found, dict):
        raise settings.wrong("rope_parameters", found, "an object")
    inner = Settings(found, f"{settings.origin}: rope")
    keys["rope.freq_base"] = inner.number("rope_theta", default=settings.number("rope_theta", default=1e6))
    outer = settings.whole("original_max_position_embeddings", default=keys["context_length"])
    if long_rope(inner, keys, inner.whole("original_max_position_embeddings", default=outer)):
        keys["rope.scaling.attn_factor"] = inner.number("short_mscale")
        inner.expect("long_mscale", inner.values["short_mscale"])
        inner.take("factor", "attention_factor")  # the two magnitudes go before
    inner.finish()


def uniform(settings: Settings, name: str) -> int:
    """A whole number, or a list that says the same one for each layer."""
    found = settings.take(name)
    values = found if isinstance(found, list) and found else [found]
    if any(type(value) is not int or value != values[0] for value in values):
        raise settings.wrong(name, found, "a whole number, the same for all layers")
    return int(values[0])


def weighted_groups(settings: Settings, keys: Keys) -> None:
    """Shares renormalised and scaled; groups by their best two experts."""
    keys["expert_weights_norm"] = settings.flag("norm_topk_prob", True)
    keys["expert_weights_scale"] = settings.number("routed_scaling_factor", default=1.0)
    keys["expert_group_count"] = settings.whole("n_group", default=1)
    keys["expert_group_used_count"] = settings.whole("topk_group", default=1)
    if not keys["expert_group_count"] or keys["expert_count"] % keys["expert_group_count"]:
        raise settings.wrong("n_group", keys["expert_group_count"], f"a divisor of {keys['expert_count']} experts")


def llama4(settings: Settings, keys: Keys, architecture: str) -> None:
    """intermediate_size is the experts', intermediate_size_mlp a dense layer's; layers without rope have no chunks."""
    heads(settings, keys, architecture)
    keys["feed_forward_length"] = settings.whole("intermediate_size_mlp", default=16384)
    blocks, step = keys["block_count"], settings.whole("interleave_moe_layer_step", default=1)
    keys["interleave_moe_layer_step"] = step
    settings.expect("moe_layers", [i for i in range(blocks) if step and (i + 1) % step == 0])
    keys["attention.sliding_window"] = settings.whole("attention_chunk_size", default=8192)
    interval = settings.whole("no_rope_layer_interval", default=4)
    turned = settings.take("no_rope_layers") or [int(not interval or (i + 1) % interval > 0) for i in range(blocks)]
    if not isinstance(turned, list):
        raise settings.wrong("no_rope_layers", turned, f"0 or 1 for each of {blocks} layers")
    chunked = layer_pattern(settings, keys, "chunked_attention", [bool(on) for on in turned])
    if turned != chunked:
        raise UnsupportedError(
            f"{settings.origin}: no_rope_layers is {shown(turned)}; possible is 1 for the chunked layers of layer_types"
        )
    keys["attention.sliding_window_pattern"] = chunked
    keys["attention.qk_norm"] = settings.flag("use_qk_norm", True)
    tuning = settings.take("attn_temperature_tuning")  # a number in the first files
    scale, length = settings.number("attn_scale", default=0.1), settings.whole("floor_scale", default=8192)
    keys["attention.temperature_scale"] = scale if tuning is None or tuning else 0.0
    keys["attention.temperature_length"] = length
    settings.take("for_llm_compressor", "cache_implementation")
    rope(settings, keys, architecture)


MIXTURES: dict[str, Family] = {
    "gpt_oss": Family(
        "gpt-oss", {**COMMON, **EXPERT_WIDTH}, (gpt_oss,), rewrite=gpt_oss_tensors, quantizations=("mxfp4",)
    ),
    "llama4_text": Family(
        "llama4", {**COMMON, **EXPERT_WIDTH}, (llama4,), rewrite=separated_experts(interleaved=False)
    ),
    "deepseek": Family("deepseek", {**COMMON, **SHARED}, (deepseek,)),
    "glm4_moe": Family("glm4moe", {**COMMON, **SHARED}, (glm4_moe,)),
    "granitemoe": Family("granitemoe", {**COMMON, **EXPERT_WIDTH}, (granite_moe,), rewrite=halved_shared_expert),
    "granitemoeshared": Family("granitemoe", {**COMMON, **EXPERT_WIDTH}, (granite_moe,), rewrite=halved_shared_expert),
    "phimoe": Family("phimoe", {**COMMON, **EXPERT_WIDTH}, (phimoe,), rewrite=factor_tensors),
    "minimax_m2": Family("minimax-m2", {**COMMON, **EXPERT_WIDTH}, (minimax_m2,)),
    "ernie4_5_moe": Family("ernie4_5-moe", ERNIE, (ernie_moe,)),
    "hunyuan_v1_moe": Family("hunyuan-moe", SIZES, (hunyuan_moe,)),
    "mistral4": Family("mistral4", {**COMMON, **SHARED, "feed_forward_length": "intermediate_size"}, (mistral4,)),
}
