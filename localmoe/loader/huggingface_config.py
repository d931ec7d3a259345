"""config.json's values under GGUF's keys; every value that alters the computation is carried over or refused by name.

A family is a row of `FAMILIES`: the GGUF architecture, whole numbers that only change their name, and functions.
What transformers 5.23 computes decides (its models/*/modeling_*.py); older config spellings are read beside the new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from localmoe.errors import FileFormatError, UnsupportedError
from localmoe.loader.source import listed, shown

Keys = dict[str, Any]
INT_LIMIT = 1 << 31

# Values without any bearing on the forward pass of these families: bookkeeping, training, and how to generate.
HARMLESS = frozenset(
    {
        "_attn_implementation", "_commit_hash", "_name_or_path", "architectures", "attention_dropout",
        "attn_implementation", "auto_map", "aux_loss_alpha", "bos_token_id", "decoder_start_token_id", "do_sample",
        "dtype", "embd_pdrop", "eos_token_id", "ep_size", "hidden_dropout", "id2label", "initializer_range",
        "label2id", "length_penalty", "max_length", "max_window_layers", "model_type", "num_beam_groups", "num_beams",
        "num_mtp_layers", "num_nextn_predict_layers", "num_return_sequences", "output_router_logits", "pad_token_id",
        "pretraining_tp", "qk_head_dim", "repetition_penalty", "resid_pdrop", "return_dict", "router_aux_loss_coef",
        "router_jitter_noise", "seq_aux", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype",
        "transformers.js_config", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version",
        "use_cache", "use_flash_attn",
    }
)  # fmt: skip


class Settings:
    """The values of one JSON object; remembers which were taken. A null counts as absent, as transformers has it."""

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        self.values, self.origin = values, origin
        self._taken: set[str] = set()

    def take(self, *names: str) -> Any:
        """The first of several spellings that is there, else None."""
        self._taken.update(names)
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def whole(self, *names: str, default: int | None = None) -> int:
        """A whole number from 0 below 2^31. Raises FileFormatError when it is missing or of another kind."""
        found: Any = self.take(*names)
        found = default if found is None else found
        if type(found) is not int or not 0 <= found < INT_LIMIT:
            raise self.wrong(names[0], found, "a whole number from 0 below 2^31")
        return found

    def number(self, *names: str, default: float | None = None) -> float:
        found: Any = self.take(*names)
        found = default if found is None else found
        if type(found) not in (int, float) or not math.isfinite(found) or abs(found) > 1e38:
            raise self.wrong(names[0], found, "a number")
        return float(found)

    def flag(self, name: str, default: bool) -> bool:
        found = self.take(name)
        found = default if found is None else found
        if not isinstance(found, bool):
            raise self.wrong(name, found, "true or false")
        return found

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses, with UnsupportedError, a value that is there and not among those implemented."""
        found = self.take(name)
        if found is not None and found not in allowed:
            possible = " or ".join(repr(value) for value in allowed)
            raise UnsupportedError(f"{self.origin}: {name} is {shown(found)}; possible is {possible}")

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        """Refuses what nobody took, unless it is off (null, false, 0 or empty) or has no bearing."""
        left = [
            f"{shown(name)} = {shown(value, 40)}"
            for name, value in self.values.items()
            if name not in self._taken and name not in harmless and value
        ]
        if left:
            raise UnsupportedError(f"{self.origin}: not implemented: {listed(left)}")

    def wrong(self, name: str, found: Any, expected: str) -> FileFormatError:
        value = "missing" if found is None else shown(found)
        return FileFormatError(f"{self.origin}: {shown(name)} is {value}, expected {expected}")


@dataclass(frozen=True)
class Family:
    """How one `model_type` becomes a GGUF architecture; GGUF keys stand without the architecture's prefix."""

    architecture: str
    numbers: Mapping[str, str]
    steps: tuple[Callable[[Settings, Keys, str], None], ...]


def heads(settings: Settings, keys: Keys, architecture: str) -> None:
    """Grouped-query attention; head_dim may be missing or null, except where it is no quotient (Qwen3: 128)."""
    count = settings.whole("num_attention_heads")
    if count < 1:
        raise settings.wrong("num_attention_heads", count, "at least 1")
    default = 128 if architecture == "qwen3" else keys["embedding_length"] // count
    length = settings.whole("head_dim", default=default)
    keys["attention.head_count"] = count
    keys["attention.head_count_kv"] = settings.whole("num_key_value_heads", default=count)
    keys["attention.key_length"] = keys["attention.value_length"] = keys["rope.dimension_count"] = length
    settings.expect("attention_bias", False)
    settings.expect("qkv_bias", True)
    settings.expect("mlp_bias", False)
    settings.expect("partial_rotary_factor", 1, 1.0)


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
    default = 1e6 if settings.values["model_type"] == "mixtral" else 1e4
    keys["rope.freq_base"] = inner.number("rope_theta", default=settings.number("rope_theta", default=default))
    kind = inner.take("rope_type", "type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedError(
            f"{inner.origin}: rope_type is {shown(kind)}; possible are default, linear, llama3 and yarn"
        )
    inner.expect("partial_rotary_factor", 1, 1.0)
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
    inner.finish()


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
        # deepseek2 files hold a tenth of mscale_all_dim here, all others the number itself (llama.cpp's conversion).
        keys["rope.scaling.yarn_log_multiplier"] = denominator * (0.1 if architecture == "deepseek2" else 1.0)
        keys["rope.scaling.yarn_mscale"] = numerator or 1.0
        implied = magnitude(numerator or 1.0) / magnitude(denominator)
    wanted = implied if numerator and denominator else magnitude(1.0)
    wanted = inner.number("attention_factor", default=wanted)
    if wanted != implied:
        keys["rope.scaling.attn_factor"] = wanted / implied
    if not inner.flag("truncate", True):
        keys["rope.scaling.yarn_truncate"] = False


COMMON = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings", "vocab_size": "vocab_size",
}  # fmt: skip
CHOSEN = {**COMMON, "expert_used_count": "num_experts_per_tok"}
QWEN_MOE = {**CHOSEN, "expert_feed_forward_length": "moe_intermediate_size"}
SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
DEEPSEEK = {**QWEN_MOE, "expert_shared_count": "n_shared_experts"}
EXPERT_COUNT = ("num_experts", "num_local_experts", "n_routed_experts")

FAMILIES = {
    "llama": Family("llama", COMMON, (heads, rope)),
    "mistral": Family("llama", COMMON, (heads, mistral_window, rope)),
    "mixtral": Family("llama", CHOSEN, (heads, mixtral_window, rope)),
    "qwen2": Family("qwen2", COMMON, (heads, qwen_window, rope)),
    "qwen2_moe": Family("qwen2moe", {**QWEN_MOE, **SHARED}, (heads, qwen_window, softmax_experts, rope)),
    "qwen3": Family("qwen3", COMMON, (heads, qwen_window, rope)),
    "qwen3_moe": Family("qwen3moe", QWEN_MOE, (heads, qwen_window, softmax_experts, rope)),
    "olmoe": Family("olmoe", CHOSEN, (heads, softmax_experts, rope)),
    "deepseek_v2": Family("deepseek2", DEEPSEEK, (latent_heads, deepseek_experts, rope)),
    "deepseek_v3": Family("deepseek2", DEEPSEEK, (latent_heads, deepseek_experts, rope)),
}


def config_keys(values: Mapping[str, Any], origin: str) -> tuple[str, dict[str, Any], bool | None]:
    """The GGUF architecture, its keys with prefix, and what tie_word_embeddings says (None where it says nothing).

    Raises: UnsupportedError (model_type, or a value that is not implemented), FileFormatError (missing, wrong kind).
    """
    settings = Settings(values, origin)
    kind = settings.take("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UnsupportedError(f"{origin}: model_type is {shown(kind)}; possible are {', '.join(FAMILIES)}")
    quantization = settings.take("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedError(
            f"{origin}: weights quantised by {shown(method)}; possible are F32, F16 and BF16, or a GGUF file"
        )
    keys: Keys = {name: settings.whole(key) for name, key in family.numbers.items()}
    if "expert_used_count" in keys:
        keys["expert_count"] = settings.whole(*EXPERT_COUNT)
    keys["attention.layer_norm_rms_epsilon"] = settings.number("rms_norm_eps")
    settings.expect("hidden_act", "silu")
    for step in family.steps:
        step(settings, keys, family.architecture)
    tied = settings.flag("tie_word_embeddings", False) if settings.take("tie_word_embeddings") is not None else None
    settings.finish(HARMLESS)
    return family.architecture, {f"{family.architecture}.{name}": value for name, value in keys.items()}, tied
