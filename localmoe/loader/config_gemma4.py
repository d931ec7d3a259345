"""Gemma 4's config.json under GGUF's keys; see `config_json.Family`.

What transformers 5.23 computes decides (its models/gemma4/modeling_gemma4.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from localmoe.errors import UnsupportedError
from localmoe.formats import F32, Weight
from localmoe.loader.config_json import Family, Keys, Makers, Settings
from localmoe.loader.config_steps import COMMON, layer_pattern
from localmoe.loader.source import shown

TANH = ("gelu_pytorch_tanh",)
STILL = 1e30  # the factor of a frequency that does not turn, as llama.cpp's converter has it


def gemma4(settings: Settings, keys: Keys, architecture: str) -> None:
    """Heads by the kind of layer; whether keys are values is told by the tensors that there are."""
    blocks = keys["block_count"]
    settings.expect("hidden_activation", *TANH)
    settings.expect("attention_bias", False)
    settings.expect("use_bidirectional_attention", "vision")
    settings.take("attention_k_eq_v", "cache_implementation")
    keys["attention.head_count"] = settings.whole("num_attention_heads")
    keys["attention.sliding_window"] = settings.whole("sliding_window", default=512)
    local = layer_pattern(settings, keys, "sliding_attention", [(i + 1) % 6 > 0 for i in range(blocks)])
    if local:
        local[-1] = False  # transformers makes the last layer see everything
    keys["attention.sliding_window_pattern"] = local
    heads(settings, keys, local)
    shared = keys["attention.shared_kv_layers"] = settings.whole("num_kv_shared_layers", default=0)
    if settings.flag("use_double_wide_mlp", False):
        width = keys["feed_forward_length"]
        keys["feed_forward_length"] = [width if i < blocks - shared else 2 * width for i in range(blocks)]
    keys["final_logit_softcapping"] = settings.number("final_logit_softcapping", default=0.0)
    keys["embedding_length_per_layer_input"] = settings.whole(
        "hidden_size_per_layer_input", default=0 if "hidden_size_per_layer_input" in settings.values else 256
    )
    if keys["embedding_length_per_layer_input"]:
        settings.expect("vocab_size_per_layer_input", keys["vocab_size"])
    settings.take("vocab_size_per_layer_input")
    if settings.flag("enable_moe_block", False):
        keys["expert_count"] = settings.whole("num_experts")
        keys["expert_used_count"] = settings.whole("top_k_experts")
        keys["expert_feed_forward_length"] = settings.whole("moe_intermediate_size")
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        settings.take(name)
    ropes(settings, keys)


def heads(settings: Settings, keys: Keys, local: list[bool]) -> None:
    """Widths and counts of layers without window: by names of their own, or (transformers 5) layer by layer."""
    width, count = settings.whole("head_dim", default=256), settings.whole("num_key_value_heads", default=4)
    wide, by_layer = settings.whole("global_head_dim", default=512), settings.take("per_layer_config")
    few, same = settings.whole("num_global_key_value_heads", default=count), settings.flag("attention_k_eq_v", False)
    few = few if same else count  # of no account where values have a matrix of their own
    if by_layer is not None:
        whole = {str(i) for i, on in enumerate(local) if not on}
        alike = list(by_layer.values()) if isinstance(by_layer, dict) else [None]
        if (alike and set(by_layer) != whole) or not all(isinstance(one, dict) and one == alike[0] for one in alike):
            possible = "one and the same for each layer without window"
            raise UnsupportedError(f"{settings.origin}: per_layer_config is {shown(by_layer)}; possible is {possible}")
        one = Settings((alike[0] if alike else None) or {}, f"{settings.origin}: per_layer_config")
        wide, few = one.whole("head_dim", default=width), one.whole("num_key_value_heads", default=count)
        one.finish()
    keys["attention.key_length"] = keys["attention.value_length"] = keys["rope.dimension_count"] = wide
    keys["attention.key_length_swa"] = keys["attention.value_length_swa"] = keys["rope.dimension_count_swa"] = width
    keys["attention.head_count_kv"] = [count if on else few for on in local]


def ropes(settings: Settings, keys: Keys) -> None:
    """Each kind of layer has its own; "proportional" turns a part of a head, its frequencies those of the whole."""
    found = settings.take("rope_parameters") or {}
    whole = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
    kinds = {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    if not isinstance(found, dict) or any(not isinstance(found.get(kind, {}), dict) for kind in kinds):
        raise settings.wrong("rope_parameters", found, "an object for each kind of layer")
    by_kind = {
        kind: Settings(found.get(kind) or default, f"{settings.origin}: rope_parameters: {kind}")
        for kind, default in kinds.items()
    }
    Settings({k: v for k, v in found.items() if k not in kinds}, f"{settings.origin}: rope_parameters").finish()
    full, local = by_kind["full_attention"], by_kind["sliding_attention"]
    keys["rope.freq_base"], keys["rope.freq_base_swa"] = full.number("rope_theta"), local.number("rope_theta")
    full.expect("rope_type", "proportional", "default")
    local.expect("rope_type", "default")
    half = keys["attention.key_length"] // 2
    share, factor = full.number("partial_rotary_factor", default=1.0), full.number("factor", default=1.0)
    if full.values.get("rope_type") == "default":
        full.expect("partial_rotary_factor", 1.0, 1)
        full.expect("factor", 1.0, 1)
    turning = int(share * keys["attention.key_length"] // 2)
    if not 0 < share <= 1 or factor <= 0:
        raise full.wrong("partial_rotary_factor", share, "a share from 0 to 1, and a factor above 0")
    keys["rope.factors"] = [factor] * turning + [STILL] * (half - turning)
    for one in by_kind.values():
        one.finish()


def factor_tensor(makers: Makers, keys: Keys) -> None:
    makers["rope_freqs.weight"] = partial(_vector, np.array(keys["rope.factors"], np.float32))


def _vector(values: Any) -> Weight:
    return Weight("rope_freqs.weight", values.shape, F32, (values.view(np.uint8).reshape(-1),))


GEMMA4 = Family("gemma4", COMMON, (gemma4,), TANH, rewrite=factor_tensor)
